"""Recalibration touches nothing but statistics, and after a fault not even those."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
import pytest
from networks import randomize, state_of
from paddle import nn
from recalibration_data import STORED, assert_statistics, data, same_bits, two_layers

import flatwater.paddle as fw
from flatwater.errors import InputError, SingleValueError, StatisticsError, SurgeryError

# Paddle's BatchNorm2D says in every training step that it tracks statistics.
pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")


class Noisy(nn.Layer):
    """Draws in eval() too, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2D(3, use_global_stats=False)
        self.other = nn.BatchNorm2D(3, use_global_stats=False)  # moves its statistics in eval() too
        self.register_buffer("calls", paddle.zeros([1]))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        self.calls.set_value(self.calls + 1)
        random.random()
        return self.other(self.norm(x + paddle.randn(x.shape) + float(np.random.normal())))  # noqa: NPY002


def footprint(model: nn.Layer) -> tuple[Any, ...]:
    """What recalibration may not move: modes, hooks, flags, and what would be drawn next."""
    streams = paddle.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    drawn = paddle.randn([4]).numpy().tolist(), np.random.normal(), random.random()  # noqa: NPY002
    paddle.set_rng_state(streams[0])
    np.random.set_state(streams[1])  # noqa: NPY002
    random.setstate(streams[2])
    layers = model.sublayers(include_self=True)
    return (
        drawn,
        [
            (type(layer), layer.training, len(layer._forward_pre_hooks), len(layer._forward_post_hooks))
            for layer in layers
        ],
        [parameter.stop_gradient for parameter in model.parameters()],
        [parameter.grad is None for parameter in model.parameters()],
    )


@pytest.mark.parametrize("in_order", [False, True])
def test_nothing_but_the_statistics_is_different_afterwards(in_order: bool) -> None:
    model = randomize(Noisy())
    model.norm.eval()
    before, around = state_of(model), footprint(model)
    report = fw.recalibrate(model, data(3, 4, 5), pattern="norm", in_order=in_order)
    moved = {name for name, values in state_of(model).items() if values.tobytes() != before[name].tobytes()}
    assert moved == {"norm._mean", "norm._variance"}
    assert footprint(model) == around
    report.undo()
    assert same_bits(state_of(model), before)
    model.norm._mean.set_value(np.ones(3, "float32"))
    report.undo()
    assert model.norm._mean.numpy().tolist() == [1.0, 1.0, 1.0]


def _interrupted() -> Iterator[np.ndarray]:
    yield from data(3, 4, 5)[:2]
    raise KeyboardInterrupt


class _Fails(nn.Layer):
    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if len(x) == 3:
            raise ZeroDivisionError("too few")
        return x


def _with(value: float) -> list[np.ndarray]:
    batches = data(3, 4, 5)
    batches[2][1, 2, 0, 0] = value
    return batches


FAULTS: dict[str, tuple[Any, dict[str, Any], type[BaseException], str]] = {
    "interrupt": (_interrupted, {}, KeyboardInterrupt, "^$"),
    "NaN": (lambda: _with(np.nan), {}, InputError, r"layer '0', in batch 2, reads values that are NaN or.*channel 2"),
    "infinity": (lambda: _with(np.inf), {"in_order": True}, InputError, r"layer '0', in batch 2, reads values that"),
    "model fails": (
        lambda: data(3, 4, 5),
        {"forward": lambda model, batch: _Fails()(model(paddle.to_tensor(batch)))},
        SurgeryError,
        "Sequential fails on batch 2 of the loader: too few; give forward=lambda",
    ),
    "labels": (
        lambda: [(x, np.zeros(len(x))) for x in data(3, 4, 5)],
        {},
        SurgeryError,
        "fails on batch 0 of the loader: .*; give forward=lambda",
    ),
    "not an input": (lambda: ["text"], {}, InputError, "is a str; give a paddle.Tensor"),
    "wrong channels": (
        lambda: data(4, 4, 5),
        {},
        InputError,
        r"'0', in batch 0, reads float32 of shape \[8, 4, 4, 5\]",
    ),
    "integers": (lambda: [np.ones((2, 3, 4, 5), "int64")], {}, InputError, "reads int64"),
    "one value": (
        lambda: data(3, 1, 1, sizes=(8, 1)),
        {},
        SingleValueError,
        "'0', in batch 1, reads one value per channel .*drop_last=True.*in_order",
    ),
    "one value in all": (
        lambda: data(3, 1, 1, sizes=(1,)),
        {"in_order": True},
        SingleValueError,
        "'0' reads 1 value per channel in all batches together",
    ),
    "too large": (
        lambda: [batch * np.float32(1e25) for batch in data(3, 4, 5)],
        {},
        StatisticsError,
        "layer '0' are too large for paddle.float32",
    ),
    "empty": (list, {}, InputError, "the loader gave no batches"),
    "empty in order": (list, {"in_order": True}, InputError, "the loader gave no batches"),
    "read once": (_interrupted, {"in_order": True}, InputError, "a generator can be read once"),
    "no number": (list, {"batches": 0}, InputError, "batches=0 must be a positive number"),
    "no choice": (list, {"unreached": "skip"}, InputError, "unreached='skip' must be"),
    "no match": (
        list,
        {"pattern": "head.*"},
        SurgeryError,
        r"no batch norm layer whose path matches 'head\.\*' \(of 2\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_the_model_is_as_it_was(fault: str) -> None:
    loader, options, kind, message = FAULTS[fault]
    model = randomize(nn.Sequential(nn.BatchNorm2D(3), fw.BatchNorm2D(3)))
    model[1].eval()
    before, around = state_of(model), footprint(model)
    with pytest.raises(kind, match=message) as caught:
        fw.recalibrate(model, loader(), **options)
    assert "\n" not in str(caught.value)
    assert same_bits(state_of(model), before)
    assert footprint(model) == around


def test_a_layer_that_no_batch_reaches() -> None:
    model = nn.LayerDict({"a": nn.BatchNorm1D(3), "b": nn.BatchNorm1D(3)})
    forward = lambda model, batch: model["a"](paddle.to_tensor(batch))  # noqa: E731
    for in_order in (False, True):
        before = state_of(model)
        with pytest.raises(SurgeryError, match="no batch reached 'b' in LayerDict; leave them out by pattern="):
            fw.recalibrate(model, data(3), forward=forward, in_order=in_order)
        assert same_bits(state_of(model), before)
        report = fw.recalibrate(model, data(3), forward=forward, in_order=in_order, unreached="keep")
        assert report.left == {"b": "no batch reached it"}
        assert_statistics(model["a"], data(3), STORED)
    with pytest.raises(SurgeryError, match="the Linear has no batch norm layer; see"):
        fw.recalibrate(nn.Linear(2, 2), data(2))


def test_a_loader_that_gives_less_the_second_time() -> None:
    class Shrinking:
        def __init__(self) -> None:
            self.left = data(3, sizes=(4, 4, 4, 4))

        def __iter__(self) -> Iterator[np.ndarray]:
            self.left.pop()
            return iter(list(self.left))

    with pytest.raises(InputError, match="gave 2 batches in the first pass and 1 in pass 2"):
        fw.recalibrate(two_layers(), Shrinking(), in_order=True)
