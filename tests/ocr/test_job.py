"""The whole job as a user starts it, small: what it leaves behind, Ctrl-C, resuming, and folders it must not touch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flatwater import host
from flatwater.recipes.ocr.read import Reader

SMALL = [
    "train.steps=12",
    "train.batch_characters=24",
    "train.log_every=1",
    "train.evaluate_every=6",
    "train.evaluate_lines=8",
    "train.checkpoint_every=4",
    "train.monitor_every=4",
    "model.channels=[8,8,8,8]",
    "model.features=16",
    "data.characters=60",
    "data.sizes=[24]",
    "data.test_lines=24",
]


def command(folder: Path, *more: str) -> tuple[list[str], dict[str, str]]:
    environment = os.environ | {setting.variable: setting.value for setting in host.settings()}
    return [sys.executable, "-m", "flatwater", "ocr", "train", "--output", str(folder), *more], environment


def train(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments, environment = command(folder, *more)
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)


def test_the_whole_road(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = train(folder, *SMALL)
    assert result.returncode == 0, result.stderr
    assert "characters right" in result.stdout
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["char_accuracy"] <= 1
    assert metrics["char_accuracy_unseen_font"] <= 1
    assert metrics["test_lines"] == 24
    assert json.loads((folder / "verification.json").read_text(encoding="utf-8"))["passed"]
    assert len(json.loads((folder / "fold.json").read_text(encoding="utf-8"))["folded"]) == 5
    assert [layer["path"] for layer in json.loads((folder / "norms.json").read_text(encoding="utf-8"))["layers"]]
    names = {path.name for path in folder.rglob("*") if not path.is_dir()}
    assert {"recognizer.json", "recognizer.pdiparams", "recognizer.onnx", "recognizer-meta.json"} <= names
    assert not [name for name in names if name.startswith(".")], "temporary files were left behind"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")
    samples = json.loads((folder / "samples" / "samples.json").read_text(encoding="utf-8"))
    assert len(samples) == 24
    readings = Reader(folder).read([folder / "samples" / sample["file"] for sample in samples])
    assert [reading.text for reading in readings] == [sample["read"] for sample in samples]
    # Nothing that was put beside the model afterwards is in the way of who loads it.
    verify = [sys.executable, "-m", "flatwater", "verify", str(folder / "model"), "--batch", "1"]
    verified = subprocess.run(verify, capture_output=True, text=True, timeout=300)
    assert verified.returncode == 0, verified.stderr


def test_ctrl_c_saves_and_resume_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole, *SMALL).returncode == 0

    arguments, environment = command(broken, *SMALL)
    # In a session of its own: Ctrl-C reaches a whole terminal, and pytest is in this one.
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert (broken / "checkpoint" / "last.ckpt").is_file()
    assert not (broken / "metrics.json").exists()

    result = train(broken, "--resume")
    assert result.returncode == 0, result.stderr
    for name in ("char_accuracy", "char_accuracy_unseen_font", "line_accuracy"):
        first, second = (json.loads((folder / "metrics.json").read_text())[name] for folder in (whole, broken))
        assert first == second, name
    losses = [
        [point["loss"] for point in json.loads((folder / "history.json").read_text())["train"]]
        for folder in (whole, broken)
    ]
    assert losses[0] == losses[1]
    assert (whole / "model" / "recognizer.onnx").stat().st_size == (broken / "model" / "recognizer.onnx").stat().st_size


@pytest.mark.parametrize("kind", ["group_norm", "none"])
def test_other_norms_take_the_same_road(kind: str, tmp_path: Path) -> None:
    result = train(tmp_path, *SMALL, f"norm.kind={kind}", "norm.groups=4", "train.steps=2")
    assert result.returncode == 0, result.stderr


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    result = train(tmp_path, *SMALL)
    assert result.returncode == 1
    assert "holds files but no run" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_that_is_resumed_with_other_settings_stays_what_it_was(tmp_path: Path) -> None:
    assert train(tmp_path, *SMALL).returncode == 0
    before = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    result = train(tmp_path, "--resume", "optimizer.learning_rate=0.5")
    assert result.returncode == 1
    assert "learning_rate" in result.stderr.splitlines()[-1]
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == before
