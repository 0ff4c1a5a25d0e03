"""Reading line images with an exported model: ONNX Runtime, NumPy and Pillow, and no training framework.

A model is two files beside each other, ``recognizer.onnx`` and ``recognizer-meta.json``::

    {"format": "flatwater-ocr", "version": 1,
     "height": 32,           # rows of the image that the network takes
     "alphabet": "的一是…"}   # class i + 1 of the output is alphabet[i]; class 0 is CTC's blank

The network takes float32 (N, 1, height, W) as :mod:`flatwater.recipes.ocr.preprocess` makes it, for any W, and
returns float32 logits (N, T, classes), T steps from left to right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime

from flatwater.errors import CheckpointError
from flatwater.files import write_whole
from flatwater.recipes.ocr.labels import Alphabet
from flatwater.recipes.ocr.preprocess import HEIGHT, load_line

__all__ = ["Reader", "Reading", "write_meta"]

_FORMAT = "flatwater-ocr"
_VERSION = 1
_MODEL = "recognizer.onnx"


class Reading(NamedTuple):
    """What was read in one image, and how sure the model is of it, in [0, 1]."""

    path: Path
    text: str
    confidence: float


class Reader:
    """Reads line images, one at a time, on one thread: a line is too little work to share.

    Args:
        model: the folder of a run, its ``model`` folder, or the ``.onnx`` file itself.

    Raises:
        CheckpointError: there is no such model, or one of its files is damaged or of another kind.
    """

    def __init__(self, model: Path) -> None:
        path = _find(model)
        self._alphabet = Alphabet(_read_meta(_meta_of(path)))
        self._session = _open(path)
        self._input = self._session.get_inputs()[0].name
        self._check(path)

    def read(self, images: Iterable[Path]) -> Iterator[Reading]:
        """Read each image when it is asked for, in the order given.

        Raises:
            DataError: an image is missing or cannot be read; those before it have been read.
        """
        for image in images:
            line = load_line(Path(image))
            (logits,) = self._session.run(None, {self._input: line[None]})
            text, confidence = self._alphabet.decode(logits[0])
            yield Reading(Path(image), text, confidence)

    def _check(self, path: Path) -> None:
        """Refuse a network whose shapes are not those of a line recogniser with this alphabet."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        classes = len(self._alphabet) + 1
        shapes = [(list(one.shape), one.type) for one in (*inputs, *outputs)]
        fits = (
            (len(inputs), len(outputs)) == (1, 1)
            and _matches(inputs[0], (None, 1, HEIGHT, None))
            and _matches(outputs[0], (None, None, classes))
        )
        if not fits:
            raise CheckpointError(
                f"{path}: is not a line recogniser for {classes - 1} characters: it maps {shapes}, "
                f"not [N, 1, {HEIGHT}, W] to [N, T, {classes}]; "
                "give the model that `flatwater ocr train` wrote, with its own -meta.json"
            )


def write_meta(model: Path, alphabet: str) -> None:
    """Write ``recognizer-meta.json`` beside ``model``, whole or not at all; the module's docstring holds the format.

    Args:
        model: the model's path, with or without its suffix.
        alphabet: its characters, in the order of its classes.
    """
    content = {"format": _FORMAT, "version": _VERSION, "height": HEIGHT, "alphabet": alphabet}
    write_whole(_meta_of(model), json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _meta_of(model: Path) -> Path:
    # Not recognizer.meta.json: Paddle takes that for a method of recognizer.json, and then loads neither.
    return model.with_name(f"{model.stem}-meta.json")


def _find(model: Path) -> Path:
    """The .onnx file that ``model`` means."""
    candidates = [model] if model.suffix == ".onnx" else [model / _MODEL, model / "model" / _MODEL]
    for path in candidates:
        if path.is_file():
            return path
    raise CheckpointError(
        f"{model}: there is no {candidates[0].name} here; give the folder of a finished run of `flatwater ocr train`, "
        "its model folder, or an .onnx file"
    )


def _read_meta(path: Path) -> str:
    """The alphabet."""
    remedy = "it must lie beside the model, as `flatwater ocr train` wrote it"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise CheckpointError(f"{path}: cannot be read ({reason}); {remedy}") from error
    if not isinstance(meta, dict) or (meta.get("format"), meta.get("version")) != (_FORMAT, _VERSION):
        raise CheckpointError(f"{path}: does not describe a {_FORMAT} model of version {_VERSION}; {remedy}")
    alphabet = meta.get("alphabet")
    if meta.get("height") != HEIGHT or not isinstance(alphabet, str) or not 0 < len(alphabet) == len(set(alphabet)):
        raise CheckpointError(
            f"{path}: must say height {HEIGHT} and an alphabet of distinct characters, "
            f"not {meta.get('height')!r} and {str(alphabet)[:20]!r}; {remedy}"
        )
    return alphabet


def _open(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no base class of their own
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: is not a model that ONNX Runtime can load ({reason}); export it again with `flatwater ocr train`"
        ) from error


def _matches(tensor: Any, shape: tuple[int | None, ...]) -> bool:
    """Whether a float32 tensor may have this shape; a name or None in either stands for any size."""
    return (
        tensor.type == "tensor(float)"
        and len(tensor.shape) == len(shape)
        and all(
            not isinstance(has, int) or wants is None or has == wants
            for has, wants in zip(tensor.shape, shape, strict=True)
        )
    )
