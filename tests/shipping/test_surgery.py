"""Pairing and arithmetic by themselves, without a framework."""

from __future__ import annotations

import numpy as np
import pytest

from flatwater.errors import StatisticsError
from flatwater.surgery import Call, LinearValues, NormValues, Trace, check_statistics, fold_values, pair_up


def norm_values(channels: int, epsilon: float = 1e-3) -> NormValues:
    generator = np.random.default_rng(3)
    return NormValues(
        generator.normal(size=channels),
        generator.uniform(0.1, 3, channels),
        generator.normal(size=channels),
        generator.normal(size=channels),
        epsilon,
    )


def apply_norm(y: np.ndarray, norm: NormValues) -> np.ndarray:
    """Channels last."""
    return (y - norm.mean) / np.sqrt(norm.variance + norm.epsilon) * norm.weight + norm.bias


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", ["output-first", "output-last", "transposed"])
def test_folded_values_compute_what_both_layers_computed(layout: str, with_bias: bool) -> None:
    """On kernels of size one, where every convolution is a matrix product within each group."""
    generator = np.random.default_rng(4)
    groups = 2 if layout == "transposed" else 1
    matrices = [generator.normal(size=(3, 2)) for _ in range(groups)]  # 3 in, 2 out, of each group
    bias = generator.normal(size=2 * groups) if with_bias else None
    x = generator.normal(size=(5, 3 * groups))

    def weight_of(parts: list[np.ndarray]) -> np.ndarray:
        if layout == "output-last":
            return parts[0]
        if layout == "output-first":
            return parts[0].T[:, :, None, None]
        return np.concatenate(parts)[:, :, None, None]

    def product(weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        flat = weight.reshape(weight.shape[:2])
        parts = [flat.T] if layout == "output-first" else np.split(flat, groups)
        y = np.concatenate([x[:, 3 * g : 3 * g + 3] @ part for g, part in enumerate(parts)], axis=1)
        return y if bias is None else y + bias

    norm = norm_values(2 * groups)
    linear = LinearValues(weight_of(matrices), bias, layout, groups)  # type: ignore[arg-type]
    weight, new_bias = fold_values(linear, norm)

    assert weight.dtype == new_bias.dtype == np.float64
    np.testing.assert_allclose(product(weight, new_bias), apply_norm(product(linear.weight, bias), norm), rtol=1e-12)


def test_zero_variance_without_epsilon_is_infinite_and_silent() -> None:
    norm = norm_values(2, epsilon=0.0)._replace(variance=np.zeros(2))
    weight, _ = fold_values(LinearValues(np.ones((2, 2)), None, "output-last"), norm)
    assert np.isinf(weight).all()


@pytest.mark.parametrize(("field", "value"), [("mean", np.nan), ("mean", np.inf), ("variance", -1e-9)])
def test_bad_statistics_name_layer_and_channel(field: str, value: float) -> None:
    norm = norm_values(4)
    getattr(norm, field)[3] = value
    with pytest.raises(StatisticsError, match=rf"running {field} of norm layer 'stem.bn' .* channel 3"):
        check_statistics("stem.bn", norm)


def trace(*calls: tuple[str, int | None, int | None], axis: int = 1) -> Trace:
    """Layers whose name begins with c are convolutions, the others norms."""
    names = dict.fromkeys(name for name, _, _ in calls)
    return Trace(
        {name: None for name in names if name.startswith("c")},
        {name: None for name in names if not name.startswith("c")},
        [Call(name, reads, writes, axis) for name, reads, writes in calls],
    )


def test_pairs_follow_tensors_and_not_the_order_of_calls() -> None:
    pairs, left = pair_up(trace(("c1", 0, 1), ("c2", 0, 2), ("n2", 2, 3), ("n1", 1, 4)))
    assert set(pairs) == {("c1", "n1"), ("c2", "n2")}
    assert not left


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ((("c1", 0, 1), ("n1", 9, 2)), "was not written by"),
        ((("c1", 0, 1), ("n1", None, 2)), "was not written by"),
        ((("c1", 0, 1), ("c1", 5, 6), ("n1", 1, 2)), "'c1', which runs 2 times"),
        ((("c1", 0, 1), ("n1", 1, 2), ("n1", 2, 3)), "it runs 2 times"),
        ((("c1", 0, 1), ("n1", 1, 2), ("n2", 1, 3)), "another norm layer"),
    ],
)
def test_what_is_no_pair_has_a_reason(calls: tuple[tuple[str, int | None, int | None], ...], reason: str) -> None:
    pairs, left = pair_up(trace(*calls))
    assert not pairs
    assert reason in left["n1"]


def test_obstacles_of_the_layers_themselves_are_passed_on() -> None:
    seen = trace(("c1", 0, 1), ("n1", 1, 2), ("c2", 2, 3), ("n2", 3, 4))
    seen.norms["n1"] = "it is magic"
    seen.linears["c2"] = "it is borrowed"
    seen.norms["n3"] = None
    pairs, left = pair_up(seen)
    assert not pairs
    assert left == {
        "n1": "it is magic",
        "n2": "what it reads comes from 'c2', and it is borrowed",
        "n3": "the example inputs do not reach it",
    }


def test_channels_must_be_on_the_same_axis() -> None:
    seen = trace(("c1", 0, 1), ("n1", 1, 2))
    seen.calls[1] = seen.calls[1]._replace(channel_axis=2)
    assert "axis 1, the norm on another" in pair_up(seen)[1]["n1"]
