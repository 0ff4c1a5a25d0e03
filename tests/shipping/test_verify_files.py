"""Verification of exported files without their model, what it finds besides numbers, and how it is shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import paddle
import pytest
from networks import example, randomize
from onnx_graphs import STAYS, conv_norm
from paddle import nn
from paddle.static import InputSpec

import flatwater.paddle as fw
from flatwater.errors import BackendError, CheckpointError, InputError, VerificationError
from flatwater.models import verify_models
from flatwater.paddle.shipping.conversion import convert_to_onnx
from flatwater.paddle.shipping.verify import verify
from flatwater.verify import Divergence, Finding, Form, VerifyReport, VerifyRow, compare_forms, verify_page

IMAGE = [InputSpec([None, 3, 8, 8], "float32", "image")]
ONNX = [f"ONNX Runtime, {level}" for level in ("unoptimised", "basic", "extended", "all")]
INFERENCE = ["Paddle Inference, IR off", "Paddle Inference, IR on", "Paddle Inference, oneDNN"]


def network(use_global_stats: bool | None = None) -> nn.Sequential:
    layers = [nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4, use_global_stats=use_global_stats), nn.ReLU()]
    return randomize(nn.Sequential(*layers, nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(4, 5)))


def capture(model: nn.Layer, prefix: Path) -> Path:
    """What Paddle's own tools make of it: nothing is folded and nothing verified."""
    model.eval()
    paddle.jit.save(model, str(prefix), IMAGE)
    onnx_file = prefix.with_suffix(".onnx")
    convert_to_onnx(prefix.with_suffix(".json"), prefix.with_suffix(".pdiparams"), onnx_file, "network")
    return prefix


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return capture(network(), tmp_path_factory.mktemp("good") / "net")


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its norm uses the batch in eval()."""
    return capture(network(use_global_stats=False), tmp_path_factory.mktemp("bad") / "net")


def forms(report: VerifyReport) -> list[str]:
    return list(dict.fromkeys(row.form for row in report.rows))


def test_every_form_of_a_model_by_prefix_and_by_folder(good: Path) -> None:
    report = verify_models(good)
    assert report.passed
    assert report.reference == "paddle.jit.load"
    assert forms(report) == INFERENCE + ONNX
    assert {row.batch for row in report.rows} == {1, 2, 17}
    assert all(row.argmax == 1.0 for row in report.rows)
    assert forms(verify_models(good.parent, batch_sizes=[3])) == INFERENCE + ONNX


def test_one_file_is_compared_with_itself_unoptimised(good: Path, tmp_path: Path) -> None:
    report = verify_models(good.with_suffix(".onnx"), batch_sizes=[3])
    assert report.passed
    assert report.reference == ONNX[0]
    assert forms(report) == ONNX[1:]
    assert forms(verify_models(good.with_suffix(".json"), batch_sizes=[3])) == INFERENCE


def test_a_folded_file_against_the_original(good: Path, bad: Path) -> None:
    report = verify_models(good.with_suffix(".onnx"), against=good, batch_sizes=[3])
    assert report.passed
    assert forms(report) == ONNX
    assert report.reference == f"paddle.jit.load of {good}"
    # The same weights, but for the setting that one of them has.
    assert not verify_models(good.with_suffix(".onnx"), against=bad, batch_sizes=[3]).passed


def test_sizes_that_only_one_of_two_files_fixes(tmp_path: Path) -> None:
    model = network()
    model.eval()
    for name, shape in (("free", [None, 3, None, None]), ("fixed", [4, 3, 24, 20])):
        paddle.jit.save(model, str(tmp_path / name), [InputSpec(shape, "float32", "image")])
    for path, against in (("fixed", "free"), ("free", "fixed")):
        report = verify_models(tmp_path / path, against=tmp_path / against)
        assert report.passed
        assert {row.batch for row in report.rows} == {4}


def test_the_users_inputs(good: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 8, 8), "float32"))
    assert verify_models(good, [tmp_path / "a.npy"], batch_sizes=[2]).passed
    np.save(tmp_path / "b.npy", np.zeros((2, 3, 8, 9), "float32"))
    with pytest.raises(InputError, match=r"but the array has \[2, 3, 8, 9\]"):
        verify_models(good, [tmp_path / "b.npy"])


def test_older_programs_run_in_paddle_inference(good: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import paddle, test_verify_files as t\n"
        "for name, setting in (('good', None), ('bad', False)):\n"
        "    model = t.network(setting); model.eval()\n"
        "    paddle.jit.save(model, sys.argv[1] + '/' + name, t.IMAGE)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(Path(__file__).parent)]
    environment = os.environ | {"FLAGS_enable_pir_api": "0"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    report = verify_models(tmp_path / "good.pdmodel", batch_sizes=[3])
    assert report.passed
    assert report.reference == INFERENCE[0]
    assert forms(report) == INFERENCE[1:]
    # Another network of the same architecture, whose norms come from other convolutions.
    for path, against in ((tmp_path / "good.pdmodel", good), (good, tmp_path / "good.pdmodel")):
        other = verify_models(path, against=against, batch_sizes=[3])
        assert other.diverging is not None
        assert re.search(r"batch_norm2d_\d+", str(other.diverging.layer))
    with pytest.raises(VerificationError, match=r"bad\.pdmodel: batch_norm2d_\d+: use_global_stats=False"):
        verify_models(tmp_path / "bad.pdmodel", batch_sizes=[3])
    (tmp_path / "good.pdiparams").unlink()
    with pytest.raises(CheckpointError, match=r"good\.pdiparams: is missing"):
        verify_models(tmp_path / "good.pdmodel")


def test_a_norm_that_uses_the_batch_in_eval_is_named_in_files(bad: Path) -> None:
    report = verify_models(bad)
    assert not report.passed
    assert {row.form for row in report.failures} == {"Paddle Inference, oneDNN"}
    # Paddle's own forms of one program are far apart: that is why it must be named.
    assert max(row.max_rel or 0.0 for row in report.failures) > 0.1
    program, file = report.findings
    assert re.fullmatch(r"net\.json: BatchNorm2D(_\d+)? \(batch_norm2d_\d+\)", program.layer)
    assert program.problem.startswith("use_global_stats=False")
    assert "set use_global_stats=None" in program.problem
    assert file.problem.startswith("training_mode=1")
    assert "use_global_stats=False" in str(report)


@pytest.mark.parametrize("ours", [False, True])
def test_a_norm_that_uses_the_batch_in_eval_is_named_live(ours: bool, bad: Path) -> None:
    model = network(use_global_stats=False)
    if ours:
        fw.convert(model)  # whose layers take use_global_stats=False for what None means
    model.eval()
    report = verify(model, bad, example(3, 3, 8, 8), batch_sizes=[3], show=False)
    assert [finding.layer for finding in report.findings] == ([] if ours else ["1 (BatchNorm2D)"])
    assert not report.passed


def test_such_a_model_is_not_exported_even_where_no_form_differs(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"1 \(BatchNorm2D\): use_global_stats=False: .*nothing was written"):
        fw.export(network(use_global_stats=False), tmp_path / "net", IMAGE, ["onnx"], fold=False)
    assert not list(tmp_path.iterdir())


def test_training_mode_in_onnx_is_a_finding(tmp_path: Path) -> None:
    onnx.save(STAYS["training mode"][0](), str(tmp_path / "model.onnx"))
    report = verify_models(tmp_path)
    assert [finding.layer for finding in report.findings] == ["model.onnx: the y"]
    assert not report.passed


def scores(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(rows, "float32")]


def test_classes_and_decoded_items_beside_the_error() -> None:
    right = scores([0.0, 1.0, 0.0], [1.0, 0.0, 0.9999])
    near = scores([0.0, 1.0, 0.0], [0.9998, 0.0, 0.9999])
    forms = [Form("near", lambda: lambda _: near), Form("right", lambda: lambda _: right)]

    def letters(outputs: list[np.ndarray]) -> list[str]:
        return ["abc"[index] for index in outputs[0].argmax(1)]

    arguments = {"batch_sizes": [2], "tolerance": 1e-3}
    report = compare_forms(lambda _: right, forms, [np.zeros((2, 1))], **arguments)  # type: ignore[arg-type]
    assert [(row.argmax, row.decoded, row.passed) for row in report.rows] == [(0.5, None, True), (1.0, None, True)]
    report = compare_forms(lambda _: right, forms, [np.zeros((2, 1))], decode=letters, **arguments)  # type: ignore[arg-type]
    assert [(row.decoded, row.passed) for row in report.rows] == [(0.5, False), (1.0, True)]
    assert "50%" in str(report)


def test_decoding_in_verify(good: Path) -> None:
    report = verify_models(good, batch_sizes=[2], decode=lambda outputs: outputs[0].argmax(1).tolist())
    assert all(row.decoded == 1.0 for row in report.rows)


def test_the_page_is_self_contained_and_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        VerifyRow("form <a>", 1, 0.0, 0.0, 1e-4, passed=True, argmax=0.9999),
        VerifyRow("form <a>", 2, 0.5, 0.25, 1e-4, passed=False, argmax=0.5),
        VerifyRow("broken", 1, None, None, 1e-4, passed=False, note="fails to run: <reason>"),
    ]
    found = Divergence("form <a>", "layer 5", "the first norm layer to diverge is layer 5")
    page = verify_page(VerifyReport(rows, "the live model", [Finding("layer 7", "is wrong")], found), "my <model>")
    text = re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))
    assert "my &lt;model&gt;" in text
    assert "2 of 3 comparisons fail" in text
    assert "layer 7 : is wrong." in text
    assert "form &lt;a&gt; : the first norm layer to diverge is layer 5." in text
    assert "is 2.5e-01; 0.0001 is allowed." in text
    assert "fails to run: &lt;reason&gt;" in text
    assert "99.9%" in text
    assert not re.search(r"https?:|<script|url\(|@import", page)
    assert "Every form agrees" in verify_page(VerifyReport(rows[:1]), "model")
    noisy = VerifyReport(rows[:1], noise=1e-3)
    assert "<p>The model multiplies rounding, and moves by 1.0e-03" in verify_page(noisy, "model")
    assert "prove nothing" in verify_page(VerifyReport(rows[:1], noise=float("inf")), "model")
    assert VerifyReport(rows[:1], noise=float("inf")).as_dict()["noise"] is None
    assert "there is none" in str(VerifyReport([]))
    assert "Not to be shipped" in verify_page(VerifyReport(rows[:1], findings=[Finding("layer", "is wrong")]), "model")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(BackendError, match="jinja2 is not installed"):
        verify_page(VerifyReport(rows), "model")


def test_where_there_are_several_models(tmp_path: Path) -> None:
    for name in ("a", "b"):
        onnx.save(conv_norm().model(), str(tmp_path / f"{name}.onnx"))
    with pytest.raises(InputError, match=r"holds several models \(a, b\)"):
        verify_models(tmp_path)
    assert verify_models(tmp_path / "a", batch_sizes=[1]).passed


def test_the_command(good: Path, bad: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flatwater", "verify", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    page = tmp_path / "page.html"
    plain = run(str(good), "--batch", "3", "--html", str(page))
    assert (plain.returncode, plain.stderr) == (0, "")
    assert "ONNX Runtime" in plain.stdout
    assert "Every form agrees" in page.read_text()
    parsed = run(str(bad), "--batch", "3", "--json")
    assert parsed.returncode == 3
    assert json.loads(parsed.stdout)["findings"][0]["layer"].startswith("net.json: BatchNorm2D")
    missing = run(str(tmp_path / "nothing"))
    assert missing.returncode == 1
    assert missing.stderr.count("\n") == 1
