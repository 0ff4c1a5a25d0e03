"""What each rank does in test_sync.py: every case, then the questions that need a world; results into a folder."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import paddle
from paddle import distributed
from paddle.base import core
from sync_cases import CASES, CHANNELS, STEPS, Case

import flatwater.paddle as fw
from flatwater.paddle.sync.doubling import DoublingTransport, _Link
from flatwater.paddle.sync.transport import DeviceTransport


def run_case(case: Case, rank: int, world: int) -> dict[str, np.ndarray]:
    layer = fw.SyncBatchNorm(CHANNELS, data_format=case.data_format, act=case.act)
    for name, value in case.parameters().items():
        getattr(layer, name).set_value(value)
    mine = case.slices(world)[rank]
    found = {}
    for step in range(STEPS):
        batch = {name: paddle.to_tensor(array[mine]) for name, array in case.batch(world, step).items()}
        dy = batch.pop("dy").astype(case.dtype)
        leaves = {name: tensor.astype(case.dtype) for name, tensor in batch.items()}
        for leaf in leaves.values():
            leaf.stop_gradient = False
        y = layer(*leaves.values())
        paddle.autograd.backward([y], [dy])
        results = {"y": y, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}
        results |= {"dweight": layer.weight.grad, "dbias": layer.bias.grad}
        results |= {"mean": layer._mean, "variance": layer._variance}
        found |= {f"{step} {name}": tensor.astype("float32").numpy() for name, tensor in results.items()}
        layer.clear_gradients()
    return found


def count_collectives(rank: int) -> dict[str, np.ndarray]:
    """What goes over the wire in each direction of one layer, after the first step."""
    sums: list[int] = []
    sent: list[int] = []
    add, swap = DoublingTransport.sum, _Link.swap

    def watched_sum(own: Any, vector: np.ndarray, pause: Any) -> np.ndarray:
        sums.append(vector.size)
        return add(own, vector, pause)

    def watched_swap(own: Any, message: memoryview, into: memoryview, pause: Any) -> None:
        if message:
            sent.append(message.nbytes)
        swap(own, message, into, pause)

    layer = fw.SyncBatchNorm(CHANNELS)
    found = {}
    with (
        mock.patch.object(DoublingTransport, "sum", watched_sum),
        mock.patch.object(_Link, "swap", watched_swap),
        mock.patch.object(core.ProcessGroupGloo, "all_reduce", side_effect=AssertionError("gloo was used")),
    ):
        for _ in range(2):
            x = paddle.randn([2, CHANNELS, 3, 3])
            x.stop_gradient = False
            y = layer(x)
            found["forward"] = np.array(len(sums))
            y.sum().backward()
            found["both"] = np.array(len(sums))
            found |= {"sizes": np.array(sums), "sent": np.array(sent)}
            sums.clear()
            sent.clear()
        layer.eval()
        layer(x)
    found["eval"] = np.array(len(sums))
    return found


def data_parallel(rank: int, world: int) -> dict[str, np.ndarray]:
    """Gradients of a model under DataParallel: two convolutions with a norm behind each, equal shares."""
    model = paddle.DataParallel(make_model(fw.SyncBatchNorm))
    x = paddle.to_tensor(model_batch(world)[2 * rank : 2 * rank + 2])
    model(x).square().mean().backward()
    return {f"gradient {i}": p.grad.numpy() for i, p in enumerate(model.parameters()) if not p.stop_gradient}


def make_model(norm: Any) -> paddle.nn.Layer:
    model = paddle.nn.Sequential(
        paddle.nn.Conv2D(3, 4, 3), norm(4, act="relu"), paddle.nn.Conv2D(4, 6, 3), norm(6), paddle.nn.Flatten(1)
    )
    for index, parameter in enumerate(model.parameters()):
        if not parameter.stop_gradient:
            random = np.random.default_rng(index)
            parameter.set_value(random.uniform(-0.3, 1.0, parameter.shape).astype("float32"))
    return model


def model_batch(world: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((2 * world, 3, 8, 8)).astype("float32")


def pairs(rank: int, world: int) -> dict[str, np.ndarray]:
    """Statistics within groups: the first two ranks by themselves, the others by themselves."""
    layer = fw.SyncBatchNorm(1, process_group=range(2) if rank < 2 else range(2, world))
    layer(paddle.to_tensor([[float(rank)], [float(rank)], [4.0]]))
    return {"group mean": layer._mean.numpy()}


def recomputed(rank: int) -> dict[str, np.ndarray]:
    """A layer used twice, once inside ``recompute``, which runs it again, and its sum, in the backward pass."""
    layer = fw.SyncBatchNorm(3)
    x = paddle.to_tensor(np.random.default_rng(rank).standard_normal((4, 3, 2, 2)).astype("float32"))
    x.stop_gradient = False
    y = distributed.fleet.utils.recompute(lambda t: layer(t).square(), layer(x))
    y.sum().backward()
    return {"twice": x.grad.numpy(), "twice mean": layer._mean.numpy()}


def converted(rank: int, world: int) -> dict[str, np.ndarray]:
    """A model of stock layers, trained by itself, averaged, converted and trained on by the optimiser that it had."""
    model = make_model(StockNorm)
    optimiser = paddle.optimizer.SGD(0.01, parameters=model.parameters())
    x = paddle.to_tensor(model_batch(world)[2 * rank : 2 * rank + 2])
    wrapped = paddle.DataParallel(model)
    found = {}

    def step() -> None:
        wrapped(x).square().mean().backward()
        optimiser.step()
        optimiser.clear_grad()

    step()
    norms = [model[1], model[3]]
    found |= {f"own {i} {key}": getattr(norm, key).numpy() for i, norm in enumerate(norms) for key in MOVING}
    twin = paddle.Model(copy.deepcopy(model))
    twin.network.set_state_dict(model.state_dict())  # paddle.Model has given it those of rank 0
    assert fw.average_statistics(model).changed == ["1", "3"]
    callback = fw.AverageStatistics()
    callback.set_model(twin)
    callback.on_eval_begin()
    for norm, same in ((norms[0], twin.network[1]), (norms[1], twin.network[3])):
        for key in MOVING:
            np.testing.assert_array_equal(getattr(same, key).numpy(), getattr(norm, key).numpy())
    found |= {f"averaged {i} {key}": getattr(norm, key).numpy() for i, norm in enumerate(norms) for key in MOVING}
    fw.convert_sync_batchnorm(model)
    step()
    found |= {f"trained {i}": parameter.numpy() for i, parameter in enumerate(model.parameters())}
    return found


MOVING = ("_mean", "_variance")


def StockNorm(channels: int, act: str | None = None) -> paddle.nn.Layer:  # noqa: N802 - stands for a class
    return paddle.nn.BatchNorm(channels, act=act)


@contextlib.contextmanager
def by_operators() -> Iterator[None]:
    """As on a device for which there are no kernels."""
    with mock.patch("flatwater.paddle.norm.choose_backend", return_value="paddle"):
        yield


def second_derivative() -> dict[str, np.ndarray]:
    """What is said where there is none: Paddle wraps it, as all that is raised in a backward pass."""
    layer = fw.SyncBatchNorm(3)
    x = paddle.randn([4, 3])
    x.stop_gradient = False
    try:
        paddle.grad(layer(x).sum(), x, create_graph=True)
    except Exception as error:
        return {"second derivative": np.array(str(error))}
    return {"second derivative": np.array("no error")}


def device_transport(rank: int, world: int) -> dict[str, np.ndarray]:
    """The transport of devices, over the group of all ranks that Paddle made; here it is gloo."""
    transport = DeviceTransport(distributed.get_group(0), paddle.CPUPlace())
    return {"device sum": transport.sum(np.array([1.0, rank, 1e-9]), lambda: 1.0)}


def main(folder: str) -> None:
    distributed.init_parallel_env()
    rank, world = distributed.get_rank(), distributed.get_world_size()
    results: dict[str, np.ndarray] = {}
    for name, case in CASES.items():
        results |= {f"{name}: {key}": value for key, value in run_case(case, rank, world).items()}
        with by_operators():
            results |= {f"operators {name}: {key}": value for key, value in run_case(case, rank, world).items()}
    results |= second_derivative()
    results |= device_transport(rank, world)
    results |= data_parallel(rank, world) | pairs(rank, world) | recomputed(rank) | converted(rank, world)
    results |= count_collectives(rank)
    np.savez(Path(folder) / f"{rank}.npz", **results)


if __name__ == "__main__":
    main(sys.argv[1])
