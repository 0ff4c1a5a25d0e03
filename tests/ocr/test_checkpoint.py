"""Checkpoints: going on from one is the same, bit for bit, as never having stopped; a bad one changes nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flatwater.paddle as fw
from flatwater.errors import CheckpointError
from flatwater.recipes.ocr import checkpoint
from flatwater.recipes.ocr.checkpoint import load, restore, save, snapshot

Run = tuple[paddle.nn.Layer, paddle.optimizer.Optimizer]


class Network(paddle.nn.Layer):
    """``late`` takes part only when asked to; until then it has no gradient and no accumulators."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = paddle.nn.Conv2D(1, width, 3)
        self.norm = fw.BatchNorm2D(width)
        self.head = paddle.nn.Linear(width, 2)
        self.late = paddle.nn.Linear(2, 2)

    def forward(self, x: paddle.Tensor, late: bool = False) -> paddle.Tensor:
        y = self.head(paddle.tanh(self.norm(self.conv(x))).mean([2, 3]))
        return self.late(y) if late else y


def schedule() -> paddle.optimizer.lr.LRScheduler:
    cosine = paddle.optimizer.lr.CosineAnnealingDecay(0.1, T_max=10)
    return paddle.optimizer.lr.LinearWarmup(cosine, warmup_steps=3, start_lr=0.01, end_lr=0.1)


OPTIMIZERS: dict[str, Callable[[Any], paddle.optimizer.Optimizer]] = {
    "momentum": lambda parameters: paddle.optimizer.Momentum(
        0.1, 0.9, parameters, use_nesterov=True, weight_decay=1e-2, grad_clip=paddle.nn.ClipGradByGlobalNorm(0.1)
    ),
    "momentum, scheduled": lambda parameters: paddle.optimizer.Momentum(schedule(), 0.9, parameters),
    "adamw": lambda parameters: paddle.optimizer.AdamW(0.01, parameters=parameters, weight_decay=0.1),
    "adamw, scheduled": lambda parameters: paddle.optimizer.AdamW(schedule(), parameters=parameters),
    "named": lambda parameters: paddle.optimizer.Momentum(0.1, 0.9, parameters, name="mine"),
}


def build(kind: str = "momentum", seed: int = 0, width: int = 4) -> Run:
    paddle.seed(seed)
    model = Network(width)
    return model, OPTIMIZERS[kind](model.parameters())


def train(run: Run, steps: range, late: bool = False) -> None:
    model, optimizer = run
    for step in steps:
        x = np.random.default_rng(step).normal(size=(3, 1, 6, 6)).astype(np.float32)
        model(paddle.to_tensor(x), late).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()
        rate = optimizer._learning_rate
        if isinstance(rate, paddle.optimizer.lr.LRScheduler):
            rate.step()


def content(run: Run) -> dict[str, bytes]:
    """Every bit that training depends on."""
    taken = snapshot(*run, {})
    arrays = {**taken.model, **taken.optimizer}
    scheduler = json.dumps(taken.scheduler).encode()
    return {name: array.tobytes() for name, array in arrays.items()} | {"scheduler": scheduler}


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, Run]:
    """A run after three steps, and its checkpoint."""
    run = build()
    train(run, range(3))
    save(tmp_path / "last.ckpt", snapshot(*run, {"step": 3}))
    return tmp_path / "last.ckpt", run


@pytest.mark.parametrize("late", [False, True], ids=["", "a layer joins after it"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_going_on_is_as_never_having_stopped(tmp_path: Path, kind: str, late: bool) -> None:
    whole = build(kind)
    train(whole, range(3))
    train(whole, range(3, 7), late)

    first = build(kind)
    train(first, range(3))
    save(tmp_path / "last.ckpt", snapshot(*first, {"step": 3}))

    second = build(kind, seed=99)
    assert content(second) != content(first)
    assert not {p.name for p in second[0].parameters()} & {p.name for p in first[0].parameters()}
    read = load(tmp_path / "last.ckpt")
    restore(read, *second)
    assert content(second) == content(first)
    train(second, range(read.progress["step"], 7), late)
    assert content(second) == content(whole)


def test_going_on_in_another_process(tmp_path: Path) -> None:
    whole = build("adamw, scheduled")
    train(whole, range(3))
    save(tmp_path / "last.ckpt", snapshot(*whole, {}))
    train(whole, range(3, 6))
    code = (
        "import sys; from pathlib import Path; import paddle\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "paddle.nn.Conv2D(1, 1, 1)  # so that names count differently\n"
        "import test_checkpoint as t\n"
        f"folder = Path({str(tmp_path)!r}); run = t.build('adamw, scheduled', seed=5)\n"
        "t.restore(t.load(folder / 'last.ckpt'), *run); t.train(run, range(3, 6))\n"
        "t.save(folder / 'end.ckpt', t.snapshot(*run, {}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    end = build("adamw, scheduled", seed=7)
    restore(load(tmp_path / "end.ckpt"), *end)
    assert content(end) == content(whole)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_before_the_first_step(tmp_path: Path, kind: str) -> None:
    start, other = build(kind), build(kind, seed=1)
    save(tmp_path / "last.ckpt", snapshot(*start, {}))
    restore(load(tmp_path / "last.ckpt"), *other)
    assert content(other) == content(start)
    train(start, range(2))
    train(other, range(2))
    assert content(other) == content(start)


def test_into_an_optimizer_that_has_stepped(stopped: tuple[Path, Run]) -> None:
    path, run = stopped
    other = build(seed=1)
    train(other, range(10, 12))
    restore(load(path), *other)
    assert content(other) == content(run)


def test_unusual_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = build()
    bits = np.array([0x7FC12345, 0xFF800000, 0x80000000, 0x00000001], np.uint32)  # NaN, -inf, -0, denormal
    model.norm.bias.set_value(bits.view(np.float32))
    save(tmp_path / "last.ckpt", snapshot(model, optimizer, {}))
    other = build(seed=1)
    restore(load(tmp_path / "last.ckpt"), *other)
    np.testing.assert_array_equal(other[0].norm.bias.numpy().view(np.uint32), bits)


def test_a_snapshot_does_not_follow_training(stopped: tuple[Path, Run]) -> None:
    _, run = stopped
    before = content(run)
    taken = snapshot(*run, {})
    train(run, range(3, 5))
    assert content(run) != before
    assert {name: a.tobytes() for name, a in {**taken.model, **taken.optimizer}.items()}.items() <= before.items()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(progress=st.dictionaries(st.text(), plain, max_size=4))
def test_progress_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, progress: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    save(path, checkpoint.Checkpoint({}, {}, "Momentum", None, progress))
    assert load(path).progress == progress


def test_progress_that_cannot_be_written_leaves_the_last_one(stopped: tuple[Path, Run]) -> None:
    path, run = stopped
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"last\.ckpt: cannot hold this progress \(.*ndarray"):
        save(path, snapshot(*run, {"losses": np.zeros(3)}))
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_last_one(stopped: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    path, run = stopped
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(path, snapshot(*run, {"step": 4}))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert "train from the start" in str(caught.value)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "last.ckpt"
    save(path, snapshot(*build(), {"step": 0}))
    return path


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_file_cut_off_anywhere_is_refused(good: Path, data: st.DataObject) -> None:
    content = good.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 90))
    path = good.with_name("cut.ckpt")
    path.write_bytes(content[:cut])
    refused(path, "is damaged or cut off")


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_file_changed_anywhere_is_refused(good: Path, data: st.DataObject) -> None:
    content = bytearray(good.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 90))
    content[place] ^= data.draw(st.integers(1, 255))
    path = good.with_name("changed.ckpt")
    path.write_bytes(content)
    refused(path, "is damaged or cut off|is not a checkpoint of Flatwater|has version")


def wrapped(payload: bytes, version: int = 1) -> bytes:
    digest = hashlib.sha256(payload).hexdigest()
    return f"flatwater checkpoint {version}\n{digest}\n".encode() + payload


def archive(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


class Mischief:
    """Unpickling one would end the process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "is not a checkpoint of Flatwater"),
        ("平水".encode(), "is not a checkpoint of Flatwater"),
        (
            wrapped(b"x", version=2),
            "has version 2 of the format, and this Flatwater reads version 1",
        ),
        (wrapped(b""), "is damaged"),
        (wrapped(b"PK\x03\x04"), "is damaged"),
        (wrapped(archive(x=np.zeros(2))), "is damaged"),
        (wrapped(archive(description=np.frombuffer(b"[1]", np.uint8))), "is damaged"),
        (wrapped(archive(description=np.frombuffer(b'{"progress": {}}', np.uint8))), "is damaged"),
        (wrapped(archive(description=np.array([Mischief()], object))), "is damaged"),
    ],
    ids=["zip", "text", "version", "empty", "no zip", "no description", "list", "incomplete", "pickle"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    refused(path, message)


def test_no_file_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere" / "last.ckpt", "there is no checkpoint that can be read")
    refused(tmp_path, "there is no checkpoint that can be read")


def test_another_model_or_optimizer_is_refused_and_stays_as_it_was(stopped: tuple[Path, Run]) -> None:
    path, _ = stopped
    deeper = Network()
    deeper.extra = paddle.nn.Linear(1, 1)
    amsgrad = Network()
    cases: list[tuple[Run, str, str]] = [
        (build(width=5), "momentum", r"another model: conv\.bias is float32\[4\] there and float32\[5\] here"),
        ((deeper, OPTIMIZERS["momentum"](deeper.parameters())), "momentum", r"extra\.bias is not in it there"),
        (build("adamw"), "momentum", "of Momentum without a learning rate schedule, not of AdamW without"),
        (build("momentum, scheduled"), "momentum", "without a learning rate schedule, not of Momentum with a"),
        (build("named"), "momentum", "another optimizer: conv.bias/mine_velocity is not in it there"),
        (
            (amsgrad, paddle.optimizer.AdamW(0.01, parameters=amsgrad.parameters(), weight_decay=0.1, amsgrad=True)),
            "adamw",
            "another optimizer: conv.bias/moment2_max is not in it there",
        ),
    ]
    for run, saved, message in cases:
        other = build(saved)
        train(other, range(2))
        save(path, snapshot(*other, {}))
        before = {name: tensor.numpy().tobytes() for name, tensor in run[0].state_dict().items()}
        with pytest.raises(CheckpointError, match=message) as caught:
            restore(load(path), *run)
        assert "\n" not in str(caught.value)
        assert "resume with the settings of its run" in str(caught.value)
        assert {name: tensor.numpy().tobytes() for name, tensor in run[0].state_dict().items()} == before


def test_an_optimizer_of_another_model_is_refused() -> None:
    run = build()
    train(run, range(1))
    with pytest.raises(CheckpointError, match="velocity_0 is of no parameter of the model"):
        snapshot(Network(), run[1], {})


def test_names_that_begin_alike_are_told_apart() -> None:
    model = paddle.nn.Layer()
    for name in ("w", "w_velocity_0", "w_velocity"):
        model.add_parameter(name, model.create_parameter([1], attr=paddle.ParamAttr(name=name)))
    optimizer = paddle.optimizer.Momentum(0.1, 0.9, model.parameters())
    sum(((i + 1) * p for i, p in enumerate(model.parameters())), paddle.zeros([1])).backward()
    optimizer.step()
    taken = snapshot(model, optimizer, {})
    velocities = {name: array.item() for name, array in taken.optimizer.items()}
    assert velocities == {"w/velocity": 1.0, "w_velocity_0/velocity": 2.0, "w_velocity/velocity": 3.0}
