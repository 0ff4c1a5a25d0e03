"""The monitor tells the truth about what it samples, and leaves no trace in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import nn
from paddle.distributed.fleet.utils import recompute

import flatwater.paddle as fw
from flatwater.errors import CheckpointError, InputError
from flatwater.paddle.monitor import NormMonitor


class Net(nn.Layer):
    def __init__(self, norm: Callable[[], nn.Layer]) -> None:
        super().__init__()
        self.conv = nn.Conv2D(3, 8, 3)
        self.norm = norm()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.head(self.drop(nn.functional.relu(self.norm(self.conv(x)))).mean(axis=[2, 3]))


def batch_norm_net() -> Net:
    return Net(lambda: nn.BatchNorm(8))


def train(steps: int, monitored: bool) -> tuple[list[np.ndarray], int]:
    paddle.seed(3)
    model = batch_norm_net()
    optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters())
    monitor = NormMonitor(model, every=2)
    for step in range(steps):
        x = paddle.randn([4, 3, 8, 8])
        with monitor.sampling(step if monitored else 1):
            loss = (model(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
    return [value.numpy() for value in model.state_dict().values()], len(monitor.record()["layers"][0]["samples"])


def test_training_is_the_same_to_the_bit() -> None:
    plain, none = train(5, monitored=False)
    watched, some = train(5, monitored=True)
    assert (none, some) == (0, 3)  # steps 0, 2 and 4
    for ours, theirs in zip(watched, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_hooks_are_gone_after_the_block_even_after_an_error() -> None:
    model = batch_norm_net()
    monitor = NormMonitor(model)
    with pytest.raises(ZeroDivisionError), monitor.sampling(0):
        raise ZeroDivisionError
    assert not model.norm._forward_post_hooks
    model(paddle.randn([2, 3, 8, 8]))
    assert monitor.record()["layers"][0]["samples"] == []


NORMS: dict[str, Callable[[], nn.Layer]] = {
    "BatchNorm": lambda: nn.BatchNorm(6),
    "BatchNorm2D": lambda: nn.BatchNorm2D(6),
    "BatchNorm2D without affine": lambda: nn.BatchNorm2D(6, weight_attr=False, bias_attr=False),
    "BatchNorm2D global": lambda: nn.BatchNorm2D(6, use_global_stats=True),
    "BatchNorm2D NHWC": lambda: nn.BatchNorm2D(6, data_format="NHWC"),
    "GroupNorm": lambda: nn.GroupNorm(3, 6),
    "InstanceNorm2D": lambda: nn.InstanceNorm2D(6),
    "fw.BatchNorm": lambda: fw.BatchNorm(6),
    "fw.BatchNorm2D NHWC": lambda: fw.BatchNorm2D(6, data_format="NHWC"),
    "fw.GroupNorm": lambda: fw.GroupNorm(2, 6),
    "fw.InstanceNorm2D": lambda: fw.InstanceNorm2D(6),
}


def after(layer: nn.Layer, *inputs: paddle.Tensor) -> dict[str, object]:
    monitor = NormMonitor(layer)
    with monitor.sampling(0):
        layer(*inputs)
    return monitor.record()["layers"][0]["samples"][0]["after"]


def test_after_is_the_same_whether_or_not_activation_and_residual_are_fused() -> None:
    paddle.seed(5)
    x = paddle.randn([4, 6, 5, 7])
    plain = after(fw.BatchNorm2D(6), x)
    assert after(fw.BatchNorm2D(6, act="relu"), x, paddle.randn([4, 6, 5, 7])) == plain
    assert plain["quantiles"][0] < -2.0  # not cut off at 0


def test_a_recomputed_layer_is_recorded_once_as_it_was_first() -> None:
    paddle.seed(5)
    model = nn.Sequential(fw.ConvBNLayer(3, 8), fw.ConvBNLayer(8, 8))
    x = paddle.randn([2, 3, 6, 6])
    x.stop_gradient = False
    monitor = NormMonitor(model)
    with monitor.sampling(0):
        y = recompute(model, x)
        forward = monitor.record()
        y.sum().backward()
    assert monitor.record() == forward
    assert [len(layer["samples"]) for layer in forward["layers"]] == [1, 1]


@pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_after_is_what_the_layer_returns(name: str, training: bool) -> None:
    """With no activation fused and nothing thinned, 'after' must be the stock layer's output."""
    paddle.seed(1)
    layer = NORMS[name]()
    for parameter in layer.parameters():
        parameter.set_value(paddle.uniform(parameter.shape, min=0.5, max=1.5))
    layer.training = training
    x = paddle.randn([4, 6, 5, 7]) * 3 + 1
    if "NHWC" in name:
        x = x.transpose([0, 2, 3, 1])
    monitor = NormMonitor(layer)
    with monitor.sampling(7):
        y = layer(x)

    (entry,) = monitor.record()["layers"]
    (sample,) = entry["samples"]
    assert (entry["path"], entry["channels"], sample["step"]) == ("", 6, 7)
    levels = monitor.record()["quantile_levels"]
    for tensor, side in ((x, "before"), (y, "after")):
        expected = tensor.numpy().astype(np.float64)
        seen = sample[side]
        assert seen["count"] == expected.size
        # float32 arithmetic of the layer against float64 here: values are of order 1, so a few ulp of 1e-7.
        np.testing.assert_allclose([seen["mean"], seen["std"]], [expected.mean(), expected.std()], atol=5e-6)
        np.testing.assert_allclose(seen["quantiles"], np.quantile(expected, levels), atol=5e-6)
        edges = np.linspace(seen["low"], seen["high"], len(seen["counts"]) + 1)
        inside = np.histogram(expected, bins=edges)[0]
        # A value within rounding of an edge may fall on either side of it.
        assert np.abs(inside - seen["counts"]).sum() <= 4


def test_running_statistics_are_those_after_the_pass() -> None:
    layer = nn.BatchNorm2D(5)
    monitor = NormMonitor(layer)
    with pytest.warns(UserWarning, match="track global mean"), monitor.sampling(0):
        layer(paddle.randn([3, 5, 4, 4]) + 2)
    sample = monitor.record()["layers"][0]["samples"][0]
    for key, buffer in (("running_mean", layer._mean), ("running_variance", layer._variance)):
        np.testing.assert_allclose(sample[key], np.quantile(buffer.numpy(), (0, 0.25, 0.5, 0.75, 1)), rtol=1e-6)
    assert sample["running_mean"][0] > 0.1  # moved from 0 towards 2


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40)),
    limit=st.integers(1, 300),
)
def test_thinning_keeps_about_what_was_asked(shape: tuple[int, int, int], limit: int) -> None:
    layer = nn.InstanceNorm1D(shape[1]) if shape[2] > 1 else nn.BatchNorm1D(shape[1])
    layer.eval()
    monitor = NormMonitor(layer, max_elements=limit)
    x = paddle.arange(int(np.prod(shape)), dtype="float32").reshape(shape)
    with monitor.sampling(0):
        layer(x)
    seen = monitor.record()["layers"][0]["samples"][0]["before"]
    assert 1 <= seen["count"] <= max(limit, 2 * shape[1])
    assert -0.5 <= seen["low"] < seen["high"] <= x.size - 0.5  # a constant gets a bin of width 1 around it


def test_nan_and_infinity_are_counted_not_written() -> None:
    layer = nn.BatchNorm1D(2)
    layer.eval()
    monitor = NormMonitor(layer)
    with monitor.sampling(0):
        layer(paddle.to_tensor([[float("nan"), 1.0], [float("inf"), 3.0]]))
    sample = monitor.record()["layers"][0]["samples"][0]
    assert (sample["before"]["non_finite"], sample["before"]["mean"]) == (2, 2.0)


@pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")
def test_a_diverged_run_can_still_be_recorded(tmp_path: Path) -> None:
    layer = nn.BatchNorm1D(2)
    monitor = NormMonitor(layer)
    with monitor.sampling(0):
        layer(paddle.to_tensor([[float("inf"), 1.0], [float("inf"), 3.0]]))
    layer._variance.set_value(paddle.to_tensor([-1.0, 1.0]))
    layer.eval()
    with monitor.sampling(1):
        layer(paddle.ones([2, 2]))
    monitor.save(tmp_path / "norms.json")
    diverged, negative = json.loads((tmp_path / "norms.json").read_text())["layers"][0]["samples"]
    assert diverged["after"]["non_finite"] == 2
    assert None in diverged["running_mean"]
    assert negative["running_variance"][0] == -1.0


def test_all_layers_are_found_and_a_shared_layer_is_recorded_once() -> None:
    norm = nn.GroupNorm(1, 4)
    model = nn.Sequential(norm, nn.ReLU(), norm, nn.Sequential(nn.BatchNorm(4)))
    monitor = NormMonitor(model)
    with monitor.sampling(0):
        model(paddle.randn([2, 4, 3, 3]))
    assert [(layer["path"], layer["kind"], len(layer["samples"])) for layer in monitor.record()["layers"]] == [
        ("0", "group", 1),
        ("3.0", "batch", 1),
    ]


def test_a_layer_that_a_hook_cannot_see_is_named() -> None:
    class Keyword(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(1, 4)

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return self.norm(input=x) if "input" in self.norm.forward.__code__.co_varnames else self.norm(x=x)

    model = Keyword()
    monitor = NormMonitor(model)
    with monitor.sampling(0):
        model(paddle.randn([2, 4, 3]))
    assert "by keyword" in monitor.record()["unobserved"]["norm"]


@pytest.mark.filterwarnings("ignore:.*interface for pir graph mode:UserWarning")
def test_static_programs_are_named_not_sampled() -> None:
    model = nn.Sequential(nn.GroupNorm(1, 4))
    monitor = NormMonitor(model)
    program = paddle.jit.to_static(model, full_graph=True)
    with monitor.sampling(0):
        program(paddle.randn([2, 4, 3, 3]))
    assert "static program" in monitor.record()["unobserved"]["0"]


def test_resume_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    paddle.seed(0)
    model = batch_norm_net()
    x = paddle.randn([2, 3, 8, 8])
    first = NormMonitor(model)
    for step in (0, 10, 20):
        with first.sampling(step):
            model(x)
    first.save(tmp_path / "norms.json")

    again = NormMonitor(model)
    again.load(tmp_path / "norms.json")
    assert again.record() == first.record()
    again.load(tmp_path / "norms.json", before=20)
    with again.sampling(15):
        model(x)
    assert [sample["step"] for sample in again.record()["layers"][0]["samples"]] == [0, 10, 15]


@pytest.mark.parametrize(
    ("layer_class", "statistics"), [(fw.BatchNorm2D, "running"), (fw.BatchNorm, "running"), (nn.BatchNorm2D, "batch")]
)
def test_use_global_stats_false_in_eval_means_what_it_means_to_each_layer(layer_class: type, statistics: str) -> None:
    layer = layer_class(4, use_global_stats=False)
    layer.eval()
    monitor = NormMonitor(layer)
    with monitor.sampling(1):
        layer(paddle.randn([2, 4, 3, 3]))
    (recorded,) = monitor.record()["layers"]
    assert recorded["samples"][0]["statistics"] == statistics


@pytest.mark.parametrize(
    "content",
    [
        None,
        "not json",
        "[]",
        '{"format": "flatwater-norms", "version": 99}',
        '{"format": "flatwater-norms", "version": 1, "layers": [{}]}',
        '{"format": "flatwater-norms", "version": 1, "layers": []}',
        '{"format": "flatwater-norms", "version": 1, "layers": [{"path": "norm", "channels": 8, "samples": [3]}]}',
    ],
)
def test_a_record_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "norms.json"
    if content is not None:
        path.write_text(content)
    monitor = NormMonitor(batch_norm_net())
    held = monitor.record()
    with pytest.raises(CheckpointError, match=r"norms\.json") as caught:
        monitor.load(path)
    assert "\n" not in str(caught.value)
    assert monitor.record() == held


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="every=0"):
        NormMonitor(batch_norm_net(), every=0)
    with pytest.raises(InputError, match="no batch, group or instance norm"):
        NormMonitor(nn.Linear(2, 2))
