"""The forms of a model that are compared, and the comparison."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from flatwater.errors import BackendError, CheckpointError, ExportError, InputError
from flatwater.verify.compare import largest_difference, same_argmax, same_items
from flatwater.verify.inputs import InputSpec
from flatwater.verify.report import Finding, VerifyReport, VerifyRow

__all__ = [
    "Arrays",
    "Decode",
    "Form",
    "Run",
    "compare_forms",
    "one_line",
    "onnx_forms",
    "onnx_inputs",
    "open_onnx",
    "resize_batch",
]

_ONNX_LEVELS = {
    "unoptimised": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}

Arrays: TypeAlias = list[npt.NDArray[Any]]
Run: TypeAlias = Callable[[Arrays], Arrays]


class Form(NamedTuple):
    """A form of a model: its name in the table, and how it is loaded for running."""

    name: str
    load: Callable[[], Run]


Decode: TypeAlias = Callable[[Arrays], Sequence[Any]]


def compare_forms(
    live: Run,
    forms: Sequence[Form],
    inputs: Arrays,
    *,
    batch_sizes: Sequence[int],
    tolerance: float,
    decode: Decode | None = None,
    reference: str = "the live model",
    findings: Sequence[Finding] = (),
) -> VerifyReport:
    """Run ``inputs`` at every batch size through the live model and every form.

    A form that cannot be loaded or fails to run is a row that does not pass, with the first line of its reason.

    Args:
        live: what is right.
        forms: what is compared with it.
        inputs: cut or repeated to each batch size, see :func:`resize_batch`.
        batch_sizes: at least one.
        tolerance: what the relative difference may be.
        decode: makes one item a sample, as a text, of a model's outputs; every item has to be equal too.
        reference: what ``live`` is called.
        findings: what is known to be wrong already; a report with findings does not pass.

    Raises:
        CheckpointError: a file is not a model of its kind.
    """
    batches = {size: resize_batch(inputs, size) for size in batch_sizes}
    expected = {size: live(batch) for size, batch in batches.items()}
    rows = []
    for form in forms:
        run: Run | None = None
        broken = ""
        try:
            run = form.load()
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # whatever a runtime raises is its reason for not running this model
            broken = f"cannot be loaded: {one_line(error)}"
        for size, batch in batches.items():
            if run is None:
                rows.append(VerifyRow(form.name, size, None, None, tolerance, passed=False, note=broken))
                continue
            try:
                actual = run([array.copy() for array in batch])
            except MemoryError:
                raise
            except Exception as error:  # as above
                note = f"fails to run: {one_line(error)}"
                rows.append(VerifyRow(form.name, size, None, None, tolerance, passed=False, note=note))
                continue
            rows.append(_compare(form.name, size, expected[size], actual, tolerance, decode))
    return VerifyReport(rows, reference, list(findings))


def _compare(
    name: str, size: int, expected: Arrays, actual: Arrays, tolerance: float, decode: Decode | None
) -> VerifyRow:
    found = largest_difference(expected, actual)
    comparable = math.isfinite(found.max_rel)
    decoded = None if decode is None or found.note else same_items(decode(expected), decode(actual))
    return VerifyRow(
        name,
        size,
        found.max_abs if math.isfinite(found.max_abs) else None,
        found.max_rel if comparable else None,
        tolerance,
        passed=found.max_rel <= tolerance and decoded in (None, 1.0),
        note=found.note or (None if comparable else "differs from a reference that is all zero"),
        argmax=None if found.note else same_argmax(expected, actual),
        decoded=decoded,
    )


def resize_batch(inputs: Arrays, size: int) -> Arrays:
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


def onnx_forms(model: Path | bytes) -> list[Form]:
    """ONNX Runtime on the CPU at each of its optimisation levels, none first; ``model`` is a file or its content."""
    return [
        Form(f"ONNX Runtime, {words}", functools.partial(_run_onnx, model, level))
        for words, level in _ONNX_LEVELS.items()
    ]


def _run_onnx(model: Path | bytes, level: str) -> Run:
    session = open_onnx(model, level)
    names = [entry.name for entry in session.get_inputs()]
    return lambda inputs: list(session.run(None, dict(zip(names, inputs, strict=True))))


def open_onnx(model: Path | bytes, level: str = "ORT_ENABLE_ALL") -> Any:
    """A session of ONNX Runtime on the CPU.

    Raises:
        BackendError: onnxruntime is not installed.
        CheckpointError: the file is not an ONNX model.
        ExportError: ONNX Runtime cannot load it, as for an operator that it does not know.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("onnxruntime is not installed; pip install 'flatwater[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = "the model" if isinstance(model, bytes) else str(model)
        # ONNX Runtime has one exception class per status code, in a private module.
        if type(error).__name__ in ("InvalidProtobuf", "NoSuchFile", "NoModel"):
            raise CheckpointError(f"{name}: is not an ONNX model ({one_line(error)}); export it again") from error
        raise ExportError(f"{name}: cannot be loaded by ONNX Runtime ({one_line(error)})") from error


def onnx_inputs(session: Any) -> list[InputSpec]:
    """What a session's model takes.

    Raises:
        InputError: an input that is not a tensor.
    """
    specs = []
    for entry in session.get_inputs():
        if not entry.type.startswith("tensor("):
            raise InputError(f"input {entry.name!r} is a {entry.type}; only tensors can be given")
        word = entry.type[len("tensor(") : -1]
        dtype = {"float": "float32", "double": "float64"}.get(word, word)
        shape = [size if isinstance(size, int) and size > 0 else None for size in entry.shape]
        specs.append(InputSpec(entry.name, shape, dtype))
    return specs


def one_line(error: BaseException) -> str:
    """The line of a message that says what happened; frameworks wrap it in banners and stack traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error:" in line] or [line for line in lines if not line.startswith("---")]
    return (telling[-1] if telling else type(error).__name__)[:300]
