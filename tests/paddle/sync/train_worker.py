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
from flatwater.errors import SingleValueError
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
        layer.train()
        with by_operators():
            layer(x).sum().backward()
        found["operators' sizes"] = np.array(sums)
    return found


def data_parallel(rank: int, world: int) -> dict[str, np.ndarray]:
    """Gradients of a model under DataParallel: two convolutions with a norm behind each, equal shares."""
    model = paddle.DataParallel(make_model(fw.SyncBatchNorm))
    x = paddle.to_tensor(model_batch(world)[2 * rank : 2 * rank + 2])
    model(x).square().mean().backward()
    return {f"gradient {i}": p.grad.numpy() for i, p in enumerate(model.parameters()) if not p.stop_gradient}


FAR = Case(data_format="NHWC", act="leaky_relu", residual=True, mean=1e4, shares=(5, 0, 3, 2))


def data_parallel_of_unequal_shares(rank: int, world: int) -> dict[str, np.ndarray]:
    """Gradients of one layer under DataParallel, of losses that are sums: the averages of dγ and dβ times the ranks."""
    norm = fw.SyncBatchNorm(CHANNELS, data_format=FAR.data_format, act=FAR.act)
    for name, value in FAR.parameters().items():
        getattr(norm, name).set_value(value)
    wrapped = paddle.DataParallel(norm)
    mine = FAR.slices(world)[rank]
    batch = {name: paddle.to_tensor(array[mine]) for name, array in FAR.batch(world, 0).items()}
    batch["x"].stop_gradient = False
    (wrapped(batch["x"], batch["residual"]) * batch["dy"]).sum().backward()
    gradients = {"dx": batch["x"].grad, "dweight": norm.weight.grad * world, "dbias": norm.bias.grad * world}
    return {f"unequal {name}": gradient.numpy() for name, gradient in gradients.items()}


def captured(rank: int) -> dict[str, np.ndarray]:
    """Two steps of a model as it is, and of the same under ``to_static(full_graph=False)``."""
    x = paddle.to_tensor(np.random.default_rng(rank).standard_normal((2, 3, 8, 8)).astype("float32"))
    found = {}
    for name in ("eager", "captured"):
        model = make_model(fw.SyncBatchNorm)
        called = paddle.jit.to_static(model, full_graph=False) if name == "captured" else model
        for _ in range(2):
            called(x).square().mean().backward()
        found |= {f"{name} mean": model[3]._mean.numpy(), f"{name} gradient": model[0].weight.grad.numpy()}
    return found


def single_values(rank: int) -> dict[str, np.ndarray]:
    """One value per channel, on rank 0 alone."""
    x = paddle.full([1 if rank == 0 else 0, 2], -3.0)
    layer = fw.SyncBatchNorm(2, act="relu", single_value="passthrough")
    found = {"single y": layer(x).numpy(), "single mean": layer._mean.numpy()}
    try:
        fw.SyncBatchNorm(2)(x)
    except SingleValueError as error:
        return found | {"single error": np.array(str(error))}
    return found | {"single error": np.array("no error")}


def in_bfloat16(rank: int) -> dict[str, np.ndarray]:
    """Moving statistics that are bfloat16: averaged, and followed as on a device."""
    plain = fw.BatchNorm1D(2).to(dtype="bfloat16")
    plain._mean.set_value(paddle.full([2], float(rank), "bfloat16"))
    fw.average_statistics(plain)
    synchronised = fw.SyncBatchNorm(2).to(dtype="bfloat16")
    synchronised._mean.set_value(paddle.full([2], 3.0, "bfloat16"))
    with by_operators():
        synchronised(paddle.to_tensor([[4.0, 2.0], [6.0, 2.0]]).astype("bfloat16"))
    return {
        "bfloat16 averaged": plain._mean.astype("float32").numpy(),
        "bfloat16 moving": synchronised._mean.astype("float32").numpy(),
    }


class Numbers(paddle.io.Dataset):
    """Samples that differ from rank to rank, so that moving statistics do."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int64]:
        return np.full(3, float(index**2), "float32"), np.int64(index % 2)


class Look(paddle.callbacks.Callback):
    """What an evaluation finds."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[np.ndarray] = []

    def on_eval_begin(self, logs: Any = None) -> None:
        self.means.append(self.model.network[0]._mean.numpy())


def fitted(folder: str) -> dict[str, np.ndarray]:
    """Stock batch norm in ``paddle.Model.fit``; rank 0 saves after each epoch and at the end."""
    network = paddle.nn.Sequential(paddle.nn.BatchNorm1D(3), paddle.nn.Linear(3, 2))
    model = paddle.Model(network)
    optimiser = paddle.optimizer.SGD(0.1, parameters=network.parameters())
    model.prepare(optimiser, paddle.nn.CrossEntropyLoss())
    look = Look()
    callbacks = [fw.AverageStatistics(), look]
    where = Path(folder) / f"fit{distributed.get_world_size()}"
    model.fit(Numbers(), Numbers(), batch_size=2, epochs=2, verbose=0, callbacks=callbacks, save_dir=str(where))
    found = {"fit evaluated": np.stack(look.means), "fit end": network[0]._mean.numpy()}
    if distributed.get_rank() == 0:
        saved = [paddle.load(str(where / f"{name}.pdparams"))["0._mean"].numpy() for name in ("0", "1", "final")]
        found["fit saved"] = np.stack(saved)
    return found


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
    results |= data_parallel_of_unequal_shares(rank, world) | captured(rank) | single_values(rank) | in_bfloat16(rank)
    results |= fitted(folder) | count_collectives(rank)
    np.savez(Path(folder) / f"{rank}.npz", **results)


if __name__ == "__main__":
    main(sys.argv[1])
