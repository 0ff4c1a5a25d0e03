"""Recalibration: the statistics of the whole data set, exactly, whatever its batches; all or nothing."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomize, state_of
from paddle import nn
from paddle.distributed.fleet.utils import recompute

import flatwater.paddle as fw
from flatwater import reference
from flatwater.errors import InputError, SingleValueError, StatisticsError, SurgeryError
from flatwater.paddle.influence import closure, stages
from flatwater.paddle.population import _moments_by_operators
from flatwater.surgery.recalibration import Pool

# Paddle's BatchNorm2D says in every training step that it tracks statistics.
pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")

# float32: the new statistics are rounded to it; a second layer reads what float32 layers computed.
STORED = {"rtol": 2e-7, "atol": 1e-7}
COMPUTED = {"rtol": 1e-5, "atol": 1e-6}

KINDS: dict[str, tuple[Callable[[], nn.Layer], tuple[int, ...], int]] = {
    "nn.BatchNorm": (lambda: nn.BatchNorm(3), (3, 4, 5), 1),
    "nn.BatchNorm1D": (lambda: nn.BatchNorm1D(3), (3,), 1),
    "nn.BatchNorm2D": (lambda: nn.BatchNorm2D(3), (3, 4, 5), 1),
    "nn.BatchNorm2D, channels last": (lambda: nn.BatchNorm2D(3, data_format="NHWC"), (4, 5, 3), -1),
    "nn.BatchNorm3D": (lambda: nn.BatchNorm3D(3), (3, 2, 4, 5), 1),
    "nn.SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (3, 4, 5), 1),
    "fw.BatchNorm": (lambda: fw.BatchNorm(3, data_layout="NHWC"), (4, 5, 3), -1),
    "fw.BatchNorm1D": (lambda: fw.BatchNorm1D(3, data_format="NLC"), (7, 3), -1),
    "fw.BatchNorm2D": (lambda: fw.BatchNorm2D(3, act="relu"), (3, 4, 5), 1),
    "fw.SyncBatchNorm": (lambda: fw.SyncBatchNorm(3), (3, 4, 5), 1),
}


def data(*shape: int, sizes: tuple[int, ...] = (8, 8, 3), offset: float = 5.0) -> list[np.ndarray]:
    """Batches of unequal size whose means differ much, so that an average of averages would be wrong."""
    generator = np.random.default_rng(3)
    return [
        generator.normal(offset * (index + 1), index + 1.0, (size, *shape)).astype("float32")
        for index, size in enumerate(sizes)
    ]


def statistics_of(layer: nn.Layer) -> list[np.ndarray]:
    return [layer._mean.numpy().astype("float64"), layer._variance.numpy().astype("float64")]


def assert_statistics(layer: nn.Layer, inputs: list[np.ndarray], tolerance: dict[str, float], axis: int = 1) -> None:
    expected = reference.batch_statistics(np.concatenate(inputs), axis=axis)
    for found, value in zip(statistics_of(layer), (expected.mean, expected.variance), strict=True):
        np.testing.assert_allclose(found, value, **tolerance)


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def two_layers() -> nn.Layer:
    return randomize(nn.Sequential(nn.BatchNorm1D(3), nn.ReLU(), nn.Dropout(0.5), fw.BatchNorm1D(3)))


def normalized(layer: nn.Layer, x: np.ndarray, statistics: reference.Statistics | None = None) -> np.ndarray:
    """What ``layer`` makes of ``x`` with these statistics, None for its own, before a ReLU."""
    weight, bias = layer.weight.numpy(), layer.bias.numpy()
    return reference.batch_norm(x, weight=weight, bias=bias, statistics=statistics).y


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gets_the_statistics_of_the_concatenated_data(kind: str, in_order: bool) -> None:
    make, shape, axis = KINDS[kind]
    model = randomize(nn.Sequential(make()))
    kept = type(model[0]), model[0]._momentum, list(model[0].__dict__)
    batches = data(*shape)
    report = fw.recalibrate(model, batches, in_order=in_order)
    assert_statistics(model[0], batches, STORED, axis)
    assert [change.path for change in report.layers] == ["0"]
    assert report.layers[0].calls == report.batches == 3
    assert report.layers[0].count == 19 * int(np.prod(shape)) // 3
    assert (type(model[0]), model[0]._momentum) == kept[:2]


def test_far_from_zero_nothing_is_lost() -> None:
    model = nn.Sequential(nn.BatchNorm1D(3))
    batches = [1e4 + batch for batch in data(3, sizes=(100, 1000, 7), offset=0.0)]
    fw.recalibrate(model, batches)
    assert_statistics(model[0], batches, STORED)


def test_by_default_a_layer_reads_what_training_gives_it() -> None:
    model, batches = two_layers(), data(3)
    second = [np.maximum(normalized(model[0], batch), 0) for batch in batches]
    report = fw.recalibrate(model, batches)
    assert report.passes == 1
    assert_statistics(model[0], batches, STORED)
    assert_statistics(model[3], second, COMPUTED)


def test_in_order_a_layer_reads_what_evaluation_will_give_it() -> None:
    model, batches = two_layers(), data(3)
    population = reference.batch_statistics(np.concatenate(batches))
    second = [np.maximum(normalized(model[0], batch, population), 0) for batch in batches]
    report = fw.recalibrate(model, batches, in_order=True)
    assert report.passes == 2
    assert_statistics(model[0], batches, STORED)
    assert_statistics(model[3], second, COMPUTED)
    # One at a time or all together: what is measured in eval() does not depend on the batch.
    before = state_of(model)
    fw.recalibrate(model, [row[None] for batch in batches for row in batch], in_order=True)
    for name, values in state_of(model).items():
        np.testing.assert_allclose(values, before[name], **COMPUTED)


class Branches(nn.Layer):
    """first, then three branches, one of them of two norms, then a sum that the last norm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1D(3)  # registered first, runs last
        self.first, self.left, self.right, self.right2 = (nn.BatchNorm1D(3) for _ in range(4))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = F.relu(self.first(x))
        # Through NumPy, where no gradient and no graph shows what depends on what.
        right = self.right2(paddle.to_tensor(np.tanh(self.right(x).numpy())))
        return self.last(self.left(x) + right)


def test_independent_branches_share_a_pass() -> None:
    model, batches = randomize(Branches()), data(3)
    report = fw.recalibrate(model, batches, in_order=True)
    assert report.passes == 4  # first; left and right; right2; last
    read: dict[str, list[np.ndarray]] = {}
    for path, layer in model.named_sublayers():
        layer.register_forward_pre_hook(
            lambda _, inputs, path=path: read.setdefault(path, []).append(inputs[0].numpy())
        )
    model.eval()
    for batch in batches:
        model(paddle.to_tensor(batch))
    for path, inputs in read.items():
        assert_statistics(getattr(model, path), inputs, COMPUTED)


class Touchy(Branches):
    """Does not run on what training would not give it, such as noise."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = super().forward(x)
        if float(x.abs().max()) > 50 or float(y.abs().max()) > 50:
            raise ValueError("out of range")
        return y


class Counting(Branches):
    """Computes something else in each run, which no random number stream explains."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = itertools.count()

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return super().forward(x + 1e-6 * next(self.runs))


@pytest.mark.parametrize("kind", [Touchy, Counting])
def test_where_experiments_tell_nothing_a_layer_depends_on_all_before_it(kind: type[Branches]) -> None:
    model, plain, batches = randomize(kind()), randomize(Branches()), data(3)
    assert fw.recalibrate(model, batches, in_order=True).passes == 5
    fw.recalibrate(plain, batches, in_order=True)
    for name, values in state_of(model).items():
        # Counting's inputs grow to 2e-5 more than the others'.
        np.testing.assert_allclose(values, plain.state_dict()[name].numpy(), rtol=1e-4, atol=1e-4)


def test_layers_in_a_ring_are_measured_together() -> None:
    ring = np.zeros((5, 5), np.bool_)
    for one, other in ((0, 1), (1, 2), (2, 3), (3, 1), (3, 4)):
        ring[one, other] = True
    reached = closure(ring)
    assert reached.sum(axis=1).tolist() == [4, 4, 4, 4, 0]
    assert stages(reached) == [[0], [1, 2, 3], [4]]


def test_a_weight_of_zero_does_not_open_a_ring() -> None:
    class Ring(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.BatchNorm1D(3) for _ in range(3))

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            for _ in range(2):
                x = self.c(self.b(self.a(x)))
            return x

    model = randomize(Ring())
    model.b.weight.set_value(np.zeros(3, "float32"))  # so that noise from a never reaches c
    assert fw.recalibrate(model, data(3), in_order=True).passes == 1


def test_each_pass_draws_the_same() -> None:
    class Augmenting:
        def __init__(self) -> None:
            self.drawn: list[list[float]] = []

        def __iter__(self) -> Iterator[paddle.Tensor]:
            self.drawn.append([])
            for batch in data(3):
                numbers = np.random.normal(), random.random(), paddle.randn([1]).item()  # noqa: NPY002
                self.drawn[-1] += numbers
                yield paddle.to_tensor(batch + np.float32(sum(numbers)))

    loader = Augmenting()
    fw.recalibrate(two_layers(), loader, in_order=True)
    first, *later = loader.drawn[1:]  # without the look at the first batch
    assert later == [first]


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("samples", [0, 5])
def test_other_devices_than_the_cpu_measure_by_operators(axis: int, samples: int) -> None:
    x = data(4, 6, sizes=(samples,))[0]
    mean, m2 = _moments_by_operators(paddle.to_tensor(x), axis)
    expected = reference.batch_statistics(x, axis=axis)
    # float64: one sum over 30 values
    np.testing.assert_allclose(mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(m2, expected.variance * expected.count, rtol=1e-13)


def test_what_stands_between_layers_does_not_matter() -> None:
    class Wrapped(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm1D(3), nn.BatchNorm1D(3)

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return recompute(self.second, recompute(self.first, x))

    model, plain = randomize(Wrapped()), randomize(nn.Sequential(nn.BatchNorm1D(3), nn.BatchNorm1D(3)))
    for options in ({}, {"in_order": True}):
        fw.recalibrate(model, data(3), **options)
        fw.recalibrate(plain, data(3), **options)
        assert [v.tobytes() for v in state_of(model).values()] == [v.tobytes() for v in state_of(plain).values()]


def test_float64_models_get_float64_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1D(3), fw.BatchNorm1D(3)).to(dtype="float64")
    batches = [batch.astype("float64") for batch in data(3)]
    fw.recalibrate(model, batches, in_order=True)
    assert_statistics(model[0], batches, {"rtol": 1e-14, "atol": 1e-14})


def test_a_layer_that_runs_twice_pools_both() -> None:
    class Twice(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1D(3)

        def forward(self, x: paddle.Tensor, y: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
            return self.norm(x), self.norm(input=y)

    model, batches = Twice(), data(3)
    report = fw.recalibrate(model, [(batch, 2 * batch[:2]) for batch in batches], in_order=True)
    assert report.layers[0].calls == 6
    assert_statistics(model.norm, [part for batch in batches for part in (batch, 2 * batch[:2])], STORED)


def test_a_layer_that_reads_its_own_output_normalizes_by_the_batch() -> None:
    class Loop(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.after = nn.BatchNorm1D(3), nn.BatchNorm1D(3)

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return self.after(self.norm(F.relu(self.norm(x))))

    model, batches = randomize(Loop()), data(3)
    second = [np.maximum(normalized(model.norm, batch), 0) for batch in batches]
    assert fw.recalibrate(model, batches, in_order=True).passes == 2
    assert_statistics(model.norm, batches + second, COMPUTED)


def test_a_pattern_leaves_the_others_in_eval() -> None:
    model, batches = two_layers(), data(3)
    own = reference.Statistics(*statistics_of(model[0]), count=1)
    before = state_of(model)
    fw.recalibrate(model, batches, pattern="3")
    assert_statistics(model[3], [np.maximum(normalized(model[0], batch, own), 0) for batch in batches], COMPUTED)
    assert same_bits(*({name: state[name] for name in before if name[0] == "0"} for state in (before, state_of(model))))


def test_frozen_layers_are_left() -> None:
    model = two_layers()
    fw.freeze(model, pattern="0")
    report = fw.recalibrate(model, data(3))
    assert report.left == {"0": "its statistics are frozen"}
    assert fw.frozen_report(model).ok
    fw.freeze(model)
    with pytest.raises(SurgeryError, match="all batch norm layers are frozen, among them '0'; thaw"):
        fw.recalibrate(model, data(3))


def _dict_loader() -> Iterator[dict[str, np.ndarray]]:
    for batch in data(3):
        yield {"input": batch}


LOADERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "arrays": (lambda: data(3), {}),
    "tensors": (lambda: [paddle.to_tensor(batch) for batch in data(3)], {}),
    "lists of one": (lambda: [[batch] for batch in data(3)], {}),
    "with labels": (
        lambda: [(paddle.to_tensor(batch), paddle.zeros([len(batch)])) for batch in data(3)],
        {"forward": lambda model, batch: model(batch[0])},
    ),
    "dicts, read once": (_dict_loader, {}),
    "Paddle's DataLoader": (
        lambda: paddle.io.DataLoader(
            paddle.io.TensorDataset([np.concatenate(data(3))]), batch_size=8, shuffle=True, drop_last=False
        ),
        {"in_order": True},
    ),
}


@pytest.mark.parametrize("form", LOADERS)
def test_forms_of_loaders(form: str) -> None:
    make, options = LOADERS[form]
    model = nn.Sequential(nn.BatchNorm1D(3))
    fw.recalibrate(model, make(), **options)
    assert_statistics(model[0], data(3), STORED)


def test_so_many_batches_and_no_more() -> None:
    model = nn.Sequential(nn.BatchNorm1D(3))
    assert fw.recalibrate(model, data(3), batches=2).batches == 2
    assert_statistics(model[0], data(3)[:2], STORED)


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
    with pytest.raises(SurgeryError, match="the Linear has no batch norm layer at all"):
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


@pytest.mark.parametrize("in_order", [False, True])
def test_statistics_that_were_nan_are_made_whole(in_order: bool) -> None:
    model, sound = two_layers(), two_layers()
    model[0]._mean[1] = float("nan")
    model[3]._variance.set_value(np.full(3, np.nan, "float32"))
    report = fw.recalibrate(model, data(3), in_order=in_order)
    fw.recalibrate(sound, data(3), in_order=in_order)
    assert same_bits(state_of(model), state_of(sound))
    as_dict = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert as_dict["layers"][0]["mean_shift"] == [None, None]
    assert as_dict["layers"][1]["variance_ratio"] == [None, None]


def test_layers_that_hide_all_before_them_do_not_hide_the_order() -> None:
    def chain() -> nn.Layer:
        return randomize(nn.Sequential(*[nn.BatchNorm1D(3) for _ in range(4)]))

    model, sound = chain(), chain()
    for layer in (model[1], model[2]):
        layer._mean.set_value(np.full(3, np.nan, "float32"))
    for one in (model, sound):
        one[3].weight.set_value(np.zeros(3, "float32"))
        assert fw.recalibrate(one, data(3), in_order=True).passes == 4
    assert same_bits(state_of(model), state_of(sound))


def test_the_report_measures_by_what_was_before(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.BatchNorm1D(2, epsilon=1e-5))
    model[0]._mean.set_value(np.array([1.0, 0.0], "float32"))
    model[0]._variance.set_value(np.array([4.0, 1.0], "float32"))
    batch = np.array([[6.0, -1.0], [8.0, 1.0]], "float32")  # mean 7, 0; variance 1, 1
    report = fw.recalibrate(model, [batch])
    change = report.layers[0]
    assert change.mean_shift == pytest.approx((3.0, 1.5), rel=1e-5)  # ε beside a variance of 4
    assert change.variance_ratio == pytest.approx((0.25, 1.0), rel=1e-5)
    assert report.as_dict()["layers"][0]["path"] == "0"
    table = str(report)
    assert table.splitlines()[0].strip() == "1 layers recalibrated; batches per pass: 1, passes: 1"
    assert all(number in table for number in (" 3 ", " 1.5 ", " 0.25 "))
    assert capfd.readouterr() == ("", "")  # no bar where there is no terminal


def test_a_terminal_shows_how_far_it_is(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes everything for a terminal
    fw.recalibrate(two_layers(), data(3), in_order=True)
    out, err = capfd.readouterr()
    assert not out
    assert "recalibrate, pass 2 of 2" in err
    assert "3/3" in err
    fw.recalibrate(two_layers(), data(3), progress=False)
    assert capfd.readouterr() == ("", "")


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), offset=st.floats(-1e6, 1e6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_pooling_parts_is_measuring_the_whole(sizes: list[int], offset: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = [generator.normal(offset, 1.0, (size, 2)) for size in sizes]
    pool = Pool.empty(2)
    for part in parts:
        found = reference.batch_statistics(part)
        pool.add(found.count, found.mean, found.variance * found.count)
    whole = reference.batch_statistics(np.concatenate(parts))
    assert (pool.count, pool.calls) == (whole.count, len(parts))
    # float64: the means of parts are rounded to 1e-16 of 1e6, and enter the variance as differences of about 1.
    np.testing.assert_allclose(pool.mean, whole.mean, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(pool.variance, whole.variance, rtol=1e-9, atol=1e-12)
