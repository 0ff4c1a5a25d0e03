"""Inspection of exported files: which norms they hold, which could be folded, and what is no model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import paddle
import pytest
from networks import randomize
from onnx_graphs import FOLDABLE, STAYS, conv_norm
from paddle import nn
from paddle.static import InputSpec

import flatwater.paddle as fw
from flatwater.errors import CheckpointError
from flatwater.inspection import Inspection
from flatwater.models import find_models, inspect_models

SPEC = [InputSpec([None, 3, 8, 8], "float32", "x")]


def inspect_one(path: Path) -> Inspection:
    (found,) = inspect_models(path)
    return found


def layers() -> list[nn.Layer]:
    """Seven norms: into a convolution, into what follows, training, none of a batch, and into a product."""
    return [
        *(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), nn.ReLU()),
        *(nn.BatchNorm2D(4), nn.Conv2D(4, 4, 1, bias_attr=False)),
        *(nn.BatchNorm2D(4, use_global_stats=False), nn.Conv2DTranspose(4, 4, 2), nn.InstanceNorm2D(4)),
        *(nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1D(6)),
        nn.LayerNorm(6),
    ]


EXPECTED = [
    ("batch_norm", 4, True, False),
    ("batch_norm", 4, True, False),
    ("batch_norm", 4, False, True),
    ("instance_norm", 4, False, False),
    ("group_norm", 4, False, False),
    ("batch_norm", 6, True, False),
    ("layer_norm", 6, False, False),
]


def verdicts(found: Inspection) -> list[tuple[str, int | None, bool, bool]]:
    return [
        (norm.kind, norm.channels, norm.folds_into is not None, norm.batch_statistics is not None)
        for norm in found.norms
    ]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomize(nn.Sequential(*layers()))
    model.eval()
    path = tmp_path_factory.mktemp("program") / "model"
    paddle.jit.save(model, str(path), SPEC)
    return path


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in the format that Paddle wrote until version 3, which needs a process of its own."""
    path = tmp_path_factory.mktemp("legacy") / "model"
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import paddle, test_inspect as t\n"
        "model = paddle.nn.Sequential(*t.layers()); model.eval()\n"
        "paddle.jit.save(model, sys.argv[1], t.SPEC)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(path), str(Path(__file__).parent)]
    environment = os.environ | {"FLAGS_enable_pir_api": "0"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    return path


@pytest.mark.parametrize("name", FOLDABLE)
def test_norms_of_onnx_that_could_be_folded(name: str, tmp_path: Path) -> None:
    onnx.save(FOLDABLE[name](), str(tmp_path / "model.onnx"))
    found = inspect_one(tmp_path / "model.onnx")
    assert len(found.foldable) == 1
    assert not found.training


@pytest.mark.parametrize("name", STAYS)
def test_norms_of_onnx_that_stay(name: str, tmp_path: Path) -> None:
    build, words = STAYS[name]
    onnx.save(build(), str(tmp_path / "model.onnx"))
    (norm,) = inspect_one(tmp_path / "model.onnx").norms
    assert norm.folds_into is None
    assert words in (norm.reason or "")
    assert (norm.batch_statistics is not None) == name.startswith("training")


def test_who_feeds_and_who_reads_a_norm(tmp_path: Path) -> None:
    onnx.save(STAYS["read twice"][0](), str(tmp_path / "model.onnx"))
    (norm,) = inspect_one(tmp_path / "model.onnx").norms
    assert (norm.name, norm.kind, norm.channels) == ("the n", "batch_norm", 6)
    assert norm.reads == "Conv the c"
    assert norm.read_by == ("Add the y",)


def test_norms_of_nested_graphs_are_found(tmp_path: Path) -> None:
    inner = conv_norm()
    branch = onnx.helper.make_graph(
        inner.nodes, "branch", [], [onnx.helper.make_tensor_value_info("y", 1, None)], inner.weights
    )
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["z"])],
        "other",
        [],
        [onnx.helper.make_tensor_value_info("z", 1, None)],
    )
    outer = conv_norm()
    outer.nodes[:], outer.weights[:] = (
        [onnx.helper.make_node("If", ["condition"], ["out"], then_branch=branch, else_branch=other)],
        [onnx.helper.make_tensor("condition", onnx.TensorProto.BOOL, [], [True])],
    )
    onnx.save(outer.model(), str(tmp_path / "model.onnx"))
    assert len(inspect_one(tmp_path / "model.onnx").foldable) == 1


def test_norms_of_a_program(program: Path) -> None:
    found = inspect_one(program.with_suffix(".json"))
    assert verdicts(found) == EXPECTED
    # Paddle counts its layers over the whole process.
    assert re.fullmatch(r"BatchNorm2D_\d+ \(batch_norm2d_\d+\)", found.norms[2].name)
    assert "use_global_stats=False" in (found.norms[2].batch_statistics or "")
    assert [re.sub(r"_\d+$", "", reader) for reader in found.norms[0].read_by] == ["relu ReLU"]


def test_norms_of_an_older_program(legacy: Path) -> None:
    assert verdicts(inspect_one(legacy.with_suffix(".pdmodel"))) == EXPECTED


def test_a_program_in_training_mode_is_flagged(program: Path, tmp_path: Path) -> None:
    content = json.loads(program.with_suffix(".json").read_text())
    operations = content["program"]["regions"][0]["blocks"][0]["ops"]
    first = next(operation for operation in operations if operation["#"] == "1.batch_norm_")
    for attribute in first["A"]:
        if attribute["N"] in ("is_test", "use_global_stats"):
            attribute["AT"]["D"] = False
    (tmp_path / "model.json").write_text(json.dumps(content))
    norm, _ = inspect_one(tmp_path / "model.json").training
    assert "is_test=False" in (norm.batch_statistics or "")


def test_an_export_is_found_by_folder_and_by_prefix(tmp_path: Path) -> None:
    model = randomize(nn.Sequential(fw.ConvBNLayer(3, 4)))
    fw.export(model, tmp_path / "net", SPEC, fold=False)
    (tmp_path / "labels.json").write_text('{"program": "another"}')
    files = [tmp_path / "net.json", tmp_path / "net.onnx"]
    assert find_models(tmp_path) == files
    assert find_models(tmp_path / "net") == files
    assert [len(found.foldable) for found in inspect_models(tmp_path)] == [1, 1]
    fw.export(model, tmp_path / "net", SPEC)
    assert [len(found.norms) for found in inspect_models(tmp_path)] == [0, 0]


@pytest.mark.parametrize("suffix", [".json", ".pdmodel", ".onnx"])
@pytest.mark.parametrize("content", [b"", b"garbage " * 50, b"\x08\x07", b'{"base_code": {"magic": "pir"}}', b"[]"])
def test_what_is_no_model_is_named(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\{suffix}: is ") as caught:
        inspect_models(file)
    assert "\n" not in str(caught.value)


def test_where_there_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model in this folder"):
        inspect_models(tmp_path)
    with pytest.raises(CheckpointError, match=r"nothing\.onnx: there is no model of this name"):
        inspect_models(tmp_path / "nothing.onnx")
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(CheckpointError, match="is not a model by its suffix"):
        inspect_models(tmp_path / "model.txt")


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flatwater", "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command(program: Path, tmp_path: Path) -> None:
    file = str(program.with_suffix(".json"))
    plain = run_command(file)
    assert plain.returncode == 0
    assert "7 norms in 24 operations, 3 of them foldable, 1 in training mode" in " ".join(plain.stdout.split())
    parsed = run_command(file, "--json", "--fail-on", "foldable")
    assert parsed.returncode == 3
    (model,) = json.loads(parsed.stdout)["models"]
    assert (model["foldable"], model["training"], len(model["norms"])) == (3, 1, 7)

    onnx.save(STAYS["read twice"][0](), str(tmp_path / "model.onnx"))
    assert run_command(str(tmp_path), "--fail-on", "foldable", "--fail-on", "training").returncode == 0
    assert run_command(str(tmp_path), "--fail-on", "norms").returncode == 3
    missing = run_command(str(tmp_path / "nothing"))
    assert missing.returncode == 1
    assert missing.stderr.startswith("flatwater: ")
    assert missing.stderr.count("\n") == 1
