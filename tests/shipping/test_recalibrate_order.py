"""Recalibration in order: each layer reads what evaluation will give it, in as few passes as that takes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from networks import randomize, state_of
from paddle import nn
from recalibration_data import COMPUTED, STORED, assert_statistics, data, normalized, same_bits, two_layers

import flatwater.paddle as fw
from flatwater import reference
from flatwater.paddle.surgery.influence import closure, stages

# Paddle's BatchNorm2D says in every training step that it tracks statistics.
pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")


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
