"""Example inputs made from an ``input_spec``, the same ones every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from flatwater.errors import ExportError, InputError
from flatwater.paddle.running import Inputs, as_inputs, evaluating, run
from flatwater.verify import one_line

__all__ = ["batch_sizes_of", "check_input_spec", "make_examples"]

_BATCH = 2
# Sizes that dynamic axes other than the batch are tried with: small, as ImageNet's networks want, smaller.
_SIZES = (64, 224, 32)


def check_input_spec(input_spec: Any) -> list[paddle.static.InputSpec]:
    """The specs as a list.

    Raises:
        InputError: not a sequence of ``paddle.static.InputSpec`` with shapes.
    """
    if isinstance(input_spec, paddle.static.InputSpec):
        input_spec = [input_spec]
    if not isinstance(input_spec, Sequence) or not input_spec:
        raise InputError(f"input_spec={input_spec!r} is not a list of paddle.static.InputSpec")
    for spec in input_spec:
        if not isinstance(spec, paddle.static.InputSpec) or spec.shape is None:
            raise InputError(
                f"input_spec holds {spec!r}; give paddle.static.InputSpec([None, 3, 224, 224], 'float32') or the like"
            )
    return list(input_spec)


def batch_sizes_of(specs: Sequence[paddle.static.InputSpec]) -> tuple[int, ...]:
    """1, 2 and 17, or the one size that the first spec fixes."""
    shape = specs[0].shape
    return (1, 2, 17) if not shape or shape[0] in (None, -1) else (shape[0],)


def make_examples(model: paddle.nn.Layer, specs: Sequence[paddle.static.InputSpec]) -> Inputs:
    """Normal deviates for floats, 0 and 1 for integers, in the first sizes with which the model runs.

    Raises:
        ExportError: it runs with none of them.
    """
    dynamic = sum(size in (None, -1) for spec in specs for size in spec.shape[1:])
    reason = ""
    # All dynamic axes alike: images are square, and sequences that go together are equally long.
    for size in _SIZES if dynamic else _SIZES[:1]:
        generator = np.random.default_rng(20150211)
        arrays = [_draw(generator, spec, size) for spec in specs]
        inputs = as_inputs(arrays)
        with evaluating(model):
            try:
                run(model, inputs)
            except Exception as error:  # whatever the model raises on a size that it cannot take
                reason = one_line(error)
                continue
        return inputs
    raise ExportError(
        f"{type(model).__name__} does not run on inputs made from its input_spec ({reason}); "
        "give example_inputs that it takes"
    )


def _draw(generator: np.random.Generator, spec: paddle.static.InputSpec, size: int) -> npt.NDArray[Any]:
    shape = [
        (_BATCH if axis == 0 else size) if length in (None, -1) else length for axis, length in enumerate(spec.shape)
    ]
    dtype = str(spec.dtype).removeprefix("paddle.").lower()
    if dtype in ("float32", "float64", "float16"):
        return generator.standard_normal(shape).astype(dtype)
    if dtype.startswith(("int", "uint", "bool")):
        return generator.integers(0, 2, shape).astype(dtype)
    raise InputError(f"an input_spec of dtype {dtype} has no example; give example_inputs")
