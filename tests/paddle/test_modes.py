"""Where a layer runs: captured graphs, recompute, accumulation, second gradients, several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from norm_cases import assert_close, randomise, tensor_of
from paddle.distributed.fleet.utils import recompute

import flatwater.paddle as fw

# Everything runs in float64, where Paddle's operators hold ε as float32: 1e-5 is off by 2.5e-13, beside variances
# of which the smallest are near 1e-3, and gradients multiply what that leaves a few times over.
TOLERANCE = 1e-7


class Net(paddle.nn.Layer):
    """Each kind of norm once, with an activation and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = fw.ConvBNLayer(3, 8)
        self.block = fw.ConvBNLayer(8, 8, act="hardswish")
        self.norm = fw.GroupNorm(4, 8, act="swish")
        self.head = fw.BatchNorm(8)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.stem(x)
        x = self.norm(self.block(x, x))
        return self.head(x.mean([2, 3]))


def make_net() -> Net:
    paddle.seed(0)
    net = Net()
    for layer in net.sublayers():
        if hasattr(layer, "_act"):
            randomise(layer)
    net.to(dtype="float64")
    return net


def batch(seed: int = 0) -> paddle.Tensor:
    return tensor_of(np.random.default_rng(seed).standard_normal((6, 3, 8, 8)))


def results(net: paddle.nn.Layer, call=None) -> dict[str, np.ndarray]:
    """Output, gradients and statistics of one training step."""
    x = batch()
    y = (call or net)(x)
    (y * paddle.arange(y.size, dtype="float64").reshape(y.shape)).sum().backward()
    found = {"y": y.numpy(), "x.grad": x.grad.numpy()}
    found |= {f"{name}.grad": p.grad.numpy() for name, p in net.named_parameters() if p.grad is not None}
    return found | {name: value.numpy().copy() for name, value in net.state_dict().items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, tolerance, name)


@pytest.mark.parametrize("full_graph", [True, False])
def test_to_static_trains_the_same(full_graph: bool) -> None:
    expected = results(make_net())
    net = make_net()
    assert any(name.endswith("bn.weight.grad") for name in expected)
    assert_same(results(net, paddle.jit.to_static(net.forward, full_graph=full_graph)), expected)


@pytest.mark.parametrize("full_graph", [True, False])
def test_to_static_evaluates_the_same(full_graph: bool) -> None:
    net = make_net()
    net.eval()
    expected = net(batch()).numpy()
    assert_close(paddle.jit.to_static(net.forward, full_graph=full_graph)(batch()).numpy(), expected, TOLERANCE, "y")


def test_paddles_operators_take_over_with_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that the kernels do not cover."""
    expected = results(make_net())
    monkeypatch.setattr("flatwater.paddle.norm.choose_backend", lambda *_, **__: "paddle")
    net = make_net()
    assert fw.backend_of(net.head, batch()) == "paddle"
    assert_same(results(net), expected)


@pytest.mark.parametrize("backend", ["flatwater", "paddle"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recompute_moves_the_statistics_once(backend, use_reentrant, monkeypatch) -> None:
    if backend == "paddle":
        monkeypatch.setattr("flatwater.paddle.norm.choose_backend", lambda *_, **__: "paddle")
    expected = results(make_net())
    net = make_net()

    def call(x: paddle.Tensor) -> paddle.Tensor:
        x = recompute(net.stem, x, use_reentrant=use_reentrant)
        return net.head(recompute(lambda z: net.norm(net.block(z, z)), x, use_reentrant=use_reentrant).mean([2, 3]))

    assert_same(results(net, call), expected)


def test_no_grad_still_tracks_statistics() -> None:
    net = make_net()
    before = net.head._mean.numpy().copy()
    with paddle.no_grad():
        y = net(batch())
    assert y.stop_gradient
    assert not np.array_equal(net.head._mean.numpy(), before)


def test_gradients_accumulate() -> None:
    once, net = make_net(), make_net()
    first = results(once)
    for _ in range(2):
        net.set_state_dict(make_net().state_dict())
        x = batch()
        y = net(x)
        (y * paddle.arange(y.size, dtype="float64").reshape(y.shape)).sum().backward()
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad.numpy(), 2 * first[f"{name}.grad"], TOLERANCE, name)


@pytest.mark.parametrize("kind", ["batch", "frozen", "group"])
def test_gradients_of_gradients(kind: str) -> None:
    """Against central differences of the first gradient, in float64: truncation 1e-6, rounding 1e-10."""
    layer = {
        "batch": lambda: fw.BatchNorm2D(4, act="swish"),
        "frozen": lambda: fw.BatchNorm2D(4, act="swish", use_global_stats=True),
        "group": lambda: fw.GroupNorm(2, 4, act="swish"),
    }[kind]()
    layer.to(dtype="float64")
    randomise(layer)
    random = np.random.default_rng(1)
    x, dy, direction = (random.standard_normal((2, 4, 3, 3)) for _ in range(3))

    def gradient(values: np.ndarray, *, create_graph: bool = False) -> tuple[paddle.Tensor, paddle.Tensor]:
        leaf = tensor_of(values)
        y = (layer(leaf * 1.0) * tensor_of(dy, stop_gradient=True)).sum()
        return paddle.grad([y], [leaf], create_graph=create_graph)[0], leaf

    first, leaf = gradient(x, create_graph=True)
    assert_close(first.numpy(), gradient(x)[0].numpy(), 1e-12, "first gradient")
    (second,) = paddle.grad([(first * tensor_of(direction, stop_gradient=True)).sum()], [leaf])
    # d/dx <g(x), v> is the Hessian times v, and the Hessian is symmetric.
    h = 1e-5
    numeric = (gradient(x + h * direction)[0] - gradient(x - h * direction)[0]).numpy() / (2 * h)
    assert_close(second.numpy(), numeric, 1e-6, "second gradient")


@pytest.mark.parametrize("wanted", ["x", "weight", "earlier weight", "residual", "all"])
def test_paddle_grad_may_ask_for_any_part(wanted: str) -> None:
    first, second = fw.BatchNorm2D(4), fw.BatchNorm2D(4, act="relu")
    x, residual = (tensor_of(np.random.default_rng(i).standard_normal((2, 4, 3, 3)).astype("float32")) for i in (0, 1))

    def loss() -> paddle.Tensor:
        return second(first(x * 1.0), residual * 1.0).square().sum()

    tensors = {"x": x, "weight": second.weight, "earlier weight": first.weight, "residual": residual}
    loss().backward()
    expected = {name: tensor.grad.numpy() for name, tensor in tensors.items()}
    asked = tensors if wanted == "all" else {wanted: tensors[wanted]}
    for name, gradient in zip(asked, paddle.grad([loss()], list(asked.values())), strict=True):
        np.testing.assert_array_equal(gradient.numpy(), expected[name])


def test_saving_and_loading_between_stock_and_ours(tmp_path: Path) -> None:
    stock = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3), paddle.nn.BatchNorm2D(4))
    ours = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3), fw.BatchNorm2D(4, act="relu"))
    randomise(stock)
    paddle.save(stock.state_dict(), str(tmp_path / "stock.pdparams"))
    missing, unexpected = ours.set_state_dict(paddle.load(str(tmp_path / "stock.pdparams")))
    assert not missing
    assert not unexpected
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        np.testing.assert_array_equal(ours.state_dict()[name].numpy(), value.numpy())


WORKER = """
import numpy as np, paddle, paddle.distributed as dist, flatwater.paddle as fw
dist.init_parallel_env()
rank = dist.get_rank()
paddle.seed(0)
net = paddle.DataParallel(paddle.nn.Sequential(fw.ConvBNLayer(3, 4), paddle.nn.Flatten(), paddle.nn.Linear(256, 2)))
data = np.random.default_rng(rank).standard_normal((4, 3, 8, 8)).astype("float32")
net(paddle.to_tensor(data)).sum().backward()
gradient = net._layers[0].bn.weight.grad
gathered = []
dist.all_gather(gathered, gradient)
assert np.array_equal(gathered[0].numpy(), gathered[1].numpy()), "gradients were not averaged over the processes"
assert float(gradient.abs().sum()) > 0
assert not np.array_equal(net._layers[0].bn._mean.numpy(), np.zeros(4)), "statistics did not move"
print("rank", rank, "fine")
"""


def test_data_parallel_over_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(tmp_path / "log"), str(script)]
    environment = os.environ | {"PADDLE_DISTRI_BACKEND": "gloo", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    logs = "\n".join(path.read_text(errors="replace") for path in (tmp_path / "log").glob("workerlog.*"))
    assert result.returncode == 0, logs[-3000:] + result.stderr[-1000:]
    assert "rank 0 fine" in logs + result.stdout
