"""Configuration: every mistake is one line that names the key and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from flatwater.errors import ConfigError
from flatwater.recipes.ocr.config import Config, load


def test_defaults_survive_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(Config().to_yaml(), encoding="utf-8")
    assert load(path) == load() == Config()


def test_overrides_go_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("norm: {momentum: 0.8, epsilon: 1.0e-3}\nseed: 3\n", encoding="utf-8")
    config = load(path, ["norm.momentum=0.95", "data.sizes=[20, 24]", "data.words=null", "model.features=64"])
    assert (config.norm.momentum, config.norm.epsilon, config.seed) == (0.95, 1e-3, 3)
    assert (config.data.sizes, config.data.words, config.model.features) == ((20, 24), None, 64)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("norm.momentun=0.9", ["norm.momentun", "did you mean norm.momentum?"]),
        ("modle.features=64", ["modle", "did you mean model?"]),
        ("momentum=0.9", ["unknown key momentum", "did you mean norm.momentum or optimizer.momentum?"]),
        ("train.xyzzy=1", ["unknown key train.xyzzy; known here: train.steps, "]),
        ("train.steps=many", ["train.steps='many'", "integer"]),
        ("train.steps=0", ["train.steps=0", "greater than or equal to 1"]),
        ("norm.kind=layer_norm", ["norm.kind='layer_norm'", "'batch_norm'"]),
        ("norm.momentum=.nan", ["norm.momentum=nan", "finite"]),
        ("seed", ["'seed'", "KEY=VALUE"]),
        ("seed=[1", ["seed=[1", "YAML"]),
        ("train=5", ["train=5"]),
        ("data.sizes=[60]", ["data", "sizes=[60]", "8 to 32"]),
        ("data.fonts=[]", ["fonts=[]", "labels"]),
        ("norm={kind: group_norm, groups: 7}", ["norm.groups=7", "divide"]),
    ],
)
def test_mistakes_are_named(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_value_is_no_section() -> None:
    with pytest.raises(ConfigError, match=r"seed\.value: seed is a value, not a section"):
        load(None, ["seed=1", "seed.value=2"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"train:\n  steps: [1\nnorm: {}\n", r"config\.yaml, line 3: is not YAML"),
        (b"- 1\n- 2\n", "holds a list"),
        (b"seed: \xff\n", "not UTF-8"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read \(No such file"):
        load(tmp_path / "absent.yaml")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.touch()
    assert load(path) == Config()


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]


def test_reading_needs_no_framework() -> None:
    code = (
        "import sys; from flatwater.recipes.ocr import config, corpus, data, labels, preprocess;"
        "print(sorted({'paddle', 'onnxruntime'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=yes", "train.steps: yes is no value"),
        ("data.words=2024-99-01", "the value is not YAML"),
        ("data.words=" + "[" * 3000, "the value is not YAML"),
    ],
    ids=["truth value", "date", "depth"],
)
def test_values_that_yaml_reads_as_something_else(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


def test_a_section_of_which_every_line_is_commented_out(tmp_path: Path) -> None:
    file = tmp_path / "ocr.yaml"
    file.write_text("seed: 3\ntrain:\n#  steps: 5\n", encoding="utf-8")
    assert load(file).train == Config().train
