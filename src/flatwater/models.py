"""The files of exported models, by path, whatever their format and without the model that they came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flatwater.errors import CheckpointError, InputError, VerificationError
from flatwater.inspection import Inspection
from flatwater.inspection.pir import inspect_pir, is_pir
from flatwater.verify import (
    Decode,
    Finding,
    Form,
    InputSpec,
    VerifyReport,
    batch_sizes_of,
    check_tolerance,
    compare_forms,
    default_tolerance,
    look_inside,
    narrowed,
    running_inputs,
)

__all__ = ["find_models", "inspect_models", "verify_models"]


def find_models(path: str | Path) -> list[Path]:
    """The model that ``path`` is, or all that lie in the folder ``path`` or share the prefix ``path``.

    Files that are models: ``.onnx``, ``.pdmodel``, and ``.json`` where it holds a Paddle program.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        where = "in this folder"
    else:
        files = [path.with_name(path.name + suffix) for suffix in (".json", ".pdmodel", ".onnx")]
        where = "of this name"
    models = [
        file
        for file in files
        if (file.suffix in (".onnx", ".pdmodel") and file.is_file()) or (file.suffix == ".json" and is_pir(file))
    ]
    if not models:
        raise CheckpointError(f"{path}: there is no model {where}; give one: .onnx, .json or .pdmodel")
    return models


def inspect_models(path: str | Path) -> list[Inspection]:
    """What norms there are in each of the files of :func:`find_models`, found without running any.

    Raises:
        CheckpointError: there is no model, or a file is not one.
        BackendError: the package that reads the format is not installed.
    """
    return [_inspect(file) for file in find_models(path)]


def _inspect(path: Path) -> Inspection:
    if path.suffix == ".onnx":
        from flatwater.onnx import inspect_onnx

        return inspect_onnx(path)
    if path.suffix == ".pdmodel":
        from flatwater.paddle.shipping.legacy import inspect_legacy

        return inspect_legacy(path)
    if path.suffix == ".json":
        return inspect_pir(path)
    raise _no_model(path)


def verify_models(
    path: str | Path,
    inputs: Sequence[str | Path] = (),
    *,
    against: str | Path | None = None,
    batch_sizes: Sequence[int] = (1, 2, 17),
    tolerance: float | None = None,
    decode: Decode | None = None,
    without: Sequence[str] = (),
) -> VerifyReport:
    """Run the same inputs through every form of an exported model, and compare, where there is no live model.

    Forms: for a Paddle program ``paddle.jit.load`` and Paddle Inference with its IR passes off, on, and on with
    oneDNN; for an ONNX file ONNX Runtime at each optimisation level. The first form of what ``against`` is, else of
    ``path``, is what the others are compared with: the reloaded program if there is one, else ONNX Runtime without
    optimisation. Norms in training mode, and those that use the batch in ``eval()``, are findings: such a model does
    not pass. If a form is off, the report names the first norm layer at which it is, see
    :func:`flatwater.verify.find_divergence`.

    Args:
        path: a file, the prefix of files, or a folder with one model.
        inputs: see :func:`flatwater.verify.load_inputs`; by default what :func:`flatwater.verify.make_inputs` makes.
        against: another such path.
        batch_sizes: where the model fixes the batch, only that one is run.
        tolerance: default :data:`flatwater.verify.TOLERANCES` for the dtype of the parameters (float32: 1e-4), or more
            where the model multiplies rounding, see :mod:`flatwater.rounding`.
        decode, without: see :func:`flatwater.paddle.verify`.

    Raises:
        CheckpointError: there is no model, or a file is not one.
        InputError: several models in the folder, inputs that are not what the model takes, or a form to be left out
            that there is not.
        ExportError: the reference cannot be loaded.
        VerificationError: it does not run, and has norms that use the batch.
        BackendError: a package is not installed.
    """
    files = _one_model(path)
    opened = [_open(file) for file in files]
    forms = [form for one in opened for form in one.forms]
    if against is None:
        first, reference = opened[0], forms.pop(0)
        name = reference.name
    else:
        first = _open(_one_model(against)[0])
        reference = first.forms[0]
        name = f"{reference.name} of {against}"
    findings = [
        Finding(f"{file.name}: {norm.name}", norm.batch_statistics or "")
        for file in files
        for norm in _inspect(file).training
    ]
    specs = first.inputs
    for one in opened:
        specs = narrowed(specs, one.inputs)
    run = reference.load()
    try:
        examples = running_inputs(run, specs, inputs)
    except InputError as error:
        if findings:
            # Paddle Inference does not run older programs with such norms at all.
            raise VerificationError(f"{error}; {findings[0].layer}: {findings[0].problem}") from error
        raise
    return compare_forms(
        run,
        forms,
        examples,
        batch_sizes=batch_sizes_of(specs, batch_sizes),
        tolerance=default_tolerance(first.dtype) if tolerance is None else check_tolerance(tolerance),
        decode=decode,
        reference=name,
        findings=findings,
        look=look_inside(reference),
        adapt=tolerance is None,
        without=without,
    )


def _one_model(path: str | Path) -> list[Path]:
    files = find_models(path)
    names = list(dict.fromkeys(file.stem for file in files))
    if len(names) > 1:
        raise InputError(f"{path}: holds several models ({', '.join(names)}); give the prefix of one")
    return files


class _Opened(NamedTuple):
    forms: list[Form]
    inputs: list[InputSpec]
    dtype: str


def _open(path: Path) -> _Opened:
    if path.suffix == ".onnx":
        from flatwater.onnx import load_onnx, onnx_forms, onnx_inputs, open_onnx, weight_dtype

        model = load_onnx(path)
        return _Opened(onnx_forms(path), onnx_inputs(open_onnx(path, "ORT_DISABLE_ALL")), weight_dtype(model))
    if path.suffix in (".json", ".pdmodel"):
        from flatwater.paddle.shipping.program import open_program

        return _Opened(*open_program(path))
    raise _no_model(path)


def _no_model(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: is not a model by its suffix; give .onnx, .json or .pdmodel")
