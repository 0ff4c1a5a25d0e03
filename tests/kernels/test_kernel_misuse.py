"""Whatever does not fit is an InputError that names it, before any memory is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flatwater import kernels
from flatwater.errors import InputError

N, C, L = 2, 6, 5
SHAPE = (N, C, L)


def tensor(
    shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32, writable: bool = True, **options: Any
) -> kernels.Buffer:
    array = np.zeros(shape, dtype)
    array.flags.writeable = writable
    KEPT_ALIVE.append(array)
    return kernels.Buffer.from_numpy(array, **options)


def vector(size: int = C, dtype: Any = np.float32, writable: bool = True) -> kernels.Vector:
    array = np.ones(size, dtype)
    array.flags.writeable = writable
    KEPT_ALIVE.append(array)
    return kernels.Vector.from_numpy(array)


KEPT_ALIVE: list[np.ndarray] = []


def doubles(size: int = C) -> np.ndarray:
    return np.ones(size)


def statistics(x: kernels.Buffer, **change: Any) -> None:
    kernels.batch_statistics(x, *({"mean": doubles(), "m2": doubles()} | change).values())


def normalize(**change: Any) -> None:
    given = {"x": tensor(), "y": tensor(), "mean": doubles(), "inv_std": doubles()}
    kernels.batch_normalize(**(given | change))


def forward(**change: Any) -> None:
    given = {"x": tensor(), "y": tensor(), "mean": doubles(), "m2": doubles(), "inv_std": doubles(), "epsilon": 1e-5}
    kernels.batch_norm_forward(**(given | change))


def backward(**change: Any) -> None:
    given = {name: tensor() for name in ("dy", "x", "dx", "dresidual")}
    given |= {name: doubles() for name in ("mean", "inv_std", "sum_dz", "sum_dz_xhat")}
    kernels.batch_norm_backward(**(given | change))


def halves_of_backward(**change: Any) -> None:
    given = {name: tensor() for name in ("dy", "x")}
    given |= {name: doubles() for name in ("mean", "inv_std", "sum_dz", "sum_dz_xhat")} | change
    kernels.batch_gradient_sums(**given)
    kernels.batch_input_gradient(dx=tensor(), dresidual=None, count=N * L, **given)


def group_forward(**change: Any) -> None:
    given: dict[str, Any] = {"x": tensor(), "y": tensor(), "groups": 3, "epsilon": 1e-5}
    given |= {name: doubles(N * 3) for name in ("mean", "m2", "inv_std")}
    kernels.group_norm_forward(**(given | change))


def group_backward(**change: Any) -> None:
    given: dict[str, Any] = {name: tensor() for name in ("dy", "x", "dx", "dresidual")}
    given |= {"groups": 3, "mean": doubles(N * 3), "inv_std": doubles(N * 3)}
    given |= {"sum_dz": doubles(), "sum_dz_xhat": doubles()}
    kernels.group_norm_backward(**(given | change))


def running(**change: Any) -> None:
    given: dict[str, Any] = {"running_mean": vector(), "running_variance": vector(), "mean": doubles()}
    given |= {"m2": doubles(), "count": 3, "momentum": 0.9, "unbiased": False}
    kernels.update_running(**(given | change))


def test_all_of_these_calls_are_right_without_the_change() -> None:
    statistics(tensor())
    for call in (normalize, forward, backward, halves_of_backward, group_forward, group_backward, running):
        call()


MISTAKES: list[tuple[str, Callable[[], Any], str]] = [
    ("y of another shape", lambda: forward(y=tensor((N, C, L + 1))), "y"),
    ("y of another dtype", lambda: forward(y=tensor(dtype=np.float64)), "y"),
    ("y of another layout", lambda: forward(y=tensor((N, L, C), channels_last=True)), "channels-last"),
    ("residual of another shape", lambda: normalize(residual=tensor((N, C, 1))), "residual"),
    ("dy transposed", lambda: backward(dy=tensor((C, N, L))), "dy"),
    ("dx of another dtype", lambda: backward(dx=tensor(dtype=np.float16)), "dx"),
    ("dresidual of another shape", lambda: backward(dresidual=tensor((1, C, L))), "dresidual"),
    ("the slope of hardswish from y", lambda: backward(y=tensor(), activation="hardswish"), "hardswish"),
    ("the slope of swish from y, in halves", lambda: halves_of_backward(y=tensor(), activation="swish"), "swish"),
    ("the slope of swish from y, in groups", lambda: group_backward(y=tensor(), activation="swish"), "swish"),
    ("y of another shape, backward", lambda: backward(y=tensor((N, C, 1)), activation="relu"), "y is"),
    ("dy of another shape, in halves", lambda: halves_of_backward(dy=tensor((N, C, 1))), "dy"),
    ("integers", lambda: statistics(tensor(dtype=np.int32)), "int32"),
    ("complex numbers", lambda: forward(x=tensor(dtype=np.complex64)), "complex64"),
    ("weight too short", lambda: forward(weight=vector(C - 1)), "weight"),
    ("bias too long", lambda: normalize(bias=vector(C + 1)), "bias"),
    ("weight of half width", lambda: forward(weight=vector(dtype=np.float16)), "float16"),
    ("mean too short", lambda: statistics(tensor(), mean=doubles(C - 1)), "mean"),
    ("m2 in float32", lambda: statistics(tensor(), m2=np.zeros(C, np.float32)), "m2"),
    ("inv_std of another rank", lambda: normalize(inv_std=np.ones((1, C))), "inv_std"),
    ("mean strided", lambda: forward(mean=np.ones(2 * C)[::2]), "mean"),
    ("sum_dz too short", lambda: backward(sum_dz=doubles(1)), "sum_dz"),
    ("sum_dz_xhat in float32", lambda: halves_of_backward(sum_dz_xhat=np.ones(C, np.float32)), "sum_dz_xhat"),
    ("m2 that cannot be written", lambda: statistics(tensor(), m2=read_only()), "m2"),
    ("sum_dz that cannot be written", lambda: backward(sum_dz=read_only()), "sum_dz"),
    ("y that cannot be written", lambda: forward(y=tensor(writable=False)), "y is read-only"),
    ("dx that cannot be written", lambda: backward(dx=tensor(writable=False)), "dx is read-only"),
    ("dresidual that cannot be written", lambda: group_backward(dresidual=tensor(writable=False)), "dresidual"),
    ("running mean that cannot be written", lambda: running(running_mean=vector(writable=False)), "running_mean"),
    ("running variance that cannot be", lambda: running(running_variance=vector(writable=False)), "running_variance"),
    ("store: read-only", lambda: kernels.store(doubles(), vector(writable=False)), "target is read-only"),
    ("a shape too large", lambda: statistics(tensor()._replace(shape=(2**32, 1, 2**32))), r"no memory holds"),
    ("bytes too many", lambda: statistics(tensor()._replace(shape=(2**31, 1, 2**30))), r"no memory holds"),
    ("no elements, of too many", lambda: statistics(tensor()._replace(shape=(2**64, C, 0))), r"no memory holds"),
    ("no shape", lambda: statistics(tensor()._replace(shape=())), r"shape \(\) must be"),  # type: ignore[arg-type]
    ("a negative shape", lambda: statistics(tensor()._replace(shape=(1, -1, 1))), "none negative"),
    ("unknown activation", lambda: forward(activation="gelu"), "gelu"),
    ("groups that do not divide", lambda: group_forward(groups=4), "groups=4"),
    ("no groups", lambda: group_backward(groups=0), "groups=0"),
    ("group statistics per channel", lambda: group_forward(mean=doubles(C + 1)), "mean"),
    ("group sums per group", lambda: group_backward(sum_dz=doubles(N * 3 + 1)), "sum_dz"),
    ("group statistics without samples", lambda: kernels.group_statistics(tensor(), 3, doubles(3), doubles(3)), "mean"),
    ("running variance too short", lambda: running(running_variance=vector(C - 1)), str(C - 1)),
    ("running dtypes that differ", lambda: running(running_variance=vector(dtype=np.float64)), "dtype"),
    ("batch mean too long", lambda: running(mean=doubles(C + 1)), str(C + 1)),
    ("batch mean in float32", lambda: running(mean=np.ones(C, np.float32)), "float32"),
    ("batch m2 strided", lambda: running(m2=np.ones(2 * C)[::2]), "dense"),
    ("store: too many", lambda: kernels.store(doubles(C + 1), vector()), str(C)),
    ("store: float32", lambda: kernels.store(np.ones(C, np.float32), vector()), "float32"),
    ("a buffer without channels", lambda: tensor((3,)), r"\(3,\)"),
    ("a buffer with gaps", lambda: kernels.Buffer.from_numpy(np.zeros((4, 6, 8))[:, ::2]), "dense"),
    (
        "a buffer between elements",
        lambda: kernels.Buffer.from_numpy(np.zeros(34, np.uint8)[2:].view(np.float32).reshape(2, 4)),
        "begins inside an element",
    ),
    (
        "a dtype that it does not hold",
        lambda: kernels.Buffer.from_numpy(np.zeros((4, 6), np.uint8), dtype="float64"),
        "uint8",
    ),
    ("a vector with gaps", lambda: kernels.Vector.from_numpy(np.zeros(8, np.float32)[::2]), "vector"),
    ("a vector of two dimensions", lambda: kernels.Vector.from_numpy(np.zeros((2, 2), np.float32)), "vector"),
    ("no threads", lambda: kernels.set_threads(0), "0"),
    ("half a thread", lambda: kernels.set_threads(0.5), "0.5"),  # type: ignore[arg-type]
    ("a truth of threads", lambda: kernels.set_threads(True), "True"),
]


def read_only() -> np.ndarray:
    array = np.ones(C)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(("call", "named"), [pytest.param(*rest, id=name) for name, *rest in MISTAKES])
def test_a_mistake_is_named(call: Callable[[], Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        call()
    assert "\n" not in str(caught.value)


# What is filled, what lies in the same memory, and how many elements later that begins.
OVERLAPS: list[tuple[Callable[..., None], str, str, int]] = [
    (normalize, "y", "x", 0),
    (forward, "y", "x", 1),
    (forward, "y", "x", 1 - N * C * L),
    (group_forward, "y", "residual", 7),
    (backward, "dx", "x", 0),
    (backward, "dx", "dy", 0),
    (backward, "dx", "dresidual", -3),
    (group_backward, "dresidual", "dy", 0),
    (group_backward, "dresidual", "residual", 3),
]


@pytest.mark.parametrize(("call", "output", "other", "later"), OVERLAPS)
def test_what_is_filled_lies_apart_from_all_tensors(
    call: Callable[..., None], output: str, other: str, later: int
) -> None:
    both = tensor((3, *SHAPE))._replace(shape=SHAPE)
    first, size = both._replace(pointer=both.pointer + 4 * N * C * L), N * C * L
    with pytest.raises(InputError, match=rf"{output} and {other} share|{other} and {output} share"):
        call(**{output: first, other: first._replace(pointer=first.pointer + 4 * later)})
    for beside in (-size, size):
        call(**{output: first, other: first._replace(pointer=first.pointer + 4 * beside)})


def test_what_is_filled_lies_apart_from_parameters_and_statistics() -> None:
    y, values = tensor(), doubles(2 * C)
    with pytest.raises(InputError, match=r"y and weight share|weight and y share"):
        forward(y=y, weight=kernels.Vector(y.pointer, "float32", C))
    with pytest.raises(InputError, match=r"mean and m2 share|m2 and mean share"):
        statistics(tensor(), mean=values[:C], m2=values[:C])
    with pytest.raises(InputError, match="sum_dz and sum_dz_xhat share"):
        group_backward(sum_dz=values[:C], sum_dz_xhat=values[1 : C + 1])
    with pytest.raises(InputError, match="inv_std and sum_dz share"):
        backward(inv_std=values[:C], sum_dz=values[C - 1 : -1])
    moving = kernels.Vector.from_numpy(values)._replace(size=C)
    with pytest.raises(InputError, match="running_mean and running_variance share"):
        running(running_mean=moving, running_variance=moving._replace(pointer=moving.pointer + 8))
    with pytest.raises(InputError, match=r"running_mean and m2 share|m2 and running_mean share"):
        running(running_mean=moving, running_variance=vector(dtype=np.float64), m2=values[:C])


def test_what_is_only_read_may_share_memory() -> None:
    x, ones = tensor(), doubles()
    backward(x=x, dy=x, residual=x, mean=ones, inv_std=ones, dresidual=None)
    normalize(mean=ones, inv_std=ones)


def test_nothing_overlaps_where_there_is_nothing() -> None:
    empty = tensor()._replace(shape=(0, C, L))
    forward(x=empty, y=empty)


def test_available_dtypes() -> None:
    assert all(kernels.available(dtype) for dtype in ("float32", "float64", "bfloat16", "float16"))
    assert not any(kernels.available(dtype) for dtype in ("int32", "float8_e4m3fn", "complex64", ""))


def test_bfloat16_may_come_as_bits() -> None:
    """Frameworks hand bfloat16 to NumPy as uint16."""
    ones = np.full(SHAPE, 0x3F80, np.uint16)
    y, inv_std = np.zeros_like(ones), np.full(C, 2.0)
    x_buffer, y_buffer = (kernels.Buffer.from_numpy(array, dtype="bfloat16") for array in (ones, y))
    kernels.batch_normalize(x_buffer, y_buffer, mean=np.zeros(C), inv_std=inv_std)
    assert (y == 0x4000).all()
