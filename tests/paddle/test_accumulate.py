"""Several small batches that count as one for the moving statistics, against the float64 oracle on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.distributed.fleet.utils import recompute

import flatwater.paddle as fw
from flatwater import reference
from flatwater.errors import InputError, SingleValueError, StatisticsError, SurgeryError

pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")

# One rounding to float32 of what was computed in float64; that of momentum·old before it is in float64, too.
ONE_ROUNDING = 2.0**-24

LAYERS: dict[str, Callable[[], Any]] = {
    "stock": lambda: nn.BatchNorm2D(3, momentum=0.7),
    "stock legacy": lambda: nn.BatchNorm(3, momentum=0.7, act="relu"),
    "stock NHWC": lambda: nn.BatchNorm2D(3, momentum=0.7, data_format="NHWC"),
    "ours": lambda: fw.BatchNorm2D(3, momentum=0.7, act="relu"),
    "ours NHWC": lambda: fw.BatchNorm2D(3, momentum=0.7, data_format="NHWC"),
    "sync, alone": lambda: fw.SyncBatchNorm(3, momentum=0.7),
    "stock, no affine": lambda: nn.BatchNorm2D(3, momentum=0.7, weight_attr=False, bias_attr=False),
}


def micro_batches(layer: Any, mean: float = 0.0, sizes: tuple[int, ...] = (4, 1, 3)) -> list[np.ndarray]:
    """Unequal, and each about another mean."""
    last = (getattr(layer, "_data_layout", None) or layer._data_format) == "NHWC"
    generator = np.random.default_rng(11)
    return [
        (generator.normal(mean + index, 1.0, (size, 5, 4, 3) if last else (size, 3, 5, 4))).astype("float32")
        for index, size in enumerate(sizes)
    ]


def axis_of(layer: Any) -> int:
    return -1 if (getattr(layer, "_data_layout", None) or layer._data_format) == "NHWC" else 1


def statistics_of(layer: Any) -> tuple[bytes, bytes]:
    return layer._mean.numpy().tobytes(), layer._variance.numpy().tobytes()


def run(model: nn.Layer, batches: list[np.ndarray]) -> list[np.ndarray]:
    return [model(paddle.to_tensor(batch)).numpy() for batch in batches]


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_step_is_that_of_the_concatenated_batch(make: Callable[[], Any], mean: float) -> None:
    layer = make()
    layer._mean.set_value(np.float32([0.5, -2, 3]))
    layer._variance.set_value(np.float32([0.5, 2, 1]))
    before = layer._mean.numpy(), layer._variance.numpy()
    parts = micro_batches(layer, mean)

    with fw.accumulate_statistics(layer) as accumulated:
        run(layer, parts)
        assert statistics_of(layer) == tuple(values.tobytes() for values in before)

    whole = reference.batch_statistics(np.concatenate(parts), axis=axis_of(layer))
    wanted = reference.update_running(*before, whole, momentum=0.7)
    np.testing.assert_allclose(layer._mean.numpy(), wanted[0], rtol=ONE_ROUNDING)
    np.testing.assert_allclose(layer._variance.numpy(), wanted[1], rtol=ONE_ROUNDING)
    assert accumulated.counts == {"": 8 * 20}
    assert layer._momentum == 0.7


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_what_is_computed_is_what_is_computed_without(make: Callable[[], Any]) -> None:
    with_block, without = make(), make()
    gradients = []
    for layer in (with_block, without):
        with fw.accumulate_statistics(layer) if layer is with_block else paddle.enable_grad():
            x = paddle.to_tensor(micro_batches(layer)[0])
            x.stop_gradient = False
            y = layer(x)
            (y * y * y).sum().backward()
        gradients.append(
            [x.grad.numpy(), y.numpy(), *(one.grad.numpy() for one in layer.parameters() if one.trainable)]
        )
    assert all(np.array_equal(one, other) for one, other in zip(*gradients, strict=True))


def test_one_batch_is_a_plain_step() -> None:
    one, other = fw.BatchNorm2D(3), fw.BatchNorm2D(3)
    batch = micro_batches(one)[0]
    with fw.accumulate_statistics(one):
        run(one, [batch])
    run(other, [batch])
    for mine, theirs in zip((one._mean, one._variance), (other._mean, other._variance), strict=True):
        # Both are computed in float64 and rounded to float32, once.
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=2 * ONE_ROUNDING)


class Block(nn.Layer):
    """A norm that runs twice in each pass, one that is frozen, one that nothing reaches, and one to leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.BatchNorm2D(3)
        self.frozen = fw.BatchNorm2D(3)
        self.unreached = nn.BatchNorm2D(3)
        self.left_out = fw.BatchNorm2D(3)
        fw.freeze(self, pattern="frozen")

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.left_out(self.frozen(self.twice(x + 1) + self.twice(x)))


def test_every_call_counts_and_only_of_layers_that_learn() -> None:
    model = Block()
    parts = micro_batches(model.twice)
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    with fw.accumulate_statistics(model, pattern="[tfu]*") as accumulated:
        run(model, parts)
        assert not np.array_equal(model.left_out._mean.numpy(), before["left_out._mean"])
    assert accumulated.counts == {"twice": 2 * 8 * 20}
    whole = reference.batch_statistics(np.concatenate([x + np.float32(add) for x in parts for add in (0, 1)]))
    wanted = reference.update_running(before["twice._mean"], before["twice._variance"], whole)
    np.testing.assert_allclose(model.twice._mean.numpy(), wanted[0], rtol=ONE_ROUNDING)
    np.testing.assert_allclose(model.twice._variance.numpy(), wanted[1], rtol=ONE_ROUNDING)
    for name in ("frozen._mean", "frozen._variance", "unreached._mean"):
        assert np.array_equal(model.state_dict()[name].numpy(), before[name])


def test_eval_in_between_sees_the_statistics_from_before_and_adds_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2D(3), fw.BatchNorm2D(3))
    model.eval()
    x = micro_batches(model[0])[0]
    before = run(model, [x])[0]
    with fw.accumulate_statistics(model) as accumulated:
        model.train()
        run(model, [x])
        model.eval()
        assert np.array_equal(run(model, [x])[0], before)
        assert accumulated.counts == {"0": 80, "1": 80}
        model.train()
        run(model, [x])
    assert accumulated.counts == {"0": 160, "1": 160}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_the_statistics_are_what_they_were(error: type[BaseException]) -> None:
    model = nn.Sequential(nn.BatchNorm2D(3), fw.BatchNorm2D(3))
    parts = micro_batches(model[0])
    run(model, parts)
    before = [statistics_of(layer) for layer in model]

    def interrupted() -> None:
        with fw.accumulate_statistics(model):
            run(model, parts)
            raise error

    with pytest.raises(error):
        interrupted()
    assert [statistics_of(layer) for layer in model] == before
    assert not any(layer._forward_pre_hooks or layer._forward_post_hooks for layer in model)
    assert [layer._momentum for layer in model] == [0.9, 0.9]
    with fw.accumulate_statistics(model):  # and the next step is a step
        run(model, parts)
    assert all(statistics_of(layer) != one for layer, one in zip(model, before, strict=True))


def test_a_call_that_failed_counts_for_nothing() -> None:
    layer = fw.BatchNorm1D(3, momentum=0.6)
    one, two = np.ones((1, 3), "float32"), np.float32([[1, 2, 3], [4, 6, 8]])
    with fw.accumulate_statistics(layer) as accumulated:
        with pytest.raises(SingleValueError):
            run(layer, [one])
        run(layer, [two])
    assert accumulated.counts == {"": 2}
    assert layer._momentum == 0.6
    np.testing.assert_allclose(layer._mean.numpy(), 0.4 * two.mean(axis=0), rtol=1e-6)
    with fw.accumulate_statistics(layer), pytest.raises(SingleValueError):
        run(layer, [one])
    assert layer._momentum == 0.6


def test_recompute_counts_once() -> None:
    model = nn.Sequential(nn.BatchNorm2D(3), fw.BatchNorm2D(3))
    x = paddle.to_tensor(micro_batches(model[0])[0])
    x.stop_gradient = False
    with fw.accumulate_statistics(model) as accumulated:
        recompute(model, x).sum().backward()
    assert accumulated.counts == {"0": 80, "1": 80}


def test_momentum_is_that_of_the_end_of_the_block() -> None:
    layer = nn.BatchNorm2D(3)
    schedule = fw.MomentumSchedule(layer, {0: 0.9, 2: 0.0})
    parts = micro_batches(layer)
    with fw.accumulate_statistics(layer):
        for part in parts:
            run(layer, [part])
            schedule.step()
        assert layer._momentum == 0.0
    np.testing.assert_allclose(layer._mean.numpy(), np.concatenate(parts).mean(axis=(0, 2, 3)), rtol=1e-6)


def test_values_that_are_none_are_errors_that_name_the_layer() -> None:
    model = nn.Sequential(nn.BatchNorm1D(2), nn.BatchNorm1D(2))
    before = [statistics_of(layer) for layer in model]

    def accumulate(value: float) -> None:
        with fw.accumulate_statistics(model):
            run(model, [np.float32([[1, -value], [3, value]])])

    with pytest.raises(InputError, match="batch norm layer '0', in accumulate_statistics, reads values that are NaN"):
        accumulate(math.nan)
    with pytest.raises(StatisticsError, match="of batch norm layer '0' would be NaN or too large for"):
        accumulate(1e30)
    assert [statistics_of(layer) for layer in model] == before


def test_what_cannot_be_accumulated() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1D(2))

    def accumulate(model: nn.Layer, **settings: Any) -> None:
        with fw.accumulate_statistics(model, **settings):
            pass

    with pytest.raises(SurgeryError, match="no batch norm layer whose path matches 'x'"):
        accumulate(model, pattern="x")
    with fw.accumulate_statistics(model), pytest.raises(SurgeryError, match="'' accumulates statistics already"):
        accumulate(model[1])
    paddle.jit.to_static(model)
    with pytest.raises(SurgeryError, match="'1' was captured by to_static"):
        accumulate(model)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_fit_accumulates_statistics_with_its_gradients() -> None:
    network = nn.Sequential(nn.BatchNorm1D(3, momentum=0.5), nn.Linear(3, 1))
    model = paddle.Model(network)
    optimizer = paddle.optimizer.SGD(0.0, parameters=network.parameters())
    model.prepare(optimizer, lambda y: (y * y).mean())
    values = np.random.default_rng(2).normal(size=(10, 3)).astype("float32")
    data = paddle.io.TensorDataset([paddle.to_tensor(values)])
    fit = {"batch_size": 2, "shuffle": False, "verbose": 0, "accumulate_grad_batches": 2}

    model.fit(data, epochs=1, callbacks=[fw.AccumulateStatistics(2)], **fit)

    mean = np.zeros(3)
    for rows in (values[:4], values[4:8], values[8:]):
        mean = 0.5 * mean + 0.5 * rows.mean(axis=0, dtype="float64")
    np.testing.assert_allclose(network[0]._mean.numpy(), mean, rtol=1e-6)  # three roundings to float32

    class StopError(Exception):
        pass

    class Stop(paddle.callbacks.Callback):
        def on_train_batch_begin(self, step: int, logs: Any = None) -> None:
            if step == 1:
                raise StopError

    before = statistics_of(network[0])
    callback = fw.AccumulateStatistics(2)
    with pytest.raises(StopError):
        model.fit(data, epochs=1, callbacks=[callback, Stop()], **fit)
    callback.on_train_begin()
    assert statistics_of(network[0]) == before
    assert not network[0]._forward_pre_hooks
    with pytest.raises(InputError, match="every=0 must be at least 1"):
        fw.AccumulateStatistics(0)
