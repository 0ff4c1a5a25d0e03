"""Which norm layers depend on which, found by experiment, and in what order that lets them be measured."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import paddle

from flatwater.paddle.running import to_numpy
from flatwater.paddle.surgery.population import first_tensor

__all__ = ["Matrix", "closure", "influences", "stages"]

Matrix: TypeAlias = npt.NDArray[np.bool_]

_Digests: TypeAlias = dict[str, list[bytes]]


def influences(layers: Mapping[str, Any], run: Callable[[], object]) -> Matrix:
    """Whether what layer i writes reaches what layer j reads: the element (i, j), layers in the given order.

    Found by experiment, which no operator of the model can hide from: ``run``, which has to do the same each time,
    is repeated with noise in place of what layer i writes, and layer j depends on it if it then reads other bits.
    Where that cannot be told, because two runs differ by themselves or the model does not run on noise, a layer
    counts as depending on all that ran before it. That takes as many runs as there are layers, and two.

    A layer that ``run`` does not reach counts as depending on all that it does reach. Where statistics that are NaN
    or weights that are 0 hide an influence, the layers between still show theirs: take the :func:`closure`.
    """
    paths = list(layers)
    clean = _digests(layers, run)
    place = {path: index for index, path in enumerate(clean)}  # in the order of their first calls
    matrix = np.zeros((len(paths), len(paths)), np.bool_)
    repeatable = _digests(layers, run) == clean
    for i, path in enumerate(paths):
        if path not in place:
            continue
        noisy = _noisy(layers, path, run) if repeatable else None
        for j, other in enumerate(paths):
            if other not in place:
                matrix[i, j] = True
            elif noisy is None:
                matrix[i, j] = place[path] < place[other]
            else:
                matrix[i, j] = noisy.get(other) != clean[other]
    return matrix


def closure(matrix: Matrix) -> Matrix:
    """What is reached over any number of steps (Warshall 1962)."""
    reached = matrix.copy()
    for middle in range(len(reached)):
        reached |= reached[:, [middle]] & reached[[middle], :]
    return reached


def stages(reached: Matrix) -> list[list[int]]:
    """The layers in as few groups as possible, each of which depends on earlier groups only, or on itself.

    Args:
        reached: the :func:`closure` of a matrix as of :func:`influences`.
    """
    before = reached & ~reached.T  # without the cycles of layers that run several times
    done = np.zeros(len(before), np.bool_)
    groups: list[list[int]] = []
    while not done.all():
        ready = ~done & ~(before & ~done[:, None]).any(axis=0)
        groups.append(np.flatnonzero(ready).tolist())
        done |= ready
    return groups


def _noisy(layers: Mapping[str, Any], path: str, run: Callable[[], object]) -> _Digests | None:
    """What the layers read while ``path`` writes noise; None if the model does not take it."""

    def replace(_: paddle.nn.Layer, inputs: tuple[Any, ...], output: Any) -> paddle.Tensor:
        if not isinstance(output, paddle.Tensor):
            raise TypeError(f"a norm layer wrote a {type(output).__name__}")
        noise = np.random.default_rng(0).normal(0.0, 100.0, output.shape)
        return paddle.to_tensor(noise, place=output.place).astype(output.dtype)

    handle = layers[path].register_forward_post_hook(replace)
    try:
        return _digests(layers, run)
    except Exception:  # whatever the model's own code raises on rubbish; the caller assumes the worst
        return None
    finally:
        handle.remove()


def _digests(layers: Mapping[str, Any], run: Callable[[], object]) -> _Digests:
    """What each layer reads in a run, call by call, as check values."""
    found: _Digests = {}
    with contextlib.ExitStack() as hooks:
        for path, layer in layers.items():

            def hook(_: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                x = first_tensor(inputs, kwargs)
                content = b"" if x is None else to_numpy(x).tobytes()
                found.setdefault(path, []).append(hashlib.blake2b(content, digest_size=16).digest())

            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run()
    return found
