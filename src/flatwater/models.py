"""The files of exported models, by path, whatever their format."""

from __future__ import annotations

from pathlib import Path

from flatwater.errors import CheckpointError
from flatwater.inspection import Inspection
from flatwater.inspection.pir import inspect_pir, is_pir

__all__ = ["find_models", "inspect_models"]


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
        from flatwater.paddle.program import inspect_legacy

        return inspect_legacy(path)
    if path.suffix == ".json":
        return inspect_pir(path)
    raise CheckpointError(f"{path}: is not a model by its suffix; give .onnx, .json or .pdmodel")
