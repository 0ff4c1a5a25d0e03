"""One rank of a world in which models are recalibrated or frozen; results go to FOLDER/rank.npz or to the output."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

import flatwater.paddle as fw
from flatwater.errors import FlatwaterError, SurgeryError


def batches_of(rank: int) -> list[np.ndarray]:
    """Two batches for rank 0, three for rank 1, none for any other: of unequal size and mean."""
    generator = np.random.default_rng(rank)
    sizes = {0: (8, 5), 1: (8, 3, 2)}.get(rank, ())
    return [
        generator.normal(3.0 * rank + index, 1.0 + rank, (size, 3)).astype("float32")
        for index, size in enumerate(sizes)
    ]


def model_of(kind: type[nn.Layer]) -> nn.Layer:
    return nn.Sequential(kind(3), nn.ReLU(), kind(3))


def recalibrate(folder: Path, rank: int) -> None:
    results = {}
    for name, in_order in (("by_batch", False), ("in_order", True)):
        model = model_of(fw.BatchNorm1D)
        report = fw.recalibrate(model, batches_of(rank), in_order=in_order, timeout=30)
        results |= {f"{name}.{key}": tensor.numpy() for key, tensor in model.state_dict().items()}
        results[f"{name}.counts"] = np.array([change.count for change in report.layers])
        results[f"{name}.passes"] = np.array(report.passes)
    # A synchronised layer normalizes by the global batch: here every rank brings as many.
    model = model_of(fw.SyncBatchNorm)
    fw.recalibrate(model, [batches_of(rank % 2)[0]], timeout=30)
    results |= {f"synchronised.{key}": tensor.numpy() for key, tensor in model.state_dict().items()}
    np.savez(folder / f"{rank}.npz", **results)


def fail(folder: Path, rank: int) -> None:
    model, batches = model_of(fw.BatchNorm1D), batches_of(rank)
    if rank == 1:
        batches[2][0, 1] = np.nan
    before = [tensor.numpy().tobytes() for tensor in model.state_dict().values()]
    try:
        fw.recalibrate(model, batches, timeout=30)
    except FlatwaterError as error:
        print(f"rank {rank}: {type(error).__name__}: {error}")
    assert [tensor.numpy().tobytes() for tensor in model.state_dict().values()] == before
    fw.recalibrate(model, batches_of(rank), timeout=30)  # and afterwards the ranks are together again
    print(f"rank {rank}: recalibrated")


def freeze(folder: Path, rank: int) -> None:
    """Freeze before wrapping, and behind a reducer that can, and cannot, do without some gradients."""
    for when in ("before wrapping", "after wrapping"):
        model = nn.Sequential(nn.Linear(3, 3), fw.BatchNorm1D(3), nn.Linear(3, 3), fw.BatchNorm1D(3))
        if when == "before wrapping":
            fw.freeze(model, pattern="1")
        wrapped = paddle.DataParallel(model, find_unused_parameters=when == "after wrapping")
        if when == "after wrapping":
            train(wrapped, rank)
            fw.freeze(wrapped, pattern="_layers.1")
        train(wrapped, rank)
        assert fw.frozen_report(wrapped).ok, fw.frozen_report(wrapped)
        if when == "after wrapping":
            fw.thaw(wrapped)
            train(wrapped, rank)
        else:
            with pytest.raises(SurgeryError, match="thaw the model that it wraps"):
                fw.thaw(wrapped)
            assert model[1].weight.stop_gradient
        ranks: list[paddle.Tensor] = []
        paddle.distributed.all_gather(ranks, model[0].weight)
        assert np.array_equal(ranks[0].numpy(), ranks[1].numpy())
    model = nn.Sequential(nn.Linear(3, 3), fw.BatchNorm1D(3), fw.BatchNorm1D(3))
    model[2].bias.stop_gradient = True  # somebody's own wish, which thawing leaves as it is
    fw.freeze(model, pattern="1", weight=True, bias=False, statistics=False)
    wrapped = paddle.DataParallel(model, find_unused_parameters=True)
    fw.freeze(wrapped)
    fw.thaw(wrapped, pattern="_layers.2")
    assert not model[2].weight.stop_gradient
    assert model[2].bias.stop_gradient
    with pytest.raises(SurgeryError, match="thaw the model that it wraps"):
        fw.thaw(wrapped)  # γ of the first was frozen before, β behind the reducer
    assert model[1].weight.stop_gradient
    strict = paddle.DataParallel(nn.Sequential(fw.BatchNorm1D(3)))
    with pytest.raises(SurgeryError, match="freeze before wrapping"):
        fw.freeze(strict)
    assert not strict._layers[0].weight.stop_gradient
    fw.freeze(strict, affine=False)
    print(f"rank {rank}: frozen")


def train(model: nn.Layer, rank: int) -> None:
    optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters(), weight_decay=0.1)
    for batch in batches_of(rank)[:2]:
        (model(paddle.to_tensor(batch)) ** 2).mean().backward()
        optimizer.step()
        optimizer.clear_grad()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    paddle.distributed.init_parallel_env()
    tasks = {"recalibrate": recalibrate, "fail": fail, "freeze": freeze}
    tasks[sys.argv[1]](Path(sys.argv[2]), paddle.distributed.get_rank())
