"""Training on several ranks that Paddle's launcher starts: the same as on one, and whole whatever ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

import flatwater.paddle as fw
from flatwater.errors import ConfigError, DataError, DistributedError
from flatwater.host import Host, decisions
from flatwater.paddle.kinds import BATCH_NORMS
from flatwater.paddle.sync.collectives import Operation
from flatwater.recipes.ocr import checkpoint, config, data, preprocess, render, results
from flatwater.recipes.ocr import ranks as ranks_of
from flatwater.recipes.ocr.data import DataSource
from flatwater.recipes.ocr.model import build
from flatwater.recipes.ocr.ranks import World

SETTINGS = [
    "train.batch_characters=24",  # three lines of eight: one rank gets two of them, the other one
    "train.log_every=1",
    "train.evaluate_every=4",
    "train.evaluate_lines=4",
    "train.checkpoint_every=4",
    "model.channels=[8,8,8,8]",
    "model.features=16",
    "data.characters=60",
    "data.sizes=[24]",
    "data.test_lines=8",
]


def arguments(folder: Path, *more: str) -> list[str]:
    return ["ocr", "train", "--output", str(folder / "run"), *SETTINGS, *more]


def launch(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Two ranks, each with its output in a file of ``folder / "log"``; the launcher's own and rank 0's come here."""
    program = Path(sys.executable).with_name("flatwater")
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"),
            *("--log_dir", str(folder / "log"), str(program)),
            *arguments(folder, *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, output


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "run" / "history.json").read_text(encoding="utf-8"))
    return [point["loss"] for point in history["train"]]


def test_two_ranks_train_what_one_trains(tmp_path: Path) -> None:
    settings = ["norm=sync_batch_norm", "train.steps=6"]
    status, output = ended(launch(tmp_path / "two", *settings))
    assert status == 0, output
    assert "on 2 ranks (1.5 to 6 lines each)" in output
    alone = [sys.executable, "-m", "flatwater", *arguments(tmp_path / "one", *settings)]
    subprocess.run(alone, check=True, capture_output=True, timeout=120)

    # float32 sums over three lines in another order, through six steps of Adam.
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    found, expected = (checkpoint.load(tmp_path / name / "run/checkpoint/last.ckpt") for name in ("two", "one"))
    for name, value in expected.model.items():
        # Of weights that six steps of at most 0.003 have moved.
        np.testing.assert_allclose(found.model[name], value, rtol=1e-3, atol=2e-4, err_msg=name)

    metrics = json.loads((tmp_path / "two/run/metrics.json").read_text(encoding="utf-8"))
    assert metrics["batch"] == {"ranks": 2, "characters": 24, "lines": [3, 12]}
    assert "on 2 ranks" in (tmp_path / "two/run/report.html").read_text(encoding="utf-8")
    # Rank 1 wrote nothing into the run's folder, and had nothing to say.
    assert {path.name for path in (tmp_path / "two/run").iterdir()} == {
        path.name for path in (tmp_path / "one/run").iterdir()
    }
    other = (tmp_path / "two/log/workerlog.1").read_text(encoding="utf-8")
    assert "step" not in other
    assert "Traceback" not in other


def test_ctrl_c_keeps_what_ranks_have_and_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    saved = tmp_path / "run/checkpoint/last.ckpt"
    process = launch(tmp_path, "train.steps=100000")
    until(saved.is_file, process)
    process.send_signal(signal.SIGINT)  # what the terminal sends to the launcher
    ended(process)
    # The launcher shows nothing more of rank 0.
    shown = (tmp_path / "log/workerlog.0").read_text(encoding="utf-8")
    assert "stopped; go on with: flatwater ocr train --resume" in shown
    step = checkpoint.load(saved).progress["step"]
    assert len(losses(tmp_path)) == step

    process = launch(tmp_path, "train.steps=100000", "--resume")
    until(lambda: checkpoint.load(saved).progress["step"] > step + 4, process)
    os.kill(rank_1(tmp_path), signal.SIGKILL)
    status, _ = ended(process)
    assert status != 0
    assert not trainers(tmp_path), "a rank goes on alone"
    assert checkpoint.load(saved).progress["step"] > step


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, ended(process)[1]
        time.sleep(0.1)
    raise AssertionError("it never came")


def trainers(folder: Path) -> dict[int, int]:
    """Process numbers of the ranks that write to this folder, by rank."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            environment = (process / "environ").read_bytes().decode(errors="replace")
        except OSError:  # no process, or one that has just ended
            continue
        rank = re.search(r"PADDLE_TRAINER_ID=(\d+)", environment)
        if rank and str(folder / "run") in words and "paddle.distributed.launch" not in words:
            found[int(rank[1])] = int(process.name)
    return found


def rank_1(folder: Path) -> int:
    return trainers(folder)[1]


def check_shares(source: DataSource, step: int, ranks: int) -> None:
    """What the ranks have are the lines that one process has, of the same size."""
    whole = source.train_batch(step)
    shares = [source.train_batch(step, rank=rank, ranks=ranks) for rank in range(ranks)]
    for name in ("images", "frames", "labels", "label_lengths", "alignment"):
        expected = getattr(whole, name)
        if expected is None:
            assert all(getattr(share, name) is None for share in shares)
            continue
        dealt = np.empty_like(expected)
        for rank, share in enumerate(shares):
            dealt[rank::ranks] = getattr(share, name)
        np.testing.assert_array_equal(dealt, expected, err_msg=name)
    assert {share.whole for share in shares} == {whole.whole} == {len(whole.images)}


def test_shares_are_the_batch() -> None:
    source = DataSource(config.load(None, SETTINGS))
    for step in range(3):
        check_shares(source, step, ranks=3)


def test_a_rank_makes_pictures_of_its_own_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    source = DataSource(config.load(None, SETTINGS))
    whole = source.train_batch(0).images.shape
    made = []
    photograph = render._photograph
    monkeypatch.setattr(render, "_photograph", lambda ink, *more: made.append(ink.shape) or photograph(ink, *more))
    source.train_batch(0, rank=1, ranks=3)
    assert made == [(len(range(1, whole[0], 3)), *whole[2:])]


@pytest.fixture
def pictures(tmp_path: Path) -> DataSource:
    """Labelled images of several widths, JPEG and PNG, of which EXIF turns two."""
    generator = np.random.default_rng(0)
    names = []
    for number in range(6):
        picture = Image.fromarray(generator.integers(0, 256, (40, 60 + 30 * number), dtype=np.uint8))
        names.append(f"{number}.{'png' if number % 2 else 'jpg'}")
        exif = picture.getexif()
        if number >= 4:
            picture = picture.rotate(-90, expand=True)  # as a camera held upright stores it
            exif[ExifTags.Base.Orientation] = 8
        picture.save(tmp_path / names[-1], exif=exif)
    labels = tmp_path / "list.txt"
    labels.write_text("".join(f"{name}\t的\n" for name in names), encoding="utf-8")
    return DataSource(
        config.load(
            None,
            [
                *SETTINGS,
                "data.fonts=[]",
                f"data.labels={labels}",
                f"data.test_labels={labels}",
                "train.batch_characters=48",
            ],
        )
    )


def test_shares_of_labelled_images_are_the_batch(pictures: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        check_shares(pictures, step, ranks=2)
    for sample in pictures.test_set():
        assert preprocess.line_width(sample.picture) == sample.image().shape[-1]
    read = []
    monkeypatch.setattr(data, "load_line", lambda path: read.append(path) or preprocess.load_line(path))
    pictures.train_batch(0, rank=1, ranks=3)
    assert len(read) == 2
    with pytest.raises(DataError, match=r"data.labels makes batches of 6 lines, too few for 50 ranks"):
        pictures.train_batch(0, rank=0, ranks=50)


def test_an_image_that_nobody_can_read_is_named_by_every_rank(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    path.write_bytes(b"no picture")
    for read in (preprocess.line_width, preprocess.load_line):
        with pytest.raises(DataError, match=r"line\.png: cannot be read"):
            read(path)
    Image.new("L", (9000, 32)).save(path)
    for read in (preprocess.line_width, preprocess.load_line):
        with pytest.raises(DataError, match=r"line\.png: is 9000 x 32 pixels"):
            read(path)


def test_more_ranks_than_lines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    with pytest.raises(ConfigError, match=r"batches of 3 lines .* too few for 4 ranks; give at least 32"):
        World.join(config.load(None, SETTINGS))


def test_alone_nothing_is_shared() -> None:
    world = World.join(config.load(None, SETTINGS))
    assert (world.size, world.first) == (1, True)
    assert world.sum("numbers", [1.5, 2.0]) == [1.5, 2.0]
    settings = config.load(None, ["train.batch_characters=24", "data.max_length=6", "data.min_length=6"])
    assert str(results.Batch.of(settings, 1)) == "batch: 4 lines, 24 characters"
    assert str(results.Batch.of(settings, 2)) == "effective batch: 4 lines, 24 characters, on 2 ranks (2 lines each)"


@pytest.mark.parametrize(("ranks", "expected"), [(1, "BatchNorm2D"), (4, "SyncBatchNorm")])
def test_auto_looks_at_the_share_of_a_rank(ranks: int, expected: str) -> None:
    settings = config.load(None, ["norm=auto", "train.batch_characters=256"])  # 32 lines of eight characters
    model, policy = build(settings, classes=20, ranks=ranks)
    assert policy is not None
    assert [type(layer).__name__ for layer in model.sublayers() if isinstance(layer, BATCH_NORMS)] == [expected] * 5


@pytest.mark.parametrize("norm", ["norm=sync_batch_norm", "norm.rules=[{norm: sync_batch_norm}]"])
def test_ranks_wait_as_long_as_the_configuration_says(norm: str) -> None:
    model, _ = build(config.load(None, [norm, "train.timeout=7"]), classes=20, ranks=2)
    layers = [layer for layer in model.sublayers() if isinstance(layer, fw.SyncBatchNorm)]
    assert [layer._timeout for layer in layers] == [7.0] * 5
    assert config.load(None, []).train.timeout == 60


def test_what_ranks_exchange_is_called_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def sum(self, values: Any, operation: Operation, timeout: float) -> None:
            raise DistributedError(f"{operation}, {timeout:g} s; {operation.advice}")

    monkeypatch.setattr(ranks_of, "communicator_of", lambda *_: Gone())
    with pytest.raises(DistributedError) as caught:
        World(0, 2, timeout=5.0).sum("the loss of step 7", [1.5])
    assert "exchange of the loss of step 7 (1 number), 5 s; go on from the last checkpoint" in str(caught.value)
    assert "raise train.timeout" in str(caught.value)


def test_ranks_on_one_host_share_its_processors() -> None:
    threads = {ranks: decisions(Host(processors=8, bound_to=8, cores=8, ranks=ranks)) for ranks in (1, 3, 16)}
    found = {ranks: {one.variable: one.value for one in each} for ranks, each in threads.items()}
    assert {ranks: each["OMP_NUM_THREADS"] for ranks, each in found.items()} == {1: "8", 3: "2", 16: "1"}
    assert Host.look(environment={"PADDLE_LOCAL_SIZE": "2"}).ranks == 2
