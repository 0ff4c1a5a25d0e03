"""Frozen stays frozen through all that training does to a model: optimizers, recompute, wrapping, files, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from networks import example, randomize, state_of
from paddle import nn
from paddle.distributed.fleet.utils import recompute

import flatwater.paddle as fw

# Paddle's BatchNorm2D says in every training step that it tracks statistics, which it then does not.
pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")

KINDS: dict[str, Callable[[], nn.Layer]] = {
    "nn.BatchNorm": lambda: nn.BatchNorm(4),
    "nn.BatchNorm2D": lambda: nn.BatchNorm2D(4),
    "nn.SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "nn.GroupNorm": lambda: nn.GroupNorm(2, 4),
    "nn.InstanceNorm2D": lambda: nn.InstanceNorm2D(4),
    "fw.BatchNorm": lambda: fw.BatchNorm(4),
    "fw.BatchNorm2D": lambda: fw.BatchNorm2D(4, act="relu"),
    "fw.SyncBatchNorm": lambda: fw.SyncBatchNorm(4),
    "fw.GroupNorm": lambda: fw.GroupNorm(2, 4),
    "fw.InstanceNorm2D": lambda: fw.InstanceNorm2D(4),
}
OPTIMIZERS: dict[str, Callable[[Any], paddle.optimizer.Optimizer]] = {
    "Momentum": lambda parameters: paddle.optimizer.Momentum(0.1, parameters=parameters, weight_decay=0.1),
    "AdamW": lambda parameters: paddle.optimizer.AdamW(0.1, parameters=parameters, weight_decay=0.1),
    "Adam, clipped": lambda parameters: paddle.optimizer.Adam(
        0.1, parameters=parameters, weight_decay=0.1, grad_clip=nn.ClipGradByGlobalNorm(1.0)
    ),
}


def network(make: Callable[[], nn.Layer] = KINDS["fw.BatchNorm2D"]) -> nn.Layer:
    return randomize(nn.Sequential(nn.Conv2D(3, 4, 1), make(), nn.Conv2D(4, 4, 1), make()))


def train(model: nn.Layer, optimizer: paddle.optimizer.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        (model(example(4, 3, 5, 5)) ** 2).mean().backward()
        optimizer.step()
        optimizer.clear_grad()


def norms_of(model: nn.Layer) -> dict[str, np.ndarray]:
    return {name: values for name, values in state_of(model).items() if name.startswith(("1.", "3."))}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_through_steps_and_changes_of_mode(kind: str) -> None:
    model = network(KINDS[kind])
    optimizer = OPTIMIZERS["Momentum"](model.parameters())
    fw.freeze(model)
    before, conv = norms_of(model), model[0].weight.numpy()
    for _ in range(2):
        model.train()
        train(model, optimizer)
        model.eval()
        model(example(4, 3, 5, 5))
    assert same(norms_of(model), before)
    assert fw.frozen_report(model).ok
    assert not np.array_equal(model[0].weight.numpy(), conv)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_decay_and_no_momentum_from_before_moves_what_is_frozen_now(kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    (model(example(4, 3, 5, 5)) ** 2).mean().backward()  # a gradient that no step has taken yet
    fw.freeze(model)
    train(model, optimizer)
    assert fw.frozen_report(model).ok

    fw.thaw(model)
    before = norms_of(model)
    assert model[1].weight.grad is None
    train(model, optimizer)
    assert not any(np.array_equal(values, before[name]) for name, values in norms_of(model).items())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["nn.BatchNorm", "nn.BatchNorm2D", "nn.SyncBatchNorm", "fw.BatchNorm2D"])
def test_recompute_moves_nothing_and_passes_the_gradient_on(kind: str, use_reentrant: bool) -> None:
    model = network(KINDS[kind])
    fw.freeze(model)
    x = example(4, 3, 5, 5)
    x.stop_gradient = False
    gradients = []
    for run in (model, lambda x: recompute(model, x, use_reentrant=use_reentrant)):
        (run(x) ** 2).mean().backward()
        gradients.append([tensor.grad.numpy().copy() for tensor in (x, model[0].weight)])
        x.clear_gradient(False)
        model.clear_gradients()
    assert fw.frozen_report(model).ok
    assert model[1].weight.grad is None
    for direct, again in zip(*gradients, strict=True):
        assert np.array_equal(direct, again)


@pytest.mark.filterwarnings("ignore:The program will return to single-card operation:UserWarning")
def test_a_wrapped_model_holds_in_a_world_of_one() -> None:
    model = network()
    fw.freeze(model, pattern="1")
    wrapped = paddle.DataParallel(model)
    fw.freeze(wrapped, pattern="_layers.3")
    train(wrapped, OPTIMIZERS["Momentum"](wrapped.parameters()))
    assert fw.frozen_report(wrapped).held[0] == "_layers.1.weight"
    assert fw.frozen_report(wrapped).ok
    assert fw.thaw(wrapped).changed == ["_layers.1", "_layers.3"]
    assert not model[1].weight.stop_gradient


def test_a_state_dict_goes_out_and_in(tmp_path: Path) -> None:
    model = network()
    keys = list(model.state_dict())
    fw.freeze(model)
    assert list(model.state_dict()) == keys
    paddle.save(model.state_dict(), str(tmp_path / "frozen.pdparams"))
    train(model, OPTIMIZERS["Momentum"](model.parameters()))
    model.set_state_dict(paddle.load(str(tmp_path / "frozen.pdparams")))
    assert fw.frozen_report(model).ok

    other = state_of(randomize(network(), seed=1))
    model.set_state_dict(other)
    report = fw.frozen_report(model)
    assert len(report.moved) == 8
    assert not report.released
    train(model, OPTIMIZERS["Momentum"](model.parameters()))
    assert same(norms_of(model), {name: other[name] for name in norms_of(model)})

    fw.thaw(model)
    fw.freeze(model)
    assert fw.frozen_report(model).ok


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_frozen_and_thawed_by_itself(duplicate: Callable[[nn.Layer], nn.Layer]) -> None:
    model = network(KINDS["nn.SyncBatchNorm"])
    model[1].weight.stop_gradient = True
    fw.freeze(model)
    twin = duplicate(model)
    twin(example(4, 3, 5, 5))
    assert fw.frozen_report(twin).held == fw.frozen_report(model).held
    twin[3].bias.set_value(twin[3].bias + 1)
    assert list(fw.frozen_report(twin).moved) == ["3.bias"]
    fw.thaw(twin)
    assert type(twin[1]) is nn.SyncBatchNorm
    assert (twin[1].weight.stop_gradient, twin[3].weight.stop_gradient) == (True, False)
    assert fw.frozen_report(model).ok
    assert model[3].weight.stop_gradient
