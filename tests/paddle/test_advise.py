"""Advice on which norm to use: the rule, the walk that sees what each layer gets, and the policy that acts on it."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import nn

import flatwater.paddle as fw
from flatwater.advice import ENOUGH_SAMPLES, AdviceReport, choose_groups, choose_norm, steadier_momentum
from flatwater.errors import ConfigError, InputError, SurgeryError
from flatwater.policy import Policy

SPEC = [paddle.static.InputSpec([None, 3, 8, 8], "float32")]


class OwnForward(nn.BatchNorm2D):
    """A subclass whose forward nobody knows."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return super().forward(x) * 2


class Network(nn.Layer):
    """One norm for every case: what the batch decides, what it does not, what cannot change, what nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2D(3, 48, 3, padding=1), nn.BatchNorm2D(48))
        self.narrow = nn.Sequential(nn.Conv2D(48, 8, 3, padding=1), fw.BatchNorm2D(8, momentum=0.5))
        self.own = OwnForward(8)
        self.frozen = nn.BatchNorm2D(8, use_global_stats=True)
        self.group = nn.GroupNorm(2, 8)
        self.instance = nn.InstanceNorm2D(8)
        self.parts = nn.BatchNorm2D(8)
        self.pooled = nn.BatchNorm2D(8)
        self.layer = nn.LayerNorm([8])
        self.scalar = nn.BatchNorm1D(1)
        self.unreached = nn.BatchNorm2D(4)
        self.register_buffer("calls", paddle.zeros([1]))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        self.calls += 1
        x = x + paddle.randn(x.shape) * float(np.random.rand()) * random.random()  # noqa: NPY002
        y = self.instance(self.group(self.frozen(self.own(self.narrow(self.wide(x))))))
        crops = y.reshape([-1, 8, 8, 2, 4]).transpose([0, 2, 1, 3, 4]).flatten(0, 1)  # 8 of each sample, as a detector
        pooled = self.pooled(input=y.mean([2, 3], keepdim=True)).flatten(1)
        return self.scalar(self.layer(pooled).mean(1, keepdim=True)).sum() + self.parts(crops).sum()


def advice_of(report: AdviceReport) -> dict[str, tuple[Any, ...]]:
    return {one.path: (one.use, one.batch and one.batch.values, one.groups, one.momentum) for one in report.layers}


def test_each_layer_is_judged_by_what_it_gets() -> None:
    report = fw.advise(Network(), batch_size=2, world_size=1, input_spec=SPEC)
    assert advice_of(report) == {
        "wide.1": ("group_norm", 128, 16, 0.9869),
        "narrow.1": ("group_norm", 128, 4, 0.92),
        "own": ("batch_norm", 128, None, 0.9869),
        "frozen": (None, 128, None, None),
        "group": (None, 128, None, None),
        "instance": (None, 128, None, None),
        "parts": ("batch_norm", 128, None, None),  # 16 samples, made of 2
        "pooled": ("group_norm", 2, 1, 0.9869),
        "layer": (None, 2, None, None),
        "scalar": ("batch_norm", 2, None, 0.9869),
        "unreached": (None, None, None, None),
    }
    assert report.unreached == ["unreached"]
    assert (report.batch_size, report.world_size) == (2, 1)


@pytest.mark.parametrize(
    ("batch", "world", "wide", "pooled"),
    [
        (16, 1, "batch_norm", "batch_norm"),
        (15, 1, "group_norm", "group_norm"),
        (2, 4, "sync_batch_norm", "group_norm"),  # 8 values per channel on all devices
        (2, 8, "sync_batch_norm", "sync_batch_norm"),
    ],
)
def test_the_batch_and_the_devices_decide(batch: int, world: int, wide: str, pooled: str) -> None:
    inputs = paddle.zeros([batch, 3, 8, 8])
    found = {one.path: one.use for one in fw.advise(Network(), inputs=inputs, world_size=world).layers}
    assert (found["wide.1"], found["pooled"], found["frozen"]) == (wide, pooled, None)


def test_the_reasons_say_what_was_seen() -> None:
    report = fw.advise(Network(), batch_size=2, world_size=1, input_spec=SPEC)
    reasons = {one.path: one.reason for one in report.layers}
    assert "2 samples per device, fewer than 16, and one device; 16 groups of 3 channels, as 32" in reasons["wide.1"]
    assert "4 groups of 2 channels; more would hold one channel each" in reasons["narrow.1"]
    assert "OwnForward is a subclass, which may do more" in reasons["own"]
    assert "1 group of 8 channels; more would hold fewer than 16 values each" in reasons["pooled"]
    assert "nothing to average over" in reasons["scalar"]
    assert "do not reach it" in reasons["unreached"]
    assert "frozen" in reasons["frozen"]
    text = str(report)
    assert "11 norm layers, batch 2 on each of 1: 3 group_norm, 3 batch_norm" in text
    assert "share of the OLD statistics" in text
    assert json.loads(json.dumps(report.as_dict()))["layers"][0] == {
        "path": "wide.1",
        "layer": "BatchNorm2D",
        "channels": 48,
        "batch": {"samples": 2, "positions": 64},
        "use": "group_norm",
        "reason": reasons["wide.1"],
        "groups": 16,
        "momentum": 0.9869,
    }


class Twice(nn.Layer):
    """A norm that runs on all samples and then on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1D(4)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.norm(x).sum() + self.norm(x[:1]).sum() + self.norm(x).sum()


def test_the_smallest_batch_of_a_layer_decides() -> None:
    assert fw.advise(Twice(), inputs=paddle.zeros([32, 4])).layers[0].batch == (1, 1)


class OfADict(nn.Layer):
    """As PaddleDetection's models are called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2D(4)

    def forward(self, inputs: dict[str, paddle.Tensor]) -> paddle.Tensor:
        return self.norm(inputs["image"]) * inputs["scale"]


def test_a_model_may_take_one_dict() -> None:
    image, scale = np.zeros((2, 4, 3, 3), "float32"), paddle.ones([2, 1, 1, 1])
    inputs = {"image": image, "scale": scale}
    report = fw.advise(OfADict(), inputs=[inputs], world_size=1)
    assert (report.batch_size, report.layers[0].batch) == (2, (2, 9))
    model = OfADict()
    rules = [{"norm": "auto"}, {"zero_init_residual": False}]
    fw.apply_policy(model, rules, inputs=[inputs], world_size=1)
    assert type(model.norm) is fw.GroupNorm
    with pytest.raises(SurgeryError, match=r"for a model that takes one dict, give \[that dict\]"):
        fw.advise(OfADict(), inputs=inputs)
    with pytest.raises(InputError, match="an example input is a str"):
        fw.advise(OfADict(), inputs=[{"image": "x.png"}])
    with pytest.raises(InputError, match="the example inputs are empty"):
        fw.advise(OfADict(), inputs=[{}])


def test_nothing_is_different_afterwards() -> None:
    model = Network()
    model.train()
    model.narrow.eval()
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    modes = [layer.training for layer in model.sublayers()]
    classes = [type(layer) for layer in model.sublayers()]
    paddle.seed(3)  # Python's stream, too
    drawn = paddle.randn([2]).numpy()
    paddle.seed(3)
    streams = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    fw.advise(model, batch_size=3, input_spec=SPEC)
    assert np.array_equal(np.random.get_state()[1], streams[0])  # noqa: NPY002
    assert random.getstate() == streams[1]
    assert np.array_equal(paddle.randn([2]).numpy(), drawn)
    assert [layer.training for layer in model.sublayers()] == modes
    assert [type(layer) for layer in model.sublayers()] == classes
    assert all(np.array_equal(model.state_dict()[name].numpy(), value) for name, value in before.items())
    assert not any(layer._forward_pre_hooks for layer in model.sublayers())


def test_a_policy_acts_on_the_advice_and_auto_does_the_same() -> None:
    report = fw.advise(Network(), batch_size=2, world_size=4, input_spec=SPEC)
    advised, auto, from_yaml = Network(), Network(), Network()
    policy = report.policy()
    fw.apply_policy(advised, policy)
    rules = [{"match": [one.path for one in report.layers if one.use], "norm": "auto"}]
    fw.apply_policy(auto, rules, input_spec=SPEC, batch_size=2, world_size=4)
    text = """
    training: {batch_size: 2, world_size: 4, input_spec: [{shape: [null, 3, 8, 8]}]}
    rules:
    - match: [wide.*, narrow.*, own, parts, pooled, scalar]
      norm: auto
    """
    fw.apply_policy(from_yaml, Policy.parse(text))

    def found(model: Network) -> list[tuple[Any, ...]]:
        return [
            (path, type(layer), getattr(layer, "_num_groups", None), getattr(layer, "_momentum", None))
            for path, layer in model.named_sublayers()
        ]

    assert found(advised) == found(auto) == found(from_yaml)
    assert type(advised.wide[1]) is fw.SyncBatchNorm
    assert (type(advised.pooled), advised.pooled._num_groups) == (fw.GroupNorm, 1)
    assert (type(advised.own), advised.own._momentum) == (OwnForward, 0.9869)
    assert Policy.of(policy.model_dump(mode="json")) == policy


def test_a_rules_own_groups_and_momentum_come_before_the_advice() -> None:
    model = Network()
    rules = [{"match": ["wide.*", "own"], "norm": "auto"}, {"match": "wide.*", "groups": 3}]
    rules += [{"match": "own", "momentum": 0.7}]
    fw.apply_policy(model, rules, input_spec=SPEC, batch_size=2, world_size=1)
    assert (model.wide[1]._num_groups, model.own._momentum) == (3, 0.7)


def test_a_model_that_was_trained_with_batch_norm_can_keep_it() -> None:
    model = Network()
    report = fw.advise(model, batch_size=2, world_size=1, input_spec=SPEC)
    fw.apply_policy(model, report.policy(unshared="momentum"))
    assert type(model.wide[1]) is nn.BatchNorm2D
    assert (model.wide[1]._momentum, model.narrow[1]._momentum, model.parts._momentum) == (0.9869, 0.92, 0.9)


def test_paths_that_look_like_patterns_match_themselves() -> None:
    model = nn.Sequential()
    model.add_sublayer("a[0]*", nn.BatchNorm2D(4))
    model.add_sublayer("a0", nn.BatchNorm2D(4))
    report = fw.advise(model, batch_size=2, world_size=1, input_spec=[paddle.static.InputSpec([None, 4, 4, 4])])
    fw.apply_policy(model, report.policy())
    assert [type(layer) for layer in model.sublayers()] == [fw.GroupNorm, fw.GroupNorm]
    alone = nn.BatchNorm1D(64)
    fw.apply_policy(alone, fw.advise(alone, inputs=paddle.ones([2, 64]), world_size=1).policy())
    assert (type(alone), alone._num_groups) == (fw.GroupNorm, 4)


def test_what_cannot_be_asked() -> None:
    model = Network()
    with pytest.raises(InputError, match="leaves the size of the batch free; give batch_size="):
        fw.advise(model, input_spec=SPEC)
    with pytest.raises(InputError, match="batch_size=2 contradicts input_spec, whose batch is 4"):
        fw.advise(model, input_spec=[paddle.static.InputSpec([4, 3, 8, 8])], batch_size=2)
    assert fw.advise(model, input_spec=[paddle.static.InputSpec([4, 3, 8, 8])]).batch_size == 4
    with pytest.raises(InputError, match="batch_size=3 contradicts inputs of 2 samples"):
        fw.advise(model, inputs=paddle.zeros([2, 3, 8, 8]), batch_size=3)
    with pytest.raises(InputError, match="give one of input_spec= and inputs="):
        fw.advise(model, batch_size=2)
    with pytest.raises(InputError, match="batch_size=0 must be at least 1"):
        fw.advise(model, batch_size=0, input_spec=SPEC)
    with pytest.raises(InputError, match="world_size=0 must be at least 1"):
        fw.advise(model, batch_size=2, world_size=0, input_spec=SPEC)
    for wrong in ("2", 2.5, True):
        with pytest.raises(InputError, match=f"batch_size={wrong!r} must be at least 1, and a whole number"):
            fw.advise(model, batch_size=wrong, input_spec=SPEC)  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="does not run on inputs made from its input_spec"):
        fw.advise(model, batch_size=2, input_spec=[paddle.static.InputSpec([None, 5, 8, 8])])
    with pytest.raises(SurgeryError, match="does not run on the inputs"):
        fw.advise(model, inputs=paddle.zeros([2, 5, 8, 8]))
    with pytest.raises(InputError, match="Linear has no norm layer"):
        fw.advise(nn.Linear(2, 2), inputs=paddle.zeros([2, 2]))
    with pytest.raises(ConfigError, match="nothing for a policy to do"):
        fw.advise(nn.GroupNorm(2, 4), inputs=paddle.zeros([2, 4])).policy()
    with pytest.raises(InputError, match="unshared='gn'"):
        fw.advise(model, batch_size=2, input_spec=SPEC).policy(unshared="gn")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda: nn.InstanceNorm1D(4), lambda: nn.GroupNorm(4, 4), lambda: nn.LayerNorm([1])])
def test_norms_that_make_everything_constant_are_told(make: Any) -> None:
    layer = make()
    shape = [2, 4, 1]
    x = paddle.randn(shape)
    assert (layer(x).numpy() == 0).all()
    assert "gives β whatever it reads" in fw.advise(layer, inputs=x).layers[0].reason
    if not isinstance(layer, nn.LayerNorm):
        assert "whatever" not in fw.advise(layer, inputs=paddle.randn([2, 4, 3])).layers[0].reason


def test_one_value_per_channel_is_called_what_it_is() -> None:
    assert "cannot be normalized in training" in choose_norm(1, positions=1, channels=1).reason
    assert "cannot" not in choose_norm(2, positions=1, channels=1).reason


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2048), st.integers(1, 100))
def test_groups_divide_the_channels_and_hold_something(channels: int, positions: int) -> None:
    groups = choose_groups(channels, positions)
    if channels * positions == 1:
        assert groups is None
        return
    assert groups is not None
    assert 1 <= groups <= 32
    assert channels % groups == 0
    assert groups == 1 or (channels // groups >= 2 and channels // groups * positions >= 16)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, ENOUGH_SAMPLES), st.floats(0.1, 0.95))
def test_the_higher_momentum_makes_moving_means_of_few_samples_as_steady(samples: int, momentum: float) -> None:
    def variance(kept: float, batch: int) -> float:
        weights = (1 - kept) * kept ** np.arange(5000)
        return float((weights**2).sum() / batch)

    higher = steadier_momentum(momentum, samples)
    assert higher >= momentum - 5e-5  # rounded to four digits
    # Four digits of m' leave an error of up to 5e-5 in 1 - m', which is at least 1/16 of 1 - 0.95 here: 2%.
    np.testing.assert_allclose(variance(higher, samples), variance(momentum, ENOUGH_SAMPLES), rtol=0.02)


@pytest.mark.parametrize(("momentum", "samples"), [(1.1, 2), (-0.1, 2), (0.9, 0)])
def test_no_momentum_and_no_samples(momentum: float, samples: int) -> None:
    with pytest.raises(InputError, match="give a momentum of 0 to 1"):
        steadier_momentum(momentum, samples)
