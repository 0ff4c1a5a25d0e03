"""Surgery and policies on models that are not fresh: converted, frozen in part, shared, changed in place, quantised."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from networks import evaluate, example, randomize, state_of, three_norms
from paddle import nn
from paddle.quantization import QAT, QuantConfig
from paddle.quantization.quanters import FakeQuanterWithAbsMaxObserver

import flatwater.paddle as fw
from flatwater.errors import ConfigError, InputError, SurgeryError
from flatwater.policy import Policy

# Paddle's BatchNorm2D says in every training step that it tracks statistics.
pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")


def test_a_stock_sync_batch_norm_becomes_a_batch_norm_by_whichever_road() -> None:
    for synchronised in (False, True):
        model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.SyncBatchNorm(4)))
        expected = evaluate_as_ours(model)
        if synchronised:
            fw.convert_sync_batchnorm(model)
        assert fw.convert(model, "batch_norm").changed == ["1"]
        assert type(model[1]) is fw.BatchNorm
        assert np.array_equal(evaluate(model, example(2, 3, 4, 4)), expected)
        model(example(2, 3, 4, 4)).sum().backward()  # Paddle's own has no kernel for that
        fw.revert(model)
        assert type(model[1]) is nn.SyncBatchNorm


def evaluate_as_ours(model: Any) -> np.ndarray:
    """In ``eval()``, by the layer that a stock SyncBatchNorm is converted to, which computes without a GPU."""
    fw.convert_sync_batchnorm(model)
    expected = evaluate(model, example(2, 3, 4, 4))
    fw.revert_sync_batchnorm(model)
    return expected


@pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", "swish", "silu"])
def test_a_stock_batch_norm_has_the_activation_that_ours_had(act: str) -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), fw.BatchNorm(4, act=act)))
    x = example(2, 3, 4, 4)
    expected = evaluate(model, x)
    assert fw.revert(model).changed == ["1"]
    assert type(model[1]) is nn.BatchNorm
    np.testing.assert_allclose(evaluate(model, x), expected, rtol=1e-5, atol=1e-6)  # float32, two kernels
    assert fw.convert(model).changed == ["1"]
    assert np.array_equal(evaluate(model, x), expected)


def test_an_activation_that_paddle_fails_on_stays() -> None:
    model = nn.Sequential(fw.BatchNorm(4, act="leaky_relu"))
    assert "paddle.nn.BatchNorm fails on that" in fw.revert(model).left["0"]
    assert type(model[0]) is fw.BatchNorm


def test_a_setting_that_means_something_else_to_paddle_is_said() -> None:
    model = randomize(nn.Sequential(fw.BatchNorm2D(3, use_global_stats=False), fw.BatchNorm2D(3)))
    x = example(2, 3, 4, 4)
    expected = evaluate(model, x)
    report = fw.revert(model)
    assert list(report.notes) == ["0"]
    assert "layer._use_global_stats = None" in report.notes["0"]
    model[0]._use_global_stats = None  # as the note has it
    np.testing.assert_allclose(evaluate(model, x), expected, rtol=1e-5, atol=1e-6)  # float32, two kernels


def test_what_was_frozen_before_converting_to_frozen_still_is_afterwards() -> None:
    model = randomize(nn.Sequential(fw.BatchNorm2D(3), fw.BatchNorm2D(3)))
    fw.freeze(model, statistics=False, pattern="0")
    fw.convert(model, "frozen")
    fw.convert(model, "frozen")  # again: nothing to do, and nothing to remember
    fw.revert(model)
    assert model[0].weight.stop_gradient
    assert model[0].bias.stop_gradient
    assert model[0]._use_global_stats is None
    assert not model[1].weight.stop_gradient
    report = fw.frozen_report(model)
    assert report.ok
    assert report.held == ["0.weight", "0.bias"]


def test_what_was_frozen_after_thawing_is_not_converts_to_thaw() -> None:
    model = randomize(nn.Sequential(fw.BatchNorm2D(3)))
    fw.convert(model, "frozen")
    fw.thaw(model)
    fw.freeze(model)
    assert fw.revert(model).changed == ["0"]
    assert type(model[0]) is nn.BatchNorm2D
    assert fw.frozen_report(model).ok
    assert model[0].weight.stop_gradient


def test_thawing_on_the_way_back_leaves_a_parameter_that_another_frozen_layer_has() -> None:
    model = nn.Sequential(fw.BatchNorm2D(3), fw.BatchNorm2D(3))
    model[1].weight = model[0].weight
    fw.freeze(model, pattern="1")
    fw.convert(model, "frozen", pattern="0")
    fw.revert(model, pattern="0")
    assert model[0].weight.stop_gradient
    assert not model[0].bias.stop_gradient


class OwnForward(nn.BatchNorm2D):
    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return nn.functional.batch_norm(x, self._mean, self._variance, self.weight, self.bias, training=self.training)


class Inherited(nn.BatchNorm2D):
    pass


def test_a_layer_that_need_not_hold_still_is_named() -> None:
    model = nn.Sequential(OwnForward(3), Inherited(3), fw.BatchNorm2D(3), nn.BatchNorm(3))
    report = fw.freeze(model)
    assert list(report.notes) == ["0"]
    assert "frozen_report()" in str(report)
    assert not fw.freeze(model).notes
    model(example(2, 3, 4, 4) + 1)
    assert set(fw.frozen_report(model).moved) == {"0._mean", "0._variance"}


def test_a_cast_is_no_movement() -> None:
    model = randomize(nn.Sequential(fw.BatchNorm2D(3)))
    fw.freeze(model)
    model.to(dtype="bfloat16")
    assert fw.frozen_report(model).ok
    model = randomize(nn.Sequential(fw.BatchNorm2D(3)))
    fw.freeze(model)
    model.to(dtype="float64")
    assert fw.frozen_report(model).ok
    model[0]._mean.set_value(model[0]._mean + 1e-12)
    assert list(fw.frozen_report(model).moved) == ["0._mean"]


def test_what_was_kept_aside_is_the_same_parameter_after_an_error() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2D(4)))
    mean, before = model[0]._mean, state_of(model)
    fw.convert(model, "group_norm")
    with pytest.raises(ConfigError, match="no effect"):
        fw.apply_policy(model, [{"norm": "instance_norm"}, {"groups": 2}])
    fw.apply_policy(model, [{"norm": "instance_norm"}]).undo()
    assert type(model[0]) is fw.GroupNorm
    fw.revert(model)
    assert model[0]._mean is mean
    assert all(np.array_equal(state_of(model)[name], value) for name, value in before.items())


@pytest.mark.parametrize("training", [True, False])
def test_undo_leaves_modes_and_gradients_to_the_training_that_goes_on(training: bool) -> None:
    model = three_norms()
    x = example(4, 3, 4, 4)
    optimizer = paddle.optimizer.SGD(0.1, parameters=model.stem[1].parameters())
    model(x).sum().backward()
    before = state_of(model)
    (model.train if training else model.eval)()
    applied = fw.apply_policy(model, [{"momentum": 0.5, "kind": "batch_norm", "gamma": 2.0}])
    optimizer.step()
    optimizer.clear_grad(set_to_zero=False)
    (model.eval if training else model.train)()
    applied.undo()
    assert all(layer.training is not training for layer in model.sublayers())
    assert model.stem[1].weight.grad is None
    after = state_of(model)
    norms = [name for name in before if name.startswith(("stem.1", "body.1", "head.1"))]
    assert norms
    assert all(np.array_equal(after[name], before[name]) for name in norms)


class InPlace(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2D(3), nn.BatchNorm2D(3)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.second(self.first(x.subtract_(paddle.to_tensor(1.0)))) + x


@pytest.mark.parametrize("in_order", [False, True])
def test_a_model_that_works_in_place_changes_nobodys_data(in_order: bool) -> None:
    model, x = InPlace(), example(4, 3, 5, 5)
    before = x.numpy().copy()
    fw.recalibrate(model, [x], in_order=in_order)
    assert np.array_equal(x.numpy(), before)
    # float32 behind the subtraction, then float64
    np.testing.assert_allclose(model.first._mean.numpy(), before.mean((0, 2, 3)) - 1, rtol=1e-5)
    fw.advise(model, inputs=x)
    fw.apply_policy(model, [{"match": "second", "zero_init_residual": True}], inputs=x)
    assert np.array_equal(x.numpy(), before)
    assert np.array_equal(model.second.weight.numpy(), np.zeros(3))


class Counting(InPlace):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", paddle.zeros([1]))

    def forward(self, x: paddle.Tensor, scale: float = 1.0) -> paddle.Tensor:
        self.calls += np.random.rand() + 1  # noqa: NPY002
        return self.second(self.first(x * scale)) + x


def test_looking_for_residual_blocks_leaves_no_trace_and_needs_no_gradients() -> None:
    model = Counting()
    stream = np.random.get_state()[1].copy(), np.random.get_state()[2]  # noqa: NPY002
    with paddle.no_grad():
        fw.apply_policy(model, [{"zero_init_residual": True}], inputs=[example(2, 3, 4, 4), 1.0])
    assert np.array_equal(model.second.weight.numpy(), np.zeros(3))
    assert model.calls.item() == 0
    assert np.array_equal(np.random.get_state()[1], stream[0])  # noqa: NPY002
    assert np.random.get_state()[2] == stream[1]  # noqa: NPY002


class Pairs(paddle.io.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(2, index, np.float32), np.ones(1, np.float32)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # which fit() does itself
def test_a_callback_counts_steps_and_epochs_over_all_of_the_training() -> None:
    network = nn.Sequential(fw.BatchNorm1D(2), nn.Linear(2, 1))
    rules = [
        {"momentum_schedule": {"at": {0: 0.5, 10: 0.9}, "by": "epoch"}, "freeze": {"what": "both", "from_epoch": 11}}
    ]
    applied = fw.apply_policy(network, rules)
    model = paddle.Model(network)
    model.prepare(paddle.optimizer.SGD(0.1, parameters=network.parameters()), nn.MSELoss())
    callback = applied.callback(step=10, epoch=5)
    seen = []
    for _ in range(2):
        model.fit(Pairs(), batch_size=2, epochs=3, verbose=0, callbacks=[callback])
        seen.append(network[0]._momentum)
    np.testing.assert_allclose(seen, [0.5 + 0.4 * 7 / 10, 0.9], rtol=1e-12)
    assert not network[0].weight.stop_gradient
    applied.callback().on_epoch_begin(10)
    assert not network[0].weight.stop_gradient
    model.fit(Pairs(), batch_size=2, epochs=1, verbose=0, callbacks=[callback])
    assert network[0].weight.stop_gradient


def test_freeze_in_a_policy_is_a_state() -> None:
    model = randomize(nn.Sequential(fw.BatchNorm2D(4), fw.BatchNorm2D(4)))
    fw.apply_policy(model, [{"freeze": "both"}])
    applied = fw.apply_policy(model, [{"match": "0", "freeze": "statistics"}, {"match": "1", "freeze": "affine"}])
    assert str(applied).count("the rest is thawed") == 2
    assert set(fw.frozen_report(model).held) == {"0._mean", "0._variance", "1.weight", "1.bias"}
    assert not model[0].weight.stop_gradient
    assert model[0]._use_global_stats
    assert model[1]._use_global_stats is None
    fw.apply_policy(model, [{"norm": "group_norm", "freeze": "none"}])
    assert [type(layer) for layer in model] == [fw.GroupNorm, fw.GroupNorm]
    fw.apply_policy(model, [{"freeze": "none"}, {"norm": "frozen"}])
    assert fw.frozen_report(model).ok


def test_what_a_policy_freezes_later_is_added_to_what_is_frozen_then() -> None:
    model = randomize(nn.Sequential(fw.BatchNorm2D(4)))
    applied = fw.apply_policy(model, [{"freeze": {"what": "statistics", "from_step": 1}}])
    fw.freeze(model, statistics=False)
    applied.on_step(1)
    assert set(fw.frozen_report(model).held) == {"0.weight", "0.bias", "0._mean", "0._variance"}


def test_what_a_policy_says_and_the_layer_is_already_is_no_change() -> None:
    applied = fw.apply_policy(nn.Sequential(nn.BatchNorm2D(4)), [{"norm": "batch_norm"}])
    assert "1 norm layers, 0 changed" in str(applied)


@pytest.mark.parametrize("place", ["inside", "gone"])
def test_what_is_frozen_later_is_found_where_quantisation_put_it(place: str) -> None:
    model: Any = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), fw.BatchNorm2D(4)))
    norm = model[1]
    applied = fw.apply_policy(model, [{"freeze": {"what": "both", "from_step": 1}}])
    if place == "gone":
        model[1] = nn.ReLU()
        with pytest.raises(SurgeryError, match="at '1' is no longer in the Sequential"):
            applied.on_step(1)
        return
    quanter = FakeQuanterWithAbsMaxObserver(moving_rate=0.9)
    model = QAT(QuantConfig(activation=quanter, weight=quanter)).quantize(model, inplace=True)
    assert model[1] is not norm
    applied.on_step(1)
    model(example(2, 3, 4, 4))
    assert fw.frozen_report(model).ok
    assert norm.weight.stop_gradient


class Shared(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2D(3)
        self.a, self.b = nn.Sequential(norm), nn.Sequential(norm, nn.BatchNorm2D(3))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.b(self.a(x))


def test_a_shared_layer_answers_to_all_of_its_paths() -> None:
    model = Shared()
    assert fw.freeze(model, pattern="b.0").changed == ["a.0"]
    assert fw.thaw(model, pattern=["a.*", "b.1"]).changed == ["a.0"]
    assert set(fw.convert(model, pattern="b.*").changed) == {"a.0", "b.1"}
    fw.apply_policy(model, [{"match": "a.*", "momentum": 0.2}, {"match": "b.*", "momentum": 0.3}])
    assert [model.b[0]._momentum, model.b[1]._momentum] == [0.3, 0.3]
    fw.apply_policy(model, [{"match": "b.*", "momentum": 0.4}, {"match": "a.*", "momentum": 0.1}])
    assert [model.b[0]._momentum, model.b[1]._momentum] == [0.1, 0.4]
    assert [change.path for change in fw.recalibrate(model, [example(4, 3, 5, 5)], pattern="b.0").layers] == ["a.0"]


def test_several_patterns_each_have_to_match() -> None:
    model = nn.Sequential(nn.BatchNorm2D(3), nn.BatchNorm2D(3), nn.BatchNorm2D(3))
    x = example(4, 3, 5, 5)
    assert fw.freeze(model, pattern=["0", "2"]).changed == ["0", "2"]
    assert fw.convert(model, pattern=("1", "2")).changed == ["1", "2"]
    assert fw.revert(model, pattern=["[12]"]).changed == ["1", "2"]
    assert [change.path for change in fw.recalibrate(model, [x], pattern=["0", "1"]).layers] == ["1"]
    for call in (fw.freeze, fw.thaw, fw.convert, fw.revert, lambda m, **kw: fw.recalibrate(m, [x], **kw)):
        with pytest.raises(SurgeryError, match="'head' \\(of 3\\)"):
            call(model, pattern=["0", "head"])
        with pytest.raises(SurgeryError, match="None for all of them"):
            call(model, pattern=[])


def test_what_is_wrong_is_said() -> None:
    model, x = nn.Sequential(nn.BatchNorm2D(3)), example(4, 3, 5, 5)
    for batch, named in (({"x": x, "name": ["a"]}, "str"), ([x, "label"], "str")):
        with pytest.raises(InputError, match=rf"a batch of the loader is no input.* {named}.*forward=lambda"):
            fw.recalibrate(model, [batch])
    with pytest.raises(SurgeryError, match="forward=lambda"):  # the layer takes one argument
        fw.recalibrate(model, [(x, 3)])
    assert fw.recalibrate(model, [x, x, x], batches=np.int64(2)).batches == 2
    for wrong in (0, 1.5, True):
        with pytest.raises(InputError, match="must be a positive number"):
            fw.recalibrate(model, [x], batches=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Linear has no norm layers"):
        fw.apply_policy(nn.Linear(2, 2), [{"norm": "group_norm"}])


def test_a_batch_may_be_what_a_model_takes() -> None:
    class Takes(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2D(3)

        def forward(self, batch: dict[str, Any]) -> paddle.Tensor:
            return self.norm(batch["image"] * batch["scale"])

    model, x = Takes(), example(4, 3, 5, 5)
    fw.recalibrate(model, [[{"image": x, "scale": 2.0}]])
    # float32, then float64
    np.testing.assert_allclose(model.norm._mean.numpy(), 2 * x.numpy().mean((0, 2, 3)), rtol=1e-5)


def test_a_policys_inputs_are_made_only_for_rules_that_look_at_them() -> None:
    document = {"training": {"input_spec": [{"shape": [None, 3, 8, 8]}]}, "rules": [{"freeze": "both"}]}
    assert fw.apply_policy(nn.Sequential(nn.BatchNorm2D(3)), Policy.of(document)).entries
    document["rules"] = [{"zero_init_residual": False, "momentum": 0.5}]
    assert fw.apply_policy(nn.Sequential(nn.BatchNorm2D(3)), Policy.of(document)).entries
    document["rules"] = [{"norm": "auto"}]
    with pytest.raises(InputError, match=r"the policy's training section: .*batch_size="):
        fw.apply_policy(nn.Sequential(nn.BatchNorm2D(3)), Policy.of(document))


def test_schedules_that_differ_in_the_last_digits_are_two() -> None:
    model = nn.Sequential(fw.BatchNorm2D(3), fw.BatchNorm2D(3))
    momenta = (0.99999991, 0.99999992)
    rules = [
        {"match": str(index), "momentum_schedule": {"at": {0: momentum}}} for index, momentum in enumerate(momenta)
    ]
    fw.apply_policy(model, rules)
    assert tuple(layer._momentum for layer in model) == momenta
