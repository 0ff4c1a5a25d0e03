"""Cases for the kernels, how to run them, and how far they may be from the oracle.

Every array lies between guards in a larger allocation, possibly off every alignment, and every output
starts as NaN: a kernel that writes too much, too little, or assumes alignment is found by any test.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from flatwater import kernels, reference
from flatwater.spec import Activation

DTYPES = ("float32", "float64", "bfloat16", "float16")
EPSILON = 1e-5

# Samples, channels, inner: around the widths of vectors (4 to 16), prime numbers, small planes, no plane,
# one channel, one sample, many channels, and one channel longer than what the kernels take at once (4096).
SHAPES = ((2, 3, 5), (7, 1, 13), (1, 17, 31), (3, 5, 49), (33, 19, 1), (2, 520, 4), (2, 16, 64), (3, 2, 4999))

KINKS = {"none": (), "swish": (), "relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}

_GUARD = 64


class Tolerance(NamedTuple):
    """How far a result may be from the oracle's: rounding · |result| + arithmetic · scale of what was added."""

    rounding: float
    arithmetic: float


# rounding: half a unit in the last place, as the result is stored once (and 1% for the second order).
# arithmetic: half-width elements are computed in float32, whose unit roundoff is 6e-8. A result takes about ten
# operations, and the statistics behind it come from sums of up to 512 terms that run in float32: 4e-6 is 64
# roundings. float64 has the same 64 roundings, with sums that are as long in it as the tensor: 1e-13 each way.
TOLERANCES = {
    "float32": Tolerance(2.0**-24 * 1.01, 4e-6),
    "float64": Tolerance(2.0**-53 * 1.01, 1e-12),
    "bfloat16": Tolerance(2.0**-8 * 1.01, 4e-6),
    "float16": Tolerance(2.0**-11 * 1.01, 4e-6),
}


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def parameter_dtype(name: str) -> str:
    return "float64" if name == "float64" else "float32"


@dataclass(frozen=True)
class Case:
    """One normalization: tensors (N, C, L), or (N, L, C) with ``channels_last``, in the storage dtype."""

    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray | None
    weight: np.ndarray | None
    bias: np.ndarray | None
    activation: Activation
    channels_last: bool
    dtype: str
    groups: int | None = None  # None: batch norm

    @property
    def axis(self) -> int:
        return -1 if self.channels_last else 1

    @property
    def channels(self) -> int:
        return self.x.shape[self.axis]

    @property
    def sets(self) -> int:
        """How many statistics there are."""
        return self.channels if self.groups is None else self.x.shape[0] * self.groups

    def buffer(self, array: np.ndarray) -> kernels.Buffer:
        return kernels.Buffer.from_numpy(array, channels_last=self.channels_last)

    def given(self) -> dict[str, Any]:
        """The arguments that every kernel with a second half takes."""
        return {
            "weight": None if self.weight is None else kernels.Vector.from_numpy(self.weight),
            "bias": None if self.bias is None else kernels.Vector.from_numpy(self.bias),
            "residual": None if self.residual is None else self.buffer(self.residual),
            "activation": self.activation,
        }

    def oracle(self) -> dict[str, Any]:
        """The arguments that the oracle takes."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "residual": self.residual,
            "activation": self.activation,
            "epsilon": EPSILON,
            "axis": self.axis,
        }


def guarded(shape: Iterable[int], dtype: Any, offset: int = 0) -> np.ndarray:
    """NaN (in memory with guards around it), ``offset`` elements after a 64-byte boundary."""
    shape, dtype = tuple(shape), np.dtype(dtype)
    size = int(np.prod(shape))
    memory = np.full(size + 3 * _GUARD + offset, np.nan, dtype)
    start = _GUARD + (-(memory.ctypes.data // dtype.itemsize) % (64 // dtype.itemsize)) + offset
    return memory[start : start + size].reshape(shape)


def place(values: np.ndarray, dtype: Any, offset: int = 0) -> np.ndarray:
    array = guarded(values.shape, dtype, offset)
    array[...] = values
    return array


def assert_guards(*arrays: np.ndarray | None) -> None:
    for array in arrays:
        if array is not None and array.size:
            memory: Any = array.base
            while memory.base is not None:
                memory = memory.base
            outside = np.isnan(memory.astype(np.float64)).sum() - np.isnan(array.astype(np.float64)).sum()
            assert outside == memory.size - array.size, "written outside of the output"


def make_case(
    shape: tuple[int, int, int],
    dtype: str = "float32",
    *,
    channels_last: bool = False,
    activation: Activation = "none",
    residual: bool = False,
    affine: bool = True,
    groups: int | None = None,
    offset: int = 0,
    seed: int = 0,
    center: float = 0.0,
) -> Case:
    """A random case; ``center`` is the mean of x in deviations.

    Where z lies within rounding of a kink of the activation, dy is 0: on which side the kernel sees it is
    left to its rounding. What happens exactly at a kink has a test of its own.
    """
    generator = np.random.default_rng(seed)
    samples, channels, inner = shape
    memory = (samples, inner, channels) if channels_last else shape
    store, parameters = numpy_dtype(dtype), parameter_dtype(dtype)

    def random(mean: float = 0.0, deviation: float = 1.0) -> np.ndarray:
        return place(mean + deviation * generator.standard_normal(memory), store, offset)

    case = Case(
        x=random(center, 2.0 if center == 0 else 1.0),
        dy=random(),
        residual=random() if residual else None,
        weight=generator.uniform(0.5, 3, channels).astype(parameters) if affine else None,
        bias=generator.standard_normal(channels).astype(parameters) if affine else None,
        activation=activation,
        channels_last=channels_last,
        dtype=dtype,
        groups=groups,
    )
    z = oracle_forward(replace(case, activation="none")).y
    reach = 1e-6 if dtype == "float64" else 1e-3
    for kink in KINKS[activation]:
        case.dy[np.abs(z - kink) < reach] = 0
    return case


# --- The oracle's answers -----------------------------------------------------------------------------


def oracle_forward(case: Case, statistics: reference.Statistics | None = None) -> reference.Forward:
    if case.groups is None:
        return reference.batch_norm(case.x, statistics=statistics, **case.oracle())
    return reference.group_norm(case.x, case.groups, **case.oracle())


def oracle_gradients(case: Case, statistics: reference.Statistics | None = None) -> reference.Gradients:
    if case.groups is None:
        return reference.batch_norm_gradients(case.dy, case.x, statistics=statistics, **case.oracle())
    return reference.group_norm_gradients(case.dy, case.x, case.groups, **case.oracle())


# --- The kernels' answers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """The statistics arrays of a kernel call, NaN until it fills them."""

    mean: np.ndarray
    m2: np.ndarray
    inv_std: np.ndarray

    @classmethod
    def empty(cls, size: int) -> Moments:
        return cls(*(guarded((size,), np.float64) for _ in range(3)))

    @classmethod
    def of(cls, statistics: reference.Statistics) -> Moments:
        """Those of the oracle, in the order in which the kernels keep them."""
        mean, variance = (np.ascontiguousarray(value).reshape(-1) for value in (statistics.mean, statistics.variance))
        return cls(mean, variance * statistics.count, 1 / np.sqrt(variance + EPSILON))

    def normalizing(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "inv_std": self.inv_std}

    def all(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "m2": self.m2, "inv_std": self.inv_std}


@dataclass(frozen=True)
class Sums:
    """The sums of a backward call, NaN until it fills them."""

    dz: np.ndarray
    dz_xhat: np.ndarray

    @classmethod
    def empty(cls, channels: int) -> Sums:
        return cls(guarded((channels,), np.float64), guarded((channels,), np.float64))

    def given(self) -> dict[str, np.ndarray]:
        return {"sum_dz": self.dz, "sum_dz_xhat": self.dz_xhat}


def like(array: np.ndarray, offset: int = 0) -> np.ndarray:
    return guarded(array.shape, array.dtype, offset)


def forward(case: Case, offset: int = 0) -> tuple[np.ndarray, Moments]:
    y, moments = like(case.x, offset), Moments.empty(case.sets)
    given = case.given() | moments.all() | {"epsilon": EPSILON}
    if case.groups is None:
        count = kernels.batch_norm_forward(case.buffer(case.x), case.buffer(y), **given)
        assert count == case.x.size // max(case.channels, 1)
    else:
        kernels.group_norm_forward(case.buffer(case.x), case.buffer(y), groups=case.groups, **given)
    assert_guards(y, moments.mean, moments.m2, moments.inv_std)
    return y, moments


@dataclass(frozen=True)
class Backward:
    """What a backward call filled; dx and dresidual None where they were not asked for."""

    dx: np.ndarray | None
    dresidual: np.ndarray | None
    sums: Sums


def backward(
    case: Case,
    moments: Moments,
    *,
    frozen: bool = False,
    want_dx: bool = True,
    want_dresidual: bool | None = None,
    y: np.ndarray | None = None,
    offset: int = 0,
    apart: int = 0,
) -> Backward:
    """With ``y``, the activation's slope is taken from it and the residual is not handed over.

    ``dresidual`` lies ``apart`` elements further behind a 64-byte boundary than ``dx``.
    """
    want_dresidual = case.residual is not None if want_dresidual is None else want_dresidual
    dx = like(case.x, offset) if want_dx else None
    dresidual = like(case.x, offset + apart) if want_dresidual else None
    sums = Sums.empty(case.channels)
    tensors = [None if array is None else case.buffer(array) for array in (case.dy, case.x, dx, dresidual)]
    given = case.given() | moments.normalizing() | sums.given()
    if y is not None:
        given |= {"residual": None, "y": case.buffer(y)}
    if case.groups is None:
        kernels.batch_norm_backward(*tensors, frozen=frozen, **given)
    else:
        kernels.group_norm_backward(*tensors, groups=case.groups, **given)
    assert_guards(dx, dresidual, sums.dz, sums.dz_xhat)
    return Backward(dx, dresidual, sums)


# --- How they are compared ------------------------------------------------------------------------------


def per_channel(case: Case, values: np.ndarray, reduce: Any = np.max) -> np.ndarray:
    """``values`` reduced over all but the channel, shaped to broadcast against the tensors."""
    axes = (0, 1) if case.channels_last else (0, 2)
    return reduce(values, axis=axes, keepdims=True, initial=0.0)


def assert_near(actual: np.ndarray, expected: np.ndarray, scale: np.ndarray | float, case: Case, what: str) -> None:
    """|actual - expected| within the tolerance of the dtype, plus half the smallest number that it has."""
    tolerance = TOLERANCES[case.dtype]
    actual = actual.astype(np.float64)
    allowed = tolerance.rounding * np.abs(expected) + tolerance.arithmetic * scale
    allowed = allowed + float(ml_dtypes.finfo(numpy_dtype(case.dtype)).smallest_subnormal)
    excess = np.abs(actual - expected) / allowed
    assert not np.isnan(actual).any(), f"{what}: {np.isnan(actual).sum()} elements are NaN or were never written"
    assert excess.max(initial=0.0) <= 1, f"{what}: an element is off by {excess.max()} times what {case.dtype} allows"


def check_forward(case: Case, offset: int = 0) -> None:
    """One forward call against the oracle: output and statistics."""
    y, moments = forward(case, offset)
    expected, statistics = oracle_forward(case)
    expected_moments = Moments.of(statistics)
    arithmetic = TOLERANCES[case.dtype].arithmetic

    deviation = np.sqrt(expected_moments.m2 / max(statistics.count, 1))
    mean_error = np.abs(moments.mean - expected_moments.mean)
    assert (mean_error <= arithmetic * deviation + 2.0**-51 * np.abs(expected_moments.mean)).all(), "mean"
    np.testing.assert_allclose(moments.m2, expected_moments.m2, rtol=arithmetic, atol=1e-30, err_msg="m2")
    np.testing.assert_allclose(moments.inv_std, expected_moments.inv_std, rtol=arithmetic, err_msg="inv_std")
    assert_near(y, expected, terms(case), case, "y")


def terms(case: Case, statistics: reference.Statistics | None = None) -> np.ndarray:
    """The size of what z is the sum of, per channel."""
    plain = oracle_forward(replace(case, activation="none", residual=None, bias=None), statistics).y
    # A mean of less than a sixteenth of a deviation is subtracted from x·γ·inv_std, not from x.
    gamma = 1.0 if case.weight is None else np.abs(case.weight.astype(np.float64))
    size = np.abs(plain) + (gamma if case.channels_last else np.asarray(gamma)[..., None]) / 16
    if case.bias is not None:
        bias = np.abs(case.bias.astype(np.float64))
        size = size + (bias if case.channels_last else bias[:, None])
    if case.residual is not None:
        size = size + np.abs(case.residual.astype(np.float64))
    return per_channel(case, size)


def check_backward(case: Case, *, frozen: bool = False, offset: int = 0) -> None:
    """One backward call against the oracle, with the statistics of the oracle."""
    statistics = oracle_forward(case).statistics
    moments = Moments.of(statistics)
    check_gradients(case, backward(case, moments, frozen=frozen, offset=offset), statistics, frozen=frozen)


def check_gradients(case: Case, actual: Backward, statistics: reference.Statistics, *, frozen: bool) -> None:
    expected = oracle_gradients(case, statistics if frozen else None)
    x_hat = oracle_forward(replace(case, activation="none", residual=None, weight=None, bias=None), statistics).y
    inv_std = Moments.of(statistics).inv_std
    dz = np.abs(expected.residual)
    if case.activation in ("hardswish", "swish"):
        # act' depends on z, smoothly, and may be nearly 0: then the error of z is all that there is.
        dz = np.abs(case.dy.astype(np.float64)) * (1 + terms(case, statistics))
    largest_x_hat = per_channel(case, np.abs(x_hat))

    total = per_channel(case, dz, np.sum)
    assert_near(actual.sums.dz, expected.bias, total.reshape(-1), sums_as(case), "sum_dz")
    size = (total * (1 + largest_x_hat)).reshape(-1)
    assert_near(actual.sums.dz_xhat, expected.weight, size, sums_as(case), "sum_dz_xhat")
    if actual.dresidual is not None:
        assert_near(actual.dresidual, expected.residual, per_channel(case, dz), case, "dresidual")
    if actual.dx is not None:
        weight = 1.0 if case.weight is None else np.abs(case.weight.astype(np.float64)).max(initial=0.0)
        # Groups mix channels, so their largest |γ| and |dz| count for all.
        largest = per_channel(case, dz) if case.groups is None else dz.max(initial=0.0)
        spread = per_channel(case, broadcast_sets(case, inv_std))
        assert_near(actual.dx, expected.x, weight * spread * largest * (1 + largest_x_hat), case, "dx")


def check_rounding() -> None:
    """Every number that bfloat16 has, and to each side all halfway to the next and just beside; NaN stays NaN."""
    x = place(np.arange(2**16, dtype=np.uint16).view(numpy_dtype("bfloat16"))[None, None], numpy_dtype("bfloat16"))
    y = like(x)
    with np.errstate(invalid="ignore"):
        half = np.ldexp(1.0, np.frexp(x.astype(np.float64))[1] - 9)  # of a unit in the last of x's eight places
        half = np.where(np.isfinite(x), half, 0)
    for share in (0, 1, -1, 1 + 2.0**-7, 1 - 2.0**-7, -1 - 2.0**-7):
        residual = place(half * share, x.dtype)
        kernels.batch_normalize(
            kernels.Buffer.from_numpy(x),
            kernels.Buffer.from_numpy(y),
            mean=np.zeros(1),
            inv_std=np.ones(1),
            weight=None,
            bias=None,
            residual=kernels.Buffer.from_numpy(residual),
            activation="none",
        )
        with np.errstate(over="ignore", invalid="ignore"):
            expected = (x.astype(np.float32) + np.float32(0) + residual.astype(np.float32)).astype(x.dtype)
            number = ~np.isnan(x)
            assert np.array_equal(~np.isnan(y), number)
        assert same_bits(y[number], expected[number]), share


def sums_as(case: Case) -> Case:
    """Sums are stored in float64 whatever the elements are, so only the arithmetic's error counts."""
    return replace(case, dtype="float64") if case.dtype == "float64" else replace(case, dtype="float32")


def broadcast_sets(case: Case, values: np.ndarray) -> np.ndarray:
    """One value per statistic, spread over the tensor."""
    if case.groups is None:
        spread = values if case.channels_last else values[:, None]
    else:
        by_channel = np.repeat(values.reshape(case.x.shape[0], case.groups), case.channels // case.groups, axis=1)
        spread = by_channel[:, None, :] if case.channels_last else by_channel[:, :, None]
    return np.broadcast_to(spread, case.x.shape)


def same_bits(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.tobytes() == other.tobytes()
