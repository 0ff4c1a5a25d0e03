"""Policies applied: every field does what it says, as training steps show, and an error changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from networks import example, state_of, three_norms
from paddle import nn
from paddle.amp.auto_cast import amp_initialize

import flatwater.paddle as fw
from flatwater.errors import BackendError, ConfigError, FlatwaterError, StatisticsError, SurgeryError
from flatwater.paddle.policy import applied as applied_module
from flatwater.policy import Policy


def network() -> Any:
    return three_norms(nn.LayerNorm([4, 4]))


def train_step(model: nn.Layer, optimizer: Any) -> None:
    """One step in which γ and β of every norm get gradients."""
    model.train()
    y = model(example(4, 3, 4, 4))
    (y * example(*y.shape)).sum().backward()
    optimizer.step()
    optimizer.clear_grad()


def test_every_field_is_set_and_said() -> None:
    model = network()
    policy = Policy.parse(
        """
        - momentum: 0.8
          match: [stem.*, body.*]
          epsilon: 0.001
        - match: body.*
          norm: gn
          groups: 4
          gamma: 0.5
          beta: 0.25
        - kind: group_norm
          groups: 8
        """,
        "norms.yaml",
    )
    weight = model.body[1].weight

    report = fw.apply_policy(model, policy)

    assert (model.stem[1]._momentum, model.stem[1]._epsilon) == (0.8, 0.001)
    assert type(model.body[1]) is fw.GroupNorm
    assert (model.body[1]._num_groups, model.body[1]._epsilon, model.body[1]._act) == (4, 0.001, "relu")
    assert model.body[1].weight is weight
    assert (weight.numpy() == 0.5).all()
    assert (model.body[1].bias.numpy() == 0.25).all()
    assert model.head[1]._num_groups == 8
    text = str(report)
    assert "policy: 4 norm layers, 3 changed" in text
    assert "body.1  BatchNorm2D -> GroupNorm  norm group_norm (norms.yaml, line 6)" in text
    assert "note: GroupNorm has no place for moving statistics; they are kept aside" in text
    assert "momentum 0.9 -> 0.8 (norms.yaml, line 2)" in text
    assert "note: a GroupNorm keeps no statistics, so no momentum" in text
    assert [norm["path"] for norm in report.as_dict()["norms"]] == ["stem.1", "body.1", "head.1", "head.2"]
    assert model(example(2, 3, 4, 4)).shape == [2, 8, 4, 4]


class BrokenError(Exception):
    """Not one that Flatwater raises."""


def explode(*_: Any, **__: Any) -> None:
    raise BrokenError


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ("- gamma: 3\n- match: head.*\n  norm: gn", ConfigError, "line 3: norm=group_norm for 'head.2': .*features"),
        ("- beta: 3\n- match: body.*\n  norm: gn\n  groups: 3", ConfigError, "line 3: .*3 does not divide its 8 chan"),
        ("- beta: 3\n- match: head.1\n  norm: frozen", ConfigError, "line 3: .*no moving statistics to freeze"),
        ("- match: head.*\n  momentum: 0.1", ConfigError, "line 2: momentum has no effect on any layer"),
        ("- gamma: 2\n- match: stem.*\n  groups: 4", ConfigError, "line 3: groups has no effect .*has no groups"),
        ("- match: head.*\n  freeze: statistics", ConfigError, "line 2: .*nothing to freeze of statistics"),
        ("- match: nowhere\n  beta: 1", ConfigError, "line 1: match='nowhere' matches none"),
        ("- beta: 3\n- match: stem.*\n  norm: auto", ConfigError, "line 3: norm=auto needs to know the batch"),
        ("- beta: 3\n  zero_init_residual: true", ConfigError, "line 2: .*give inputs="),
        ("- momentum: 0.3\n  match: [stem.*]\n- kind: '*Norm2D'\n  norm: frozen", StatisticsError, "'body.1'"),
        ("- norm: sync_bn\n  kind: batch_norm\n  gamma: 3\n- keep_float32: true\n  weight_decay: 0", BrokenError, None),
    ],
)
def test_on_any_error_nothing_has_changed(
    rules: str, error: type[Exception], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    if error is StatisticsError:
        model.body[1]._variance.set_value(np.full(8, -1, "float32"))
    if error is BrokenError:
        monkeypatch.setattr("flatwater.paddle.policy.rules._Work.freeze", explode)
    model(example(4, 3, 4, 4)).sum().backward()
    model.stem.eval()
    layers = model.sublayers()
    parameters = [parameter for layer in layers for parameter in layer._parameters.values()]
    classes, attributes = [type(layer) for layer in layers], [dict(vars(layer)) for layer in layers]
    settings = [(one.stop_gradient, one.regularizer, dict(one.optimize_attr)) for one in parameters]
    gradients = [one.grad.numpy() for one in parameters if one.grad is not None]
    before = state_of(model)

    with pytest.raises(error, match=message):
        fw.apply_policy(model, Policy.parse(rules, "norms.yaml"))

    after = state_of(model)
    assert list(after) == list(before)
    assert all(after[name].tobytes() == value.tobytes() for name, value in before.items())
    assert [type(layer) for layer in layers] == classes
    assert [vars(layer) for layer in layers] == attributes
    found = [parameter for layer in layers for parameter in layer._parameters.values()]
    assert all(one is other for one, other in zip(found, parameters, strict=True))
    assert [(one.stop_gradient, one.regularizer, one.optimize_attr) for one in parameters] == settings
    kept = [one.grad.numpy() for one in parameters if one.grad is not None]
    assert all(np.array_equal(one, other) for one, other in zip(kept, gradients, strict=True))


def test_undo_brings_back_every_bit() -> None:
    model = network()
    before, classes = state_of(model), [type(layer) for layer in model.sublayers()]
    applied = fw.apply_policy(
        model,
        [
            {"kind": "batch_norm", "norm": "instance_norm", "gamma": 7, "weight_decay": 0},
            {"match": "head.1", "freeze": "affine"},
        ],
    )
    assert type(model.stem[1]) is fw.InstanceNorm2D
    applied.undo()
    after = state_of(model)
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    assert [type(layer) for layer in model.sublayers()] == classes
    assert model.stem[1].weight.regularizer is None
    assert not model.head[1].weight.stop_gradient
    with pytest.raises(SurgeryError, match="undone already"):
        applied.undo()


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": paddle.optimizer.SGD,
    "Momentum": paddle.optimizer.Momentum,
    "Momentum, all at once": lambda *args, **kwargs: paddle.optimizer.Momentum(*args, use_multi_tensor=True, **kwargs),
    "Adam": paddle.optimizer.Adam,
    "RMSProp": paddle.optimizer.RMSProp,
    "AdamW": paddle.optimizer.AdamW,
    "Lamb": lambda rate, weight_decay, parameters: paddle.optimizer.Lamb(
        rate, lamb_weight_decay=weight_decay, parameters=parameters
    ),
}
DECOUPLED = {"AdamW", "Lamb"}


def step_without_gradient(kind: str, *, decay: float | None, grouped: bool, prepare: bool) -> tuple[Any, Any]:
    """γ of two norms after a step in which no gradient but zero reached them; the policy is for the first of them."""
    model = nn.Sequential(fw.BatchNorm2D(4), fw.BatchNorm2D(4))
    rules = [{"match": "0", "weight_decay": decay}] if decay is not None else [{"match": "0", "epsilon": 1e-4}]
    applied = fw.apply_policy(model, rules)
    parameters = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    groups: Any = [{"params": parameters, "weight_decay": 0.5}] if grouped else parameters
    optimizer = OPTIMIZERS[kind](0.1, weight_decay=0.5, parameters=groups)
    if prepare:
        applied.prepare(optimizer)
        applied.prepare(optimizer)
    (model(example(3, 4, 2, 2)) * 0.0).sum().backward()
    optimizer.step()
    return model[0].weight.numpy(), model[1].weight.numpy()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_passes_by_where_the_policy_says_none(kind: str) -> None:
    spared, decayed = step_without_gradient(kind, decay=0.0, grouped=False, prepare=kind in DECOUPLED)
    assert (spared == 1).all()
    assert (decayed < 1).all()


@pytest.mark.parametrize("kind", ["Momentum", "Adam", "AdamW"])
def test_parameter_groups_are_told_too(kind: str) -> None:
    spared, decayed = step_without_gradient(kind, decay=0.0, grouped=True, prepare=True)
    assert (spared == 1).all()
    assert (decayed < 1).all()


def test_a_decay_of_its_own() -> None:
    own, others = step_without_gradient("SGD", decay=0.25, grouped=False, prepare=True)
    # float32: 1 - rate · coefficient
    np.testing.assert_allclose(own, 1 - 0.1 * 0.25, rtol=1e-6)
    np.testing.assert_allclose(others, 1 - 0.1 * 0.5, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"weight_decay=0\.25 .* cannot reach AdamW"):
        step_without_gradient("AdamW", decay=0.25, grouped=False, prepare=True)


def test_the_function_for_adamw_can_be_given_and_others_are_kept() -> None:
    model = network()
    applied = fw.apply_policy(model, [{"match": "stem.*", "norm_decay": False}])
    conv, norm, other = model.stem[0].weight, model.stem[1].weight, model.body[1].weight
    assert applied.decays(conv.name)
    assert not applied.decays(norm.name)
    assert not applied.decays(norm)
    optimizer = paddle.optimizer.AdamW(
        0.1, parameters=[conv, norm, other], apply_decay_param_fun=lambda name: name != other.name
    )
    applied.prepare(optimizer)
    assert [optimizer._apply_decay_param_fun(one.name) for one in (conv, norm, other)] == [True, False, False]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_learning_rate_has_a_factor(kind: str) -> None:
    moved = []
    for factor in (1.0, 0.25, 0.0):
        model = nn.Sequential(fw.BatchNorm2D(4))
        applied = fw.apply_policy(model, [{"learning_rate_factor": factor}])
        optimizer = OPTIMIZERS[kind](0.1, weight_decay=0.0, parameters=model.parameters())
        applied.prepare(optimizer)
        (model(example(3, 4, 2, 2)) * example(3, 4, 2, 2)).sum().backward()
        optimizer.step()
        moved.append(model[0].weight.numpy() - 1)
    np.testing.assert_allclose(moved[1], moved[0] * 0.25, rtol=1e-4)  # float32 differences from 1
    assert (moved[2] == 0).all()


def test_freezing_now() -> None:
    model = network()
    fw.apply_policy(
        model, [{"match": "stem.*", "norm_type": "bn", "freeze_norm": True}, {"match": "head.1", "freeze": "both"}]
    )
    before = state_of(model)
    train_step(model, paddle.optimizer.SGD(0.1, parameters=model.parameters()))
    after = state_of(model)
    moved = {name for name, value in before.items() if not np.array_equal(after[name], value)}
    assert not any(name.startswith(("stem.1", "head.1")) for name in moved)
    assert {"body.1.weight", "body.1._mean", "stem.0.weight", "head.2.bias"} <= moved
    assert fw.frozen_report(model).ok
    report = str(fw.apply_policy(model, [{"match": "stem.*", "freeze": "none"}]))
    assert "thawed (rule 1)" in report
    assert not model.stem[1].weight.stop_gradient


def test_frozen_as_a_kind_takes_a_group_norm_back() -> None:
    model = network()
    mean = model.stem[1]._mean.numpy().copy()
    fw.convert(model, "group_norm", pattern="stem.*")
    fw.apply_policy(model, [{"match": "stem.*", "norm": "frozen"}])
    assert type(model.stem[1]) is fw.BatchNorm2D
    assert np.array_equal(model.stem[1]._mean.numpy(), mean)
    assert fw.frozen_report(model).held == ["stem.1.weight", "stem.1.bias", "stem.1._mean", "stem.1._variance"]


def test_freezing_from_a_step_or_an_epoch_on() -> None:
    model = network()
    applied = fw.apply_policy(
        model,
        [
            {"match": "stem.*", "freeze": {"what": "statistics", "from_step": 2}},
            {"match": "body.*", "freeze": {"what": "both", "from_epoch": 1}},
        ],
    )
    optimizer = paddle.optimizer.SGD(0.01, parameters=model.parameters())
    moved = []
    for step in range(4):
        if step % 2 == 0:
            applied.on_epoch(step // 2)
        applied.on_step(step)
        before = state_of(model)
        train_step(model, optimizer)
        after = state_of(model)
        moved.append({name for name, value in before.items() if not np.array_equal(after[name], value)})
    assert [("stem.1._mean" in names) for names in moved] == [True, True, False, False]
    assert [("stem.1.weight" in names) for names in moved] == [True] * 4
    assert [("body.1.weight" in names) for names in moved] == [True, True, False, False]
    assert "freeze both from epoch 1 (rule 2)" in str(applied)


def test_a_resumed_run_freezes_at_once() -> None:
    model = network()
    applied = fw.apply_policy(model, [{"match": "stem.*", "freeze": {"what": "both", "from_step": 100}}])
    applied.on_step(250)
    assert model.stem[1].weight.stop_gradient
    applied.on_step(251)
    assert fw.frozen_report(model).ok


def test_statistics_that_cannot_be_frozen_later_freeze_nothing() -> None:
    model = network()
    applied = fw.apply_policy(model, [{"kind": "batch_norm", "freeze": {"what": "both", "from_step": 1}}])
    model.body[1]._mean.set_value(np.full(8, np.nan, "float32"))
    with pytest.raises(StatisticsError):
        applied.on_step(1)
    assert not model.stem[1].weight.stop_gradient


# Paddle's own Model copies labels so.
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_the_callback_of_paddles_model() -> None:
    net = nn.Sequential(nn.Linear(4, 8), fw.BatchNorm1D(8), nn.Linear(8, 2))
    applied = fw.apply_policy(net, [{"freeze": {"what": "statistics", "from_step": 5}}])
    model = paddle.Model(net)
    model.prepare(paddle.optimizer.SGD(0.1, parameters=net.parameters()), nn.CrossEntropyLoss())
    generator = np.random.default_rng(0)
    x, labels = generator.normal(size=(12, 4)).astype("float32"), generator.integers(0, 2, (12, 1))
    data = paddle.io.TensorDataset([paddle.to_tensor(x), paddle.to_tensor(labels)])
    seen = []

    class Watch(paddle.callbacks.Callback):
        def on_train_batch_end(self, step: int, logs: Any = None) -> None:
            seen.append(net[1]._mean.numpy().copy())

    model.fit(data, batch_size=3, epochs=2, verbose=0, callbacks=[applied.callback(), Watch()])
    assert len(seen) == 8
    moved = [not np.array_equal(one, other) for one, other in pairwise(seen)]
    assert moved == [True, True, True, True, False, False, False]


def test_what_stays_float32_is_marked_for_mixed_precision() -> None:
    model = network()
    fw.apply_policy(model, [{"match": "head.1", "keep_float32": True}])
    assert fw.float32_layers(model) == [model.head[1]]
    amp_initialize([model], "bfloat16", excluded_layers=None)
    assert model.head[1].weight.dtype == paddle.float32
    assert model.head[2].weight.dtype == paddle.bfloat16
    assert model.head[0].weight.dtype == paddle.bfloat16


class Residuals(nn.Layer):
    """Blocks with an identity, a projection and a fused residual; equal branches and pieces, which are none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.proj = (fw.ConvBNLayer(4, 4, act=act) for act in ("relu", None, None))
        self.three, self.fused = fw.ConvBNLayer(4, 4), fw.ConvBNLayer(4, 4)
        self.left, self.right = fw.ConvBNLayer(4, 4, act=None), fw.ConvBNLayer(4, 4, act=None)
        self.piece, self.last = nn.BatchNorm2D(2), nn.BatchNorm2D(4)
        self.shift = self.create_parameter([4, 1, 1])

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = nn.functional.relu(self.two(self.one(x)) + self.proj(x))
        x = self.fused(self.three(x), x)
        x = self.left(x) + self.right(x)
        first, second = paddle.split(x, 2, axis=1)
        x = paddle.concat([self.piece(first) + second, self.piece(x[:, :2]) + x[:, 2:]], axis=1)
        branch = self.last(x)
        branch += x
        return branch + self.shift


def test_the_last_norm_of_a_residual_block_is_found_by_dataflow() -> None:
    model = Residuals()
    for parameter in model.parameters():
        parameter.stop_gradient = True  # a graph is found all the same
    report = fw.apply_policy(
        model, [{"zero_init_residual": True}, {"match": "one.*", "gamma": 2}], inputs=example(2, 4, 5, 5)
    )
    zero = {entry.path for entry in report.entries if any("γ = 0" in done for done in entry.done)}
    assert zero == {"two.bn", "fused.bn", "last"}
    assert (model.two.bn.weight.numpy() == 0).all()
    assert (model.one.bn.weight.numpy() == 2).all()


def test_a_branch_is_not_frozen_at_zero() -> None:
    rules = "- zero_init_residual: true\n- match: last\n  norm: frozen"
    with pytest.raises(ConfigError, match=r"norms.yaml, line 2: freezes γ of 'last' at 0, which norms.yaml, line 1 "):
        fw.apply_policy(Residuals(), Policy.parse(rules, "norms.yaml"), inputs=example(2, 4, 5, 5))


@pytest.mark.parametrize(
    ("name", "count", "last"),
    [("resnet18", 8, "layer1.0.bn2"), ("mobilenet_v2", 10, "features.3.conv.3"), ("shufflenet_v2_x0_25", 0, None)],
)
def test_residual_blocks_of_known_networks(name: str, count: int, last: str | None) -> None:
    model = getattr(paddle.vision.models, name)(num_classes=4)
    rules = [{"gamma": 1.0}, {"zero_init_residual": True}]
    if not count:
        with pytest.raises(ConfigError, match="rule 2: zero_init_residual has no effect"):
            fw.apply_policy(model, rules, inputs=example(1, 3, 64, 64))
        return
    report = fw.apply_policy(model, rules, inputs=example(1, 3, 64, 64))
    zero = [entry.path for entry in report.entries if any("γ = 0" in done for done in entry.done)]
    assert len(zero) == count
    assert last in zero


def test_sync_batch_norm_is_ours() -> None:
    model = network()
    fw.apply_policy(model, [{"match": "stem.*", "norm_type": "sync_bn"}])
    assert type(model.stem[1]) is fw.SyncBatchNorm
    fw.apply_policy(model, [{"match": "stem.*", "norm_type": "bn"}])
    assert type(model.stem[1]) is fw.BatchNorm2D


def test_a_policy_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "norms.yaml"
    file.write_text("- kind: batch_norm\n  norm_type: gn\n", encoding="utf-8")
    model = network()
    fw.apply_policy(model, file)
    assert model.stem[1]._num_groups == 4  # of two channels each: of one, it would be instance norm
    with pytest.raises(ConfigError, match="none of the 1 norm layers"):
        fw.apply_policy(nn.Sequential(nn.BatchNorm2D(2)), [{"match": "x", "beta": 1}])


def test_without_what_reads_policies_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flatwater.paddle.policy.rules", "flatwater.policy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(BackendError, match="pydantic is not installed"):
        fw.apply_policy(network(), [{"beta": 1}])
    assert issubclass(BackendError, FlatwaterError)
    assert applied_module.AppliedPolicy is fw.AppliedPolicy
