"""Conversion to SyncBatchNorm and back: the same objects, nothing lost; and what one process does with them alone."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
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
def test_alone_a_converted_model_computes_what_it_did(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"any": (3, 5, 5, 4), "one": (3, 4, 5), "two": (3, 5, 5, 4), "three": (3, 4, 2, 5, 5)}
    random = np.random.default_rng(1)
    inputs = {path: paddle.to_tensor(random.standard_normal(shape).astype("float32")) for path, shape in shapes.items()}
    model, other = make_model(home), make_model(home)
    fw.convert(other)  # the same kernels
    fw.convert_sync_batchnorm(model)
    # And it costs what that costs: nobody is looked for.
    monkeypatch.setattr("flatwater.paddle.sync.layer.communicator_of", None)
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
    assert report.left["1"] == "Mine is a subclass, which may do more than the norm that it comes from"
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"timeout": 0}, "timeout=0 must be a positive number of seconds"),
        ({"timeout": "5"}, "timeout='5' must be"),
        ({"timeout": float("nan")}, "timeout=nan must be"),
        ({"timeout": True}, "timeout=True must be"),
        ({"process_group": 3}, "process_group=3 is no set of ranks; give different ranks"),
        ({"process_group": "01"}, "process_group='01' is no set of ranks"),
        ({"process_group": [0.5, 1]}, r"process_group=\[0.5, 1\] is no set of ranks"),
        ({"process_group": [0, 0, 1]}, r"process_group=\[0, 0, 1\] is no set of ranks"),
        ({"process_group": [-1, 0]}, r"process_group=\[-1, 0\] is no set of ranks"),
        ({"process_group": []}, r"process_group=\[\] is no set of ranks"),
    ],
)
def test_a_group_or_timeout_that_is_none_is_refused_before_anything_changes(
    arguments: dict[str, Any], said: str
) -> None:
    model = paddle.nn.Sequential(fw.BatchNorm2D(3), paddle.nn.BatchNorm2D(3))
    before = described(model)
    for model_or_none in (model, paddle.nn.Linear(2, 2)):  # also where there is nothing to convert
        with pytest.raises(InputError, match=said):
            fw.convert_sync_batchnorm(model_or_none, **arguments)
    assert described(model) == before
    with pytest.raises(InputError, match=said):
        fw.SyncBatchNorm(3, **arguments)
    with pytest.raises(InputError, match=said):
        fw.average_statistics(model, **arguments)


def test_what_has_a_forward_of_its_own_is_left() -> None:
    own = paddle.nn.BatchNorm2D(4)
    own.forward = lambda x: 0 * x
    report = fw.convert_sync_batchnorm(paddle.nn.Sequential(own))
    assert not report.changed
    assert "has a forward of its own" in report.left["0"]

    model = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3), paddle.nn.BatchNorm2D(4))
    paddle.jit.to_static(model[1], full_graph=True)
    model.eval()
    x = paddle.randn([2, 3, 8, 8])
    before = model(x).numpy()
    report = fw.convert_sync_batchnorm(model)
    assert not report.changed
    assert "captured by to_static" in report.left["1"]
    np.testing.assert_array_equal(model(x).numpy(), before)


def test_batch_statistics_in_eval_are_not_taken_away() -> None:
    model = paddle.nn.Sequential(paddle.nn.BatchNorm2D(3, use_global_stats=False))
    report = fw.convert_sync_batchnorm(model)
    assert not report.changed
    assert "use_global_stats=False normalizes by the batch in eval() too" in report.left["0"]
    assert "eval() takes the moving ones" in fw.convert(model).notes["0"]
    assert fw.convert_sync_batchnorm(model).changed == ["0"]  # to ours it means what None does


def test_a_frozen_or_patient_layer_says_so() -> None:
    layer = fw.SyncBatchNorm(
        4, use_global_stats=True, timeout=5, process_group=[1, 0], single_value="passthrough", act="relu"
    )
    assert repr(layer) == (
        "SyncBatchNorm(num_features=4, momentum=0.9, epsilon=1e-05, act=relu, use_global_stats=True, "
        "single_value=passthrough, ranks=[0, 1], timeout=5)"
    )


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
    fw.export(model, tmp_path / "model", spec, formats=("onnx",), fold=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in graph.node if "Norm" in node.op_type] == ["BatchNormalization"]
    folded = fw.export(model, tmp_path / "folded", spec).fold
    assert folded is not None
    assert len(folded.folded) == 1


def test_a_frozen_layer_does_not_become_one_that_cannot_be() -> None:
    model = paddle.nn.Sequential(paddle.nn.SyncBatchNorm(4), paddle.nn.BatchNorm2D(4))
    fw.convert_sync_batchnorm(model)
    fw.freeze(model)
    report = fw.revert_sync_batchnorm(model)
    assert report.changed == ["1"]
    assert "thaw it first" in report.left["0"]
    assert fw.frozen_report(model).ok
    fw.thaw(model)
    model[0]._use_global_stats = True  # by hand: nothing to thaw
    assert fw.revert_sync_batchnorm(model).changed == ["0"]
    assert type(model[0]) is paddle.nn.SyncBatchNorm
