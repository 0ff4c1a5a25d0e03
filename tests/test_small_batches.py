"""The experiment on small batches: emulated ranks beside separate norms, its data, and its table."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

import click
import numpy as np
import paddle
import pytest
from benchmarks.small_batches import ARMS, Run, accuracy, best_rates, train
from benchmarks.small_batches_data import FOLDER, VALIDATION, Data, batches, load
from benchmarks.small_batches_model import MOMENTA, Network, RankBatchNorm, deployed
from benchmarks.small_batches_plot import command as plot
from benchmarks.small_batches_report import small_batches
from click.testing import CliRunner
from rich.console import Console

import flatwater.paddle as fw

CHANNELS, SHARE = 5, 2


def tensor(*shape: int, seed: int = 0) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"), stop_gradient=False)


@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_emulated_ranks_are_norms_of_their_own(ranks: int) -> None:
    emulated = RankBatchNorm(CHANNELS, ranks)
    apart = [fw.BatchNorm2D(CHANNELS, act="relu") for _ in range(ranks)]
    for name in ("weight", "bias"):
        for layer in (emulated, *apart):
            getattr(layer, name).set_value(tensor(CHANNELS, seed=len(name)))
    for step in range(2):
        x, dy = (tensor(ranks * SHARE, CHANNELS, 4, 3, seed=2 * step + i) for i in (0, 1))
        y = emulated(x)
        paddle.autograd.backward([y], [dy])
        found, x.grad = (y, x.grad.clone(), emulated.weight.grad, emulated.bias.grad), None
        for rank, layer in enumerate(apart):
            share = layer(x[rank::ranks])
            paddle.autograd.backward([share], [dy[rank::ranks]])
            # The same kernel on the same values, summed in the same order.
            np.testing.assert_array_equal(found[0][rank::ranks].numpy(), share.numpy())
        np.testing.assert_array_equal(found[1].numpy(), x.grad.numpy())
        for name, gradient in zip(("weight", "bias"), found[2:], strict=True):
            expected = np.sum([getattr(layer, name).grad.numpy() for layer in apart], 0, dtype="float64")
            # float32 sums over the ranks, in an order that is Paddle's.
            np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5, atol=1e-5)
    means, variances = (np.stack([getattr(layer, name).numpy() for layer in apart]) for name in ("_mean", "_variance"))
    mean, variance = emulated.moving(0.9, averaged=False)
    # Moving statistics are float32 in the layers and float64 in the emulation.
    np.testing.assert_allclose(mean, means[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(variance, variances[0], rtol=1e-5)
    mean, variance = emulated.moving(0.9, averaged=True)
    np.testing.assert_allclose(mean, means.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, variances.mean(0) + means.var(0), rtol=1e-5)


def test_each_momentum_follows_the_same_batches() -> None:
    layer = RankBatchNorm(CHANNELS, 2)
    x = tensor(4, CHANNELS, 3, 3)
    layer(x)
    shares = x.numpy().reshape(2, 2, CHANNELS, 9)
    batch = shares.mean((0, 3)).mean(0)
    for momentum in MOMENTA:
        # float32 sums of 18 values.
        np.testing.assert_allclose(layer.moving(momentum, averaged=True)[0], (1 - momentum) * batch, rtol=1e-5)


def test_what_is_deployed_normalizes_with_the_moving_statistics() -> None:
    network = Network(partial(RankBatchNorm, ranks=2))
    network(tensor(4, 1, 28, 28))
    plain = deployed(network, 0.99)
    for layer, source in zip(plain.layers, network.layers, strict=True):
        if isinstance(source, RankBatchNorm):
            mean, variance = source.moving(0.99, averaged=True)
            np.testing.assert_array_equal(layer._mean.numpy(), mean.astype("float32"))
            np.testing.assert_array_equal(layer._variance.numpy(), variance.astype("float32"))
    for one, other in zip(plain.layers.sublayers(), network.layers.sublayers(), strict=True):
        if not isinstance(other, RankBatchNorm):
            for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
                np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
    assert not plain.training


def small(count: int = 256) -> Data:
    """Images of two classes that a child could tell: stripes across, and stripes down."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, count)
    across = np.broadcast_to(np.sin(np.arange(28.0))[:, None], (28, 28))
    stripes = np.where(labels[:, None, None, None], across, across.T)
    images = (2 * stripes + random.standard_normal((count, 1, 28, 28))).astype("float32")
    split = images, labels
    return Data(split, split, split)


def test_a_training_learns_what_is_easy() -> None:
    run = train(small(), "batch 2", seed=0, rate=0.1, epochs=4)
    assert run.key == ("batch 2", 0, 0.1, 4)
    assert set(run.test) == {f"m = {m}" for m in MOMENTA} | {"m = 0.9, rank 0's own", "recalibrated"}
    assert run.test["recalibrated"] > 0.9


def test_a_training_can_be_repeated() -> None:
    first, again = (train(small(64), "group", seed=0, rate=0.1, epochs=2) for _ in range(2))
    assert set(first.test) == {""}
    assert first == again


def test_accuracy_counts_what_is_right() -> None:
    class Constant(paddle.nn.Layer):
        def forward(self, images: paddle.Tensor) -> paddle.Tensor:
            return paddle.to_tensor([[0.0, 1.0]]).tile([images.shape[0], 1])

    images = np.zeros((1200, 1, 2, 2), "float32")
    assert accuracy(Constant(), (images, np.arange(1200) % 4)) == 0.25


def test_batches_are_the_same_for_each_norm_and_others_in_each_epoch() -> None:
    split = small().train
    first, again = ([*batches(split, 32, 0, 0)] for _ in range(2))
    assert [images.shape for images, _ in first] == [(32, 1, 28, 28)] * 8
    assert sorted(np.concatenate([labels for _, labels in first])) == sorted(split[1])
    for (images, labels), (same, also) in zip(first, again, strict=True):
        np.testing.assert_array_equal(images, same)
        np.testing.assert_array_equal(labels, also)
    assert not np.array_equal(first[0][1], next(batches(split, 32, 0, 1))[1])


def test_the_data_are_read_or_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"train-images.*dataset-fashion-mnist"):
        load(tmp_path)
    random = np.random.default_rng(0)
    for name, count in (("train", VALIDATION + 3), ("t10k", 2)):
        for kind, shape in (("images-idx3", (count, 2, 2)), ("labels-idx1", (count,))):
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
            content = header + random.integers(0, 256, shape, np.uint8).tobytes()
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content, 1))
    data = load(tmp_path)
    assert [len(split[0]) for split in (data.train, data.validation, data.test)] == [3, VALIDATION, 2]
    assert data.test[0].shape == (2, 1, 2, 2)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(click.ClickException, match="cut off"):
        load(tmp_path)
    assert FOLDER.is_absolute()


def row(arm: str, seed: int, rate: float, validation: float) -> Run:
    test = {"": 0.9} if arm == "group" else {"m = 0.9": 0.8 + seed / 100, "m = 0.99": 0.7, "m = 0.5": 0.6}
    if arm != "group":
        test |= {"m = 0.9, rank 0's own": 0.5, "recalibrated": 0.85}
    return Run(arm, seed, rate, 1, validation, test)


def test_rates_and_the_table() -> None:
    runs = [row("batch 2", 0, 0.1, 0.7), row("batch 2", 0, 0.3, 0.8), row("group", 0, 0.1, 0.9)]
    assert best_rates(runs) == {"batch 2": 0.3, "group": 0.1}
    runs += [row("batch 2", 1, 0.1, 0.8), row("batch 2", 1, 0.3, 0.6)]
    assert best_rates(runs) == {"batch 2": 0.1, "group": 0.1}
    assert ARMS["batch 2"] == 16
    console = Console(width=100)
    finals = [row(arm, seed, 0.1, 0.5).__dict__ for arm in ("batch 2", "batch 32", "group") for seed in (0, 1, 2)]
    with console.capture() as captured:
        rates = {"batch 2": 0.1, "batch 32": 0.1, "group": 0.1}
        others = [row("batch 2", seed, 0.3, 0.4).__dict__ for seed in (0, 1, 2)]
        for table in small_batches({"batch": 32, "proofs": [], "runs": finals + others, "rates": rates, "missing": 3}):
            console.print(table)
    shown = captured.get()
    assert "BatchNorm: 2 of 32" in shown
    assert "SyncBatchNorm: all 32" in shown
    assert "80.0–82.0" in shown
    assert "3 trainings to come" in shown
    assert "…" not in shown
    assert "mean of 3 seeds" in shown


def test_the_plot_is_drawn_of_all_trainings_only(tmp_path: Path) -> None:
    runs = [row(arm, seed, 0.1, 0.5).__dict__ for arm in ARMS for seed in (0, 1, 2)]
    source, target = tmp_path / "measured.json", tmp_path / "plot.png"
    for parts, status, message in (
        ({"kernels": {}}, 2, "measure the part small-batches first"),
        ({"small-batches": {"runs": runs, "missing": 4}}, 2, "lacks 4 trainings"),
        ({"small-batches": {"runs": runs, "rates": dict.fromkeys(ARMS, 0.1), "missing": 0}}, 0, ""),
    ):
        source.write_text(json.dumps({"parts": parts}))
        result = CliRunner().invoke(plot, [str(source), str(target)], env={"COLUMNS": "200"})
        assert result.exit_code == status, result.output
        assert message in result.output
        assert target.exists() == (status == 0)
