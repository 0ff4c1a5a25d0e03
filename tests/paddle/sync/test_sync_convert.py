"""Conversion to SyncBatchNorm and back: the same objects, nothing lost; and what one process does with them alone."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

import flatwater.paddle as fw
from flatwater.errors import InputError, SurgeryError

KINDS = {
    "stock": (paddle.nn.BatchNorm, paddle.nn.BatchNorm1D, paddle.nn.BatchNorm2D, paddle.nn.BatchNorm3D),
    "ours": (fw.BatchNorm, fw.BatchNorm1D, fw.BatchNorm2D, fw.BatchNorm3D),
}


def make_model(home: str) -> paddle.nn.Layer:
    """Each kind, each with a setting that is not the default."""
    any_rank, one, two, three = KINDS[home]
    model = paddle.nn.LayerDict(
        {
            "any": any_rank(4, act="relu", momentum=0.7, use_global_stats=True, data_layout="NHWC"),
            "one": one(4, epsilon=1e-3, weight_attr=False),
            "two": two(4, data_format="NHWC", bias_attr=False),
            "three": three(4, momentum=0.5, use_global_stats=True),
            "group": paddle.nn.GroupNorm(2, 4),
        }
    )
    random = np.random.default_rng(0)
    for tensor in model.state_dict().values():
        tensor.set_value(random.uniform(0.5, 2.0, tensor.shape).astype("float32"))
    model["one"].bias.stop_gradient = True
    model["two"].eval()
    return model


def described(model: paddle.nn.Layer) -> dict[str, dict[str, Any]]:
    """All that a layer holds, parameters and hooks by identity; what the first call looks up is left out."""
    return {
        path: {
            key: value if isinstance(value, str | float | bool | None) else id(value)
            for key, value in vars(layer).items()
        }
        | {key: id(value) for key, value in layer._parameters.items()}
        | {"kind": type(layer), "name": layer.full_name()}
        | {key: parameter.stop_gradient for key, parameter in layer.named_parameters()}
        for path, layer in model.named_sublayers()
    }


@pytest.mark.parametrize("home", KINDS)
def test_revert_is_the_exact_inverse(home: str) -> None:
    model = make_model(home)
    calls: list[int] = []
    model["two"].register_forward_post_hook(lambda *_: calls.append(1))
    before, state = described(model), {key: value.numpy() for key, value in model.state_dict().items()}
    report = fw.convert_sync_batchnorm(model, process_group=[0, 1], timeout=5.0)
    assert report.changed == ["any", "one", "two", "three"]
    assert not report.left
    for path in report.changed:
        layer = model[path]
        assert type(layer) is fw.SyncBatchNorm
        assert layer.full_name() == before[path]["name"]
        assert layer.training == before[path]["training"]
        assert repr(layer).startswith("SyncBatchNorm(num_features=4")
    assert model["one"].bias.stop_gradient
    assert len(model["two"]._forward_post_hooks) == 1
    again = fw.convert_sync_batchnorm(model)
    assert set(again.left.values()) == {"is synchronised already"}
    assert fw.revert_sync_batchnorm(model).changed == report.changed
    assert described(model) == before
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[key])


@pytest.mark.parametrize("home", KINDS)
def test_alone_a_converted_model_computes_what_it_did(home: str) -> None:
    shapes = {"any": (3, 5, 5, 4), "one": (3, 4, 5), "two": (3, 5, 5, 4), "three": (3, 4, 2, 5, 5)}
    random = np.random.default_rng(1)
    inputs = {path: paddle.to_tensor(random.standard_normal(shape).astype("float32")) for path, shape in shapes.items()}
    model, other = make_model(home), make_model(home)
    fw.convert(other)  # the same kernels
    fw.convert_sync_batchnorm(model)
    for path, x in inputs.items():
        np.testing.assert_array_equal(model[path](x).numpy(), other[path](x).numpy())
        np.testing.assert_array_equal(model[path]._variance.numpy(), other[path]._variance.numpy())


def test_what_is_excluded_or_cannot_be_synchronised_stays_and_is_named() -> None:
    class Mine(fw.BatchNorm2D):
        pass

    head = paddle.nn.Sequential(fw.BatchNorm2D(3), fw.BatchNorm2D(3))
    model = paddle.nn.Sequential(
        head,
        Mine(3),
        paddle.nn.BatchNorm(3, trainable_statistics=True),
        paddle.nn.BatchNorm(3, act="tanh"),
        paddle.nn.SyncBatchNorm(3),
        fw.SyncBatchNorm(3),
    )
    report = fw.convert_sync_batchnorm(model, exclude=["0"])
    assert report.changed == ["4"]
    assert report.left["0.0"] == report.left["0.1"] == "is excluded"
    assert "forward of its own" in report.left["1"]
    assert "trainable_statistics" in report.left["2"]
    assert "act='tanh'" in report.left["3"]
    back = fw.revert_sync_batchnorm(model)
    assert back.changed == ["4"]
    assert type(model[4]) is paddle.nn.SyncBatchNorm
    assert back.left == {"5": "was built as a SyncBatchNorm"}
    only = fw.convert_sync_batchnorm(model, exclude=lambda path, layer: path != "0.1")
    assert only.changed == ["0.1"]
    with pytest.raises(SurgeryError, match=r"exclude names 'haed'"):
        fw.convert_sync_batchnorm(model, exclude=["haed"])
    with pytest.raises(InputError, match="timeout=0"):
        fw.convert_sync_batchnorm(head, timeout=0)
    assert type(head[0]) is fw.BatchNorm2D


def test_a_layer_with_a_group_can_be_copied_and_needs_none_in_eval_or_alone() -> None:
    layer = fw.SyncBatchNorm(3, process_group=[0, 1], timeout=2.0)
    twin = copy.deepcopy(layer)
    x = paddle.randn([2, 3, 4, 4])
    np.testing.assert_array_equal(twin(x).numpy(), layer(x).numpy())  # nothing was initialised: alone
    for one in (layer, twin):
        one.eval()
    np.testing.assert_array_equal(twin(x).numpy(), layer(x).numpy())
    assert isinstance(layer, paddle.nn.SyncBatchNorm)
    assert fw.average_statistics(layer).changed == []


def test_an_exported_model_holds_plain_batch_normalization(tmp_path: Path) -> None:
    model = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3), fw.SyncBatchNorm(4, act="relu"))
    model(paddle.randn([4, 3, 9, 9]))
    spec = [paddle.static.InputSpec([None, 3, 9, 9], "float32", "x")]
    fw.export(model, tmp_path / "model", spec, formats=("paddle",), fold=False)
    program = (tmp_path / "model.json").read_text(encoding="utf-8")
    assert {name for name in re.findall(r'"#":"([^"]+)"', program) if "norm" in name} == {"1.batch_norm_"}
    folded = fw.export(model, tmp_path / "folded", spec, formats=("paddle",)).fold
    assert folded is not None
    assert len(folded.folded) == 1
