"""The way back from surgery and policies, where much happened since: a cast, a capture, statistics that went bad."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import paddle
import pytest
from networks import evaluate, example, randomize, state_of, three_norms
from paddle import nn

import flatwater.paddle as fw
from flatwater.errors import SurgeryError
from flatwater.policy import Policy

# Paddle's BatchNorm2D says in every training step that it tracks statistics.
pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")


def test_reverting_passes_no_judgement_on_statistics_that_stay_frozen() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2D(4), nn.BatchNorm2D(4)))
    fw.freeze(model, affine=False)
    fw.convert(model, "frozen")
    model[0]._mean.set_value(paddle.full([4], float("nan")))
    assert fw.revert(model).changed == ["0", "1"]
    assert [layer.weight.stop_gradient for layer in model] == [False, False]
    assert all(layer._use_global_stats for layer in model)
    assert len(fw.frozen_report(model).released) == 0


def test_what_stays_frozen_on_the_way_back_is_compared_with_what_it_was_at_first() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2D(4)))
    fw.freeze(model, affine=False)
    fw.convert(model, "frozen")
    model[0]._mean.set_value(model[0]._mean + 1)
    model[0].bias.set_value(model[0].bias + 1)
    fw.revert(model)
    report = fw.frozen_report(model)
    assert list(report.moved) == ["0._mean"]
    assert report.held == ["0._variance"]
    fw.thaw(model)
    assert model[0]._use_global_stats is None
    with pytest.raises(SurgeryError, match="nothing in the Sequential was frozen"):
        fw.frozen_report(model)


def test_convert_freezes_again_what_was_thawed_in_part() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2D(4)))
    fw.freeze(model, bias=True, affine=False, statistics=False)
    for _ in range(2):
        fw.convert(model, "frozen")
        assert model[0].weight.stop_gradient
        fw.revert(model)
        assert (model[0].weight.stop_gradient, model[0].bias.stop_gradient) == (False, True)
        assert model[0]._use_global_stats is None


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("norm", ["group_norm", "frozen", "batch_norm"])
def test_undo_leaves_the_dtype_to_which_the_model_was_cast_since(dtype: str, norm: str) -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4)))
    before = state_of(model[1])
    applied = fw.apply_policy(model, Policy.model_validate({"rules": [{"match": "*", "norm": norm}]}))
    model.to(dtype=dtype)
    for parameter in model[1].parameters():
        parameter.set_value(paddle.full(parameter.shape, 3.0).astype(dtype))
    applied.undo()
    assert type(model[1]) is nn.BatchNorm2D
    for name, tensor in model[1].state_dict().items():
        assert tensor.dtype == getattr(paddle, dtype)
        expected = paddle.to_tensor(before[name]).astype(dtype).astype("float64")
        assert np.array_equal(tensor.astype("float64").numpy(), expected.numpy())


@pytest.mark.parametrize("earlier", [False, True], ids=["since", "before"])
def test_undo_leaves_a_norm_layer_as_to_static_has_it_now(earlier: bool) -> None:
    model = three_norms()
    path, norm = next((path, layer) for path, layer in model.named_sublayers() if isinstance(layer, nn.BatchNorm2D))
    if earlier:
        paddle.jit.to_static(norm, full_graph=True)
    applied = fw.apply_policy(model, Policy.model_validate({"rules": [{"match": path, "freeze": "statistics"}]}))
    if earlier:
        norm.forward.rollback()
    else:
        paddle.jit.to_static(norm, full_graph=True)
    now = vars(norm).get("forward")
    applied.undo()
    assert vars(norm).get("forward") is now
    assert norm._use_global_stats is None


@pytest.mark.parametrize("norm", ["group_norm", "instance_norm"])
@pytest.mark.parametrize("full_graph", [False, True])
def test_undo_drops_what_to_static_captured_of_another_kind_of_norm(full_graph: bool, norm: str) -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4)))
    x = example(2, 3, 5, 5)
    expected = evaluate(model, x)
    applied = fw.apply_policy(model, Policy.model_validate({"rules": [{"match": "*", "norm": norm}]}))
    paddle.jit.to_static(model[1], full_graph=full_graph)
    applied.undo()
    assert np.array_equal(evaluate(model, x), expected)


def test_undo_casts_only_what_was_cast() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2D(4)))
    # Statistics beside γ and β of another dtype, as mixed precision has them.
    model[0].weight = model[0].create_parameter([4], dtype="float64")
    model[0].bias = model[0].create_parameter([4], dtype="float64", is_bias=True)
    mean = model[0]._mean.numpy()
    fw.apply_policy(model, Policy.model_validate({"rules": [{"match": "*", "freeze": "both"}]})).undo()
    assert model[0].weight.dtype == paddle.float64
    assert model[0]._mean.dtype == paddle.float32
    assert np.array_equal(model[0]._mean.numpy(), mean)


def test_undo_casts_statistics_of_a_layer_that_has_nothing_else() -> None:
    model = nn.Sequential(nn.BatchNorm2D(4, weight_attr=False, bias_attr=False))
    applied = fw.apply_policy(model, Policy.model_validate({"rules": [{"match": "*", "norm": "group_norm"}]}))
    model.to(dtype="float64")
    applied.undo()
    assert model[0]._mean.dtype == model[0]._variance.dtype == paddle.float64


def test_the_way_back_forgets_what_convert_froze_even_where_nothing_of_it_was_left_to_thaw() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2D(4)))
    fw.freeze(model)
    model[0].weight.stop_gradient = False
    assert fw.convert(model, "frozen").changed == ["0"]
    fw.revert(model)
    fw.thaw(model)
    fw.convert(model, "frozen")
    fw.revert(model)
    assert [model[0].weight.stop_gradient, model[0]._use_global_stats] == [False, None]


class Pair(collections.namedtuple("Pair", ["image", "scale"])):
    """What a loader collates by name, made of something else than its fields."""

    def __new__(cls, pair: tuple[Any, Any]) -> Any:
        return super().__new__(cls, *pair)


class Named(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2D(3)

    def forward(self, pair: Any) -> paddle.Tensor:
        return self.norm(pair.image * float(pair.scale))


def test_a_batch_keeps_its_named_tuples_and_numbers() -> None:
    image = example(4, 3, 5, 5)
    model = Named()
    fw.recalibrate(model, [{"pair": Pair((image, np.float32(2)))}], progress=False)
    np.testing.assert_allclose(model.norm._mean.numpy(), 2 * image.mean(axis=(0, 2, 3)), rtol=1e-5)
