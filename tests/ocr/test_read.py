"""Reading with an exported model, here a tiny one whose answers are known: each character is ink at its own height."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from flatwater.errors import CheckpointError, DataError
from flatwater.recipes.ocr.read import Reader, Reading, write_meta

ALPHABET = "平水行舟"
BAND = 8  # rows of a character
CELL = 16  # columns of a character
STEP = 4  # columns of a step of the output


def build_model(classes: int = len(ALPHABET) + 1, channels: int = 1, height: int = 32) -> onnx.ModelProto:
    """One convolution: class i + 1 wants its band dark, the blank (class 0) wants nothing dark."""
    weight = np.zeros((classes, channels, height, STEP), np.float32)
    for index in range(1, classes):
        weight[index, :, (index - 1) * BAND : index * BAND] = -5.0 / (BAND * STEP)
    bias = np.zeros(classes, np.float32)
    bias[0] = 4.0
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "weight", "bias"], ["maps"], strides=[height, STEP]),
            helper.make_node("Squeeze", ["maps", "row"], ["columns"]),
            helper.make_node("Transpose", ["columns"], ["logits"], perm=[0, 2, 1]),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", channels, height, "W"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "T", classes])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(bias, "bias"),
            numpy_helper.from_array(np.array([2]), "row"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def write_line(path: Path, text: str, *, scale: int = 1) -> Path:
    """Ink at each character's height, a gap between characters."""
    pixels = np.full((32, CELL * len(text) + STEP), 230, np.uint8)
    for place, character in enumerate(text):
        row, column = ALPHABET.index(character) * BAND, place * CELL + STEP
        pixels[row : row + BAND, column : column + CELL - STEP] = 20
    Image.fromarray(pixels).resize((pixels.shape[1] * scale, 32 * scale), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, as far as reading needs it."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    onnx.save(build_model(), folder / "model" / "recognizer.onnx")
    write_meta(folder / "model" / "recognizer", ALPHABET)
    return folder


@pytest.mark.parametrize("where", ["", "model", "model/recognizer.onnx"])
def test_reads_lines_of_any_length_in_order(run: Path, tmp_path: Path, where: str) -> None:
    texts = ["平水行舟", "舟", "水水平平行"]  # repeats need the blank between them
    images = [write_line(tmp_path / f"{index}.png", text) for index, text in enumerate(texts)]
    readings = list(Reader(run / where).read(images))
    assert [reading.text for reading in readings] == texts
    assert [reading.path for reading in readings] == images
    assert all(0.5 < reading.confidence <= 1.0 for reading in readings)


def test_a_larger_picture_of_the_same_line_reads_the_same(run: Path, tmp_path: Path) -> None:
    large = write_line(tmp_path / "large.png", "舟行水平", scale=3)
    (reading,) = Reader(run).read([large])
    assert reading.text == "舟行水平"


def in_sixteen_bits(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)


def on_transparent_paper(picture: Image.Image) -> Image.Image:
    black = Image.new("L", picture.size, 0)
    return Image.merge("LA", (black, picture.point(lambda level: 255 if level < 128 else 0)))


@pytest.mark.parametrize(
    "convert",
    [
        lambda picture: picture.convert("RGB"),
        lambda picture: picture.convert("P"),
        lambda picture: picture.convert("1"),
        in_sixteen_bits,
        on_transparent_paper,
    ],
    ids=["RGB", "palette", "one bit", "16 bits", "transparent"],
)
def test_any_kind_of_picture_reads_the_same(
    run: Path, tmp_path: Path, convert: Callable[[Image.Image], Image.Image]
) -> None:
    path = write_line(tmp_path / "line.png", "行平舟水")
    with Image.open(path) as picture:
        convert(picture).save(path)
    assert [reading.text for reading in Reader(run).read([path])] == ["行平舟水"]


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (500, 2)])
@pytest.mark.parametrize("level", [0, 255])
def test_an_empty_picture_of_any_size_reads_as_nothing(
    run: Path, tmp_path: Path, size: tuple[int, int], level: int
) -> None:
    Image.new("L", size, level).save(tmp_path / "empty.png")
    (reading,) = Reader(run).read([tmp_path / "empty.png"])
    assert reading.text == ""
    assert 0.5 < reading.confidence <= 1.0


def test_a_picture_far_too_wide_is_refused(run: Path, tmp_path: Path) -> None:
    Image.new("L", (9000, 32)).save(tmp_path / "wide.png")
    with pytest.raises(DataError, match=r"wide\.png: is 9000 x 32 pixels"):
        list(Reader(run).read([tmp_path / "wide.png"]))


def test_reads_one_at_a_time_so_that_those_before_a_bad_one_arrive(run: Path, tmp_path: Path) -> None:
    good = write_line(tmp_path / "good.png", "平水")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    readings = Reader(run).read([good, bad])
    first = next(readings)
    assert isinstance(first, Reading)
    assert first.text == "平水"
    with pytest.raises(DataError, match=r"bad\.png"):
        next(readings)


def test_a_missing_image_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png"):
        list(Reader(run).read([tmp_path / "nowhere.png"]))


def test_meta_is_what_the_format_says(tmp_path: Path) -> None:
    write_meta(tmp_path / "recognizer.onnx", ALPHABET)
    content = (tmp_path / "recognizer-meta.json").read_text(encoding="utf-8")
    assert json.loads(content) == {"format": "flatwater-ocr", "version": 1, "height": 32, "alphabet": ALPHABET}
    assert ALPHABET in content  # readable, not escaped


def remove_model(folder: Path) -> None:
    (folder / "model" / "recognizer.onnx").unlink()


def remove_meta(folder: Path) -> None:
    (folder / "model" / "recognizer-meta.json").unlink()


def truncate_model(folder: Path) -> None:
    path = folder / "model" / "recognizer.onnx"
    path.write_bytes(path.read_bytes()[:150])


def meta(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model" / "recognizer-meta.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


def model(**shape: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        onnx.save(build_model(**shape), folder / "model" / "recognizer.onnx")

    return change


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no model": (remove_model, "there is no recognizer.onnx"),
    "truncated model": (truncate_model, "ONNX Runtime can load"),
    "no meta": (remove_meta, "recognizer-meta.json: cannot be read"),
    "another format": (meta(format="paddleocr"), "does not describe a flatwater-ocr model"),
    "a later version": (meta(version=2), "of version 1"),
    "another height": (meta(height=48), "must say height 32"),
    "no alphabet": (meta(alphabet=None), "alphabet of distinct characters"),
    "a repeated character": (meta(alphabet="平平"), "alphabet of distinct characters"),
    "an alphabet of another model": (meta(alphabet="平水"), "is not a line recogniser for 2 characters"),
    "a colour model": (model(channels=3), "is not a line recogniser"),
    "another number of classes": (model(classes=4), "is not a line recogniser"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_read_is_refused_in_one_line(run: Path, fault: str) -> None:
    break_it, message = FAULTS[fault]
    break_it(run)
    with pytest.raises(CheckpointError, match=message) as caught:
        Reader(run)
    assert "\n" not in str(caught.value)
    assert str(run) in str(caught.value)


def test_meta_that_is_not_json(run: Path) -> None:
    (run / "model" / "recognizer-meta.json").write_text("平水", encoding="utf-8")
    with pytest.raises(CheckpointError, match="it is not JSON"):
        Reader(run)


def test_a_folder_or_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "nowhere.onnx"):
        with pytest.raises(CheckpointError, match=f"there is no {'recognizer' if not path.suffix else 'nowhere'}.onnx"):
            Reader(path)


def test_reading_imports_no_training_framework(run: Path, tmp_path: Path) -> None:
    image = write_line(tmp_path / "line.png", "行舟")
    code = (
        "import sys\nfrom pathlib import Path\nfrom flatwater.recipes.ocr.read import Reader\n"
        f"print(next(Reader(Path({str(run)!r})).read([Path({str(image)!r})])).text)\n"
        "assert not {'paddle', 'torch', 'matplotlib', 'pydantic', 'jinja2', 'yaml'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, encoding="utf-8"
    )
    assert (result.returncode, result.stdout.strip()) == (0, "行舟"), result.stderr
