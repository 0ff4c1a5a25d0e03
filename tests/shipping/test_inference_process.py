"""Paddle Inference in a process of its own: what crashes there is a form that failed, and the next one runs again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import randomize
from paddle import nn
from paddle.static import InputSpec

import flatwater.paddle as fw
from flatwater.errors import InputError, VerificationError
from flatwater.models import verify_models
from flatwater.paddle.shipping import inference, inference_worker
from flatwater.paddle.shipping.inference import InferenceError, load_inference

SPEC = [InputSpec([None, 3, 8, 8], "float32", "image")]
ONEDNN = "Paddle Inference, oneDNN"
CRASHES = "import os, signal, sys; os.read(int(sys.argv[1]), 1); os.kill(os.getpid(), signal.SIGSEGV)"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("model") / "net"
    fw.export(randomize(nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4))), prefix, SPEC, ("paddle",))
    return prefix


@pytest.fixture
def images() -> list[np.ndarray]:
    return [np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)]


def load(prefix: Path) -> Any:
    return load_inference(Path(f"{prefix}.json"), Path(f"{prefix}.pdiparams"), ir=True, onednn=False)


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that ends as Paddle does where a pass of it crashes, in the place of the other process."""
    script = tmp_path / "crashes.py"
    script.write_text(CRASHES)
    inference._close()
    monkeypatch.setattr(inference_worker, "__file__", str(script))
    return script


def test_a_crash_is_an_error_that_names_the_signal(crashing: Path, exported: Path) -> None:
    with pytest.raises(InferenceError, match="crashed the process in which it ran \\(SIGSEGV\\)"):
        load(exported)


def test_a_crash_is_a_form_that_failed(crashing: Path, exported: Path) -> None:
    report = verify_models(exported, batch_sizes=[1])
    assert not report.passed
    assert [row.broken for row in report.rows] == [True] * 3
    assert all("SIGSEGV" in (row.note or "") for row in report.rows)


def test_an_export_that_crashes_a_form_says_how_to_leave_it_out(crashing: Path, tmp_path: Path) -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), nn.LeakyReLU()))
    target = tmp_path / "new" / "net"
    with pytest.raises(VerificationError, match=r"without=\['Paddle Inference, IR off'\]"):
        fw.export(model, target, SPEC, ("paddle",))
    assert not target.parent.exists()


def test_what_is_loaded_survives_the_process_that_had_it(exported: Path, images: list[np.ndarray]) -> None:
    run = load(exported)
    (before,) = run(images)
    os.kill(inference._process()._popen.pid, signal.SIGKILL)
    inference._process()._popen.wait()
    (after,) = run(images)
    np.testing.assert_array_equal(after, before)


def test_one_process_serves_all_and_forgets_what_is_gone(exported: Path, images: list[np.ndarray]) -> None:
    first, second = load(exported), load(exported)
    process = inference._process()
    np.testing.assert_array_equal(first(images)[0], second(images)[0])
    gone = first._number
    del first
    assert gone in inference._dropped
    second(images)
    assert gone not in inference._dropped
    with pytest.raises(InferenceError, match=str(gone)):
        process.ask("run", gone, images)
    assert inference._process() is process


def test_after_an_interruption_no_answer_is_taken_for_the_next(
    exported: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load(exported)
    expected = run(images)

    def interrupted() -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(inference._process()._connection, "recv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run([2 * images[0]])
    np.testing.assert_array_equal(run(images)[0], expected[0])


def test_what_paddle_says_of_a_file_is_kept(tmp_path: Path) -> None:
    for suffix in ("json", "pdiparams"):
        (tmp_path / f"net.{suffix}").write_text("{}")
    with pytest.raises(InferenceError):
        load(tmp_path / "net")


def test_a_form_is_left_out_and_the_report_says_so(tmp_path: Path) -> None:
    # Paddle 3.3.1: oneDNN's passes crash on leaky_relu behind a convolution.
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), nn.LeakyReLU()))
    report = fw.export(model, tmp_path / "net", SPEC, ("paddle",), without=[ONEDNN]).verification
    assert report.passed
    assert ONEDNN not in {row.form for row in report.rows}
    assert report.as_dict()["left_out"] == [ONEDNN]
    assert f"{ONEDNN}: not compared" in str(report)
    assert verify_models(tmp_path / "net", without=[ONEDNN]).passed


def test_a_form_that_there_is_not_cannot_be_left_out(exported: Path) -> None:
    with pytest.raises(InputError, match=r"without=\['oneDNN'\].*'Paddle Inference, IR off'"):
        verify_models(exported, without=["oneDNN"])
