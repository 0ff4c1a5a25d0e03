"""Inputs to compare the forms of a model on: made from what it says it takes, or the user's own files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flatwater.errors import InputError

__all__ = ["InputSpec", "batch_sizes_of", "load_inputs", "make_inputs", "narrowed", "resize_batch", "running_inputs"]

_BATCH = 2
# Sizes that dynamic axes other than the batch are tried with: small, as ImageNet's networks want, smaller.
_SIZES = (64, 224, 32)


class InputSpec(NamedTuple):
    """What a model says of one of its inputs; None for a size that is free."""

    name: str
    shape: Sequence[int | None]
    dtype: str


def running_inputs(
    run: Callable[[list[npt.NDArray[Any]]], Any], specs: Sequence[InputSpec], files: Sequence[str | Path]
) -> list[npt.NDArray[Any]]:
    """The user's inputs if there are files, see :func:`load_inputs`, else the first that a model runs on.

    Args:
        run: the model.
        specs: what it takes.
        files: see :func:`load_inputs`.

    Raises:
        InputError: files that are no inputs, or a model that does not run on any.
    """
    reason: Exception | None = None
    for arrays in [load_inputs(files, specs)] if files else make_inputs(specs):
        try:
            run(arrays)
        except MemoryError:
            raise
        except Exception as error:  # whatever a runtime raises on a size that the model cannot take
            reason = error
            continue
        return arrays
    words = " ".join(str(reason).split())[:300]
    raise InputError(f"the model does not run on the inputs ({words}); give inputs that it takes")


def batch_sizes_of(specs: Sequence[InputSpec], wanted: Sequence[int]) -> list[int]:
    """The sizes that are wanted, or the one that the first input fixes."""
    fixed = specs[0].shape[0] if specs and specs[0].shape else None
    return list(wanted) if fixed is None else [fixed]


def narrowed(specs: Sequence[InputSpec], others: Sequence[InputSpec]) -> list[InputSpec]:
    """What a model takes that another takes too: sizes that only the other fixes are fixed.

    Inputs belong together by their order, as names do not survive every conversion. Where the two contradict each
    other, ``specs`` stay as they are.
    """
    if len(specs) != len(others):
        return list(specs)
    return [_narrowed(spec, other) for spec, other in zip(specs, others, strict=True)]


def _narrowed(spec: InputSpec, other: InputSpec) -> InputSpec:
    if len(spec.shape) != len(other.shape):
        return spec
    sizes = zip(spec.shape, other.shape, strict=True)
    return spec._replace(shape=[size if mine is None else mine for mine, size in sizes])


def make_inputs(specs: Sequence[InputSpec]) -> Iterator[list[npt.NDArray[Any]]]:
    """Normal deviates for floats, 0 and 1 for integers, the same in every run.

    Yields:
        Inputs of one size after another for the free axes, as not every model runs with every size. All free axes
        alike, except the batch: images are square, and sequences that go together are equally long.

    Raises:
        InputError: an input of a dtype that has no such values.
    """
    free = sum(size is None for spec in specs for size in spec.shape[1:])
    for size in _SIZES if free else _SIZES[:1]:
        generator = np.random.default_rng(20150211)
        yield [_draw(generator, spec, size) for spec in specs]


def _draw(generator: np.random.Generator, spec: InputSpec, size: int) -> npt.NDArray[Any]:
    shape = [(_BATCH if axis == 0 else size) if length is None else length for axis, length in enumerate(spec.shape)]
    if spec.dtype in ("float32", "float64", "float16"):
        return generator.standard_normal(shape).astype(spec.dtype)
    if spec.dtype.startswith(("int", "uint", "bool")):
        return generator.integers(0, 2, shape).astype(spec.dtype)
    raise InputError(f"input {spec.name!r} of dtype {spec.dtype} has no example; give example inputs")


def load_inputs(files: Sequence[str | Path], specs: Sequence[InputSpec]) -> list[npt.NDArray[Any]]:
    """The user's inputs, in the order of ``specs``.

    Args:
        files: ``.npy`` files in the model's order, or one ``.npz`` with an array for each input by its name; where
            there is one array and one input, names do not matter.
        specs: what the model takes. Numbers of another floating type, or whole numbers where floats are wanted, are
            converted to it.

    Raises:
        InputError: a file that is missing or is no such file, or arrays that are not what the model takes.
    """
    read = [_read(Path(file)) for file in files]
    if len(read) == 1 and isinstance(read[0], dict):
        named = read[0]
        if len(named) == len(specs) == 1:
            arrays = list(named.values())
        else:
            missing = [spec.name for spec in specs if spec.name not in named]
            if missing:
                raise InputError(f"{files[0]}: holds {', '.join(named) or 'nothing'}, but not {', '.join(missing)}")
            arrays = [named[spec.name] for spec in specs]
    else:
        arrays = [array for array in read if not isinstance(array, dict)]
        if len(arrays) != len(read):
            raise InputError("an .npz file stands for all inputs; give it alone, or .npy files")
    if len(arrays) != len(specs):
        wanted = ", ".join(spec.name for spec in specs)
        raise InputError(f"{len(arrays)} arrays for a model with {len(specs)} inputs ({wanted}); give one for each")
    return [_fitted(array, spec) for array, spec in zip(arrays, specs, strict=True)]


def _read(file: Path) -> npt.NDArray[Any] | dict[str, npt.NDArray[Any]]:
    if not file.is_file():
        raise InputError(f"{file}: there is no such file; give .npy or .npz files")
    try:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return {name: found[name] for name in found.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: holds no arrays ({reason}); write it with numpy.save or numpy.savez") from error


def _fitted(array: npt.NDArray[Any], spec: InputSpec) -> npt.NDArray[Any]:
    wanted = ["any" if size is None else size for size in spec.shape]
    fits = array.ndim == len(wanted) and all(
        axis == 0 or size is None or size == length
        for axis, (size, length) in enumerate(zip(spec.shape, array.shape, strict=True))
    )
    if not fits:
        raise InputError(f"input {spec.name!r} has the shape {wanted}, but the array has {list(array.shape)}")
    if array.dtype == spec.dtype:
        return array
    if np.dtype(spec.dtype).kind != "f" or array.dtype.kind not in "fiu":
        raise InputError(f"input {spec.name!r} is {spec.dtype}, but the array is {array.dtype}; convert it")
    return array.astype(spec.dtype)


def resize_batch(inputs: list[npt.NDArray[Any]], size: int) -> list[npt.NDArray[Any]]:
    """The inputs with ``size`` samples: the first ones, again from the start where there are too few.

    Floats are scaled down a little more in every repetition, so that no two samples are equal and a form that
    takes one for another is found out. Integers and booleans, often indices and masks, are repeated as they are.
    Tensors whose first axis is not as long as the first tensor's have no batch axis, and stay.

    Raises:
        InputError: ``size`` is not positive, or there is no sample to repeat.
    """
    if size < 1:
        raise InputError(f"batch size {size} is not positive; use sizes of at least 1")
    if not inputs or inputs[0].ndim == 0 or len(inputs[0]) == 0:
        raise InputError("the inputs hold no sample; give at least one, along the first axis")
    count = len(inputs[0])
    repetition, index = np.divmod(np.arange(size), count)
    factor = 1 - repetition / size

    def resize(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if not array.ndim or len(array) != count:
            return array
        taken: npt.NDArray[Any] = array[index]
        if not np.issubdtype(array.dtype, np.floating):
            return taken
        return np.asarray(taken * factor.reshape(-1, *(1,) * (array.ndim - 1)), dtype=array.dtype)

    return [resize(array) for array in inputs]
