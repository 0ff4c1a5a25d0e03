"""Inputs on which an ONNX model runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flatwater.errors import ExportError, FlatwaterError, InputError
from flatwater.verify import Arrays, InputSpec, load_inputs, make_inputs, one_line, onnx_inputs, open_onnx

__all__ = ["onnx_examples"]


def onnx_examples(
    model: Path | bytes, files: Sequence[str | Path], batch_sizes: Sequence[int]
) -> tuple[Arrays, Sequence[int]]:
    """Inputs on which an ONNX model runs, from files or made, and the batch sizes that it can have.

    Raises:
        ExportError: it cannot be loaded, or does not run on the inputs.
        CheckpointError, InputError, BackendError: see :func:`~flatwater.onnx.fold_onnx`.
    """
    try:
        session = open_onnx(model, "ORT_DISABLE_ALL")
    except FlatwaterError:
        raise
    except Exception as error:  # one class per status code, in a private module
        raise ExportError(f"ONNX Runtime cannot load the model: {one_line(error)}") from error
    specs: list[InputSpec] = onnx_inputs(session)
    fixed = [specs[0].shape[0]] if specs and specs[0].shape else []
    sizes = [size for size in fixed if size is not None] or list(batch_sizes)
    reason = ""
    for arrays in [load_inputs(files, specs)] if files else make_inputs(specs):
        try:
            session.run(None, {spec.name: array for spec, array in zip(specs, arrays, strict=True)})
        except Exception as error:  # as above
            reason = one_line(error)
            continue
        return arrays, sizes
    raise InputError(f"the model does not run on the inputs ({reason}); give inputs that it takes")
