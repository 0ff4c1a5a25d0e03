"""Planning and arithmetic by themselves, without a framework."""

from __future__ import annotations

import numpy as np
import pytest

from flatwater.errors import StatisticsError
from flatwater.surgery import (
    Affine,
    Call,
    Fold,
    LinearValues,
    NormValues,
    Planner,
    Ports,
    Source,
    Trace,
    affine_after,
    affine_before,
    affine_before_norm,
    affine_of,
    check_statistics,
)


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

    def product(weight: np.ndarray, bias: np.ndarray | None, x: np.ndarray = x) -> np.ndarray:
        flat = weight.reshape(weight.shape[:2])
        parts = [flat.T] if layout == "output-first" else np.split(flat, groups)
        y = np.concatenate([x[:, 3 * g : 3 * g + 3] @ part for g, part in enumerate(parts)], axis=1)
        return y if bias is None else y + bias

    linear = LinearValues(weight_of(matrices), bias, layout, groups)  # type: ignore[arg-type]
    norm = norm_values(2 * groups)
    weight, new_bias = affine_after(linear, affine_of(norm))
    assert weight.dtype == new_bias.dtype == np.float64
    np.testing.assert_allclose(product(weight, new_bias), apply_norm(product(linear.weight, bias), norm), rtol=1e-12)

    norm = norm_values(3 * groups)
    weight, new_bias = affine_before(linear, affine_of(norm))
    expected = product(linear.weight, bias, apply_norm(x, norm))
    np.testing.assert_allclose(product(weight, new_bias), expected, rtol=1e-11)


def test_zero_variance_without_epsilon_is_infinite_and_silent() -> None:
    norm = norm_values(2, epsilon=0.0)._replace(variance=np.zeros(2))
    weight, _ = affine_after(LinearValues(np.ones((2, 2)), None, "output-last"), affine_of(norm))
    assert np.isinf(weight).all()


def test_a_norm_takes_up_the_norm_before_it() -> None:
    x = np.random.default_rng(5).normal(size=(7, 4))
    first, second = norm_values(4), norm_values(4, epsilon=0.5)._replace(variance=np.full(4, 0.3))
    weight, bias = affine_before_norm(second, affine_of(first))
    merged = second._replace(weight=weight, bias=bias)
    np.testing.assert_allclose(apply_norm(x, merged), apply_norm(apply_norm(x, first), second), rtol=1e-12)


@pytest.mark.parametrize(("field", "value"), [("mean", np.nan), ("mean", np.inf), ("variance", -1e-9)])
def test_bad_statistics_name_layer_and_channel(field: str, value: float) -> None:
    norm = norm_values(4)
    getattr(norm, field)[3] = value
    with pytest.raises(StatisticsError, match=rf"running {field} of norm layer 'stem.bn' .* channel 3"):
        check_statistics("stem.bn", norm)


# A call: layer, the layers of which it reads the last run (channels joined), or None where nothing is known.
Run = tuple[str, tuple[str, ...] | None]
CHANNELS = 2


def planner(*runs: Run, even: bool = True, shifted: bool = True) -> Planner:
    """Layers whose name begins with c are convolutions, the others norms; all norms differ."""
    names = dict.fromkeys(name for name, _ in runs)
    last: dict[str, int] = {}
    calls = []
    for name, reads in runs:
        parts = [Source.whole(last[one], CHANNELS) for one in reads] if reads is not None else []
        joined = Source(*map(np.concatenate, zip(*parts, strict=True))) if parts else None
        last[name] = len(calls)
        calls.append(Call(name, joined))
    seen = Trace(
        {name: None for name in names if name.startswith("c")},
        {name: None for name in names if not name.startswith("c")},
        calls,
        {name: Ports(CHANNELS, CHANNELS, even) for name in names},
    )
    width = {call.path: CHANNELS if call.reads is None else len(call.reads.calls) for call in calls}
    values = {
        name: Affine(
            np.full(width.get(name, CHANNELS), 2.0 + index), np.full(width.get(name, CHANNELS), float(shifted))
        )
        for index, name in enumerate(names)
    }
    return Planner(seen, values.__getitem__)


def pairs_of(folds: list[Fold]) -> set[tuple[str, str]]:
    return {(one.path, norm) for fold in folds for one in fold.absorptions for norm in fold.norms}


def test_folds_follow_tensors_and_not_the_order_of_calls() -> None:
    plan = planner(("c1", None), ("c2", None), ("n2", ("c2",)), ("n1", ("c1",)))
    assert pairs_of(plan.after()) == {("c1", "n1"), ("c2", "n2")}
    assert not plan.left


def test_a_norm_over_joined_convolutions_goes_into_both_channel_by_channel() -> None:
    plan = planner(("c1", None), ("c2", None), ("n1", ("c2", "c1")))
    (fold,) = plan.after()
    channels = {one.path: one.channels.tolist() for one in fold.absorptions}
    assert channels == {"c2": [0, 1], "c1": [2, 3]}


def test_a_convolution_that_runs_twice_before_one_norm_is_folded_once() -> None:
    plan = planner(("c1", None), ("n1", ("c1",)), ("c1", None), ("n1", ("c1",)))
    (fold,) = plan.after()
    assert fold.norms == ("n1",)
    assert [one.path for one in fold.absorptions] == ["c1"]


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ((("c1", None), ("n1", None)), "was not written by"),
        ((("c1", None), ("c1", None), ("n1", ("c1",))), "'c1', which runs 2 times"),
        ((("c1", None), ("n1", ("c1",)), ("n1", ("n1",))), "it runs 2 times"),
        ((("c1", None), ("n1", ("c1",)), ("n2", ("c1",))), "another norm layer"),
        ((("c1", None), ("n2", ("c1",)), ("c1", None), ("n1", ("c1",))), "which runs 2 times"),
    ],
)
def test_what_is_in_no_fold_has_a_reason(runs: tuple[Run, ...], reason: str) -> None:
    plan = planner(*runs)
    assert not plan.after()
    assert reason in plan.left["n1"]


def test_obstacles_of_the_layers_themselves_are_passed_on() -> None:
    plan = planner(("c1", None), ("n1", ("c1",)), ("c2", ("n1",)), ("n2", ("c2",)))
    plan.trace.norms["n1"] = "it is magic"
    plan.trace.linears["c2"] = "it is borrowed"
    plan.trace.norms["n3"] = None
    assert not plan.after()
    assert plan.left == {
        "n1": "it is magic",
        "n2": "what it reads comes from 'c2', and it is borrowed",
        "n3": "the example inputs do not reach it",
    }


def test_shared_parameters_go_together_or_not_at_all() -> None:
    plan = planner(("c1", None), ("n1", ("c1",)), ("c2", None), ("n2", ("c2",)))
    plan.trace.shared.update({"c1": {"c2"}, "c2": {"c1"}})
    assert not plan.after()
    assert "shares a parameter with 'c2'" in plan.left["n1"]
    plan = Planner(plan.trace, lambda norm: Affine(np.full(CHANNELS, 3.0), np.ones(CHANNELS)))
    (fold,) = plan.after()
    assert fold.norms == ("n1", "n2")


@pytest.mark.parametrize(("even", "shifted"), [(True, True), (False, False)])
def test_a_norm_goes_into_what_follows_where_its_shift_has_a_place(even: bool, shifted: bool) -> None:
    plan = planner(("n1", None), ("c1", ("n1",)), even=even, shifted=shifted)
    assert not plan.after()
    assert pairs_of(plan.before(["n1"])) == {("c1", "n1")}


def test_a_norm_does_not_go_into_what_pads_with_zeros() -> None:
    plan = planner(("n1", None), ("c1", ("n1",)), even=False)
    plan.after()
    assert not plan.before(["n1"])
    assert "was not written by" in plan.left["n1"]
    assert "'c1', which reads it, pads with zeros" in plan.left["n1"]


def test_a_norm_goes_into_the_norm_behind_it() -> None:
    plan = planner(("n1", None), ("n2", ("n1",)))
    plan.after()
    assert pairs_of(plan.before(["n1", "n2"])) == {("n2", "n1")}


def test_an_activation_stands_between() -> None:
    plan = planner(("n1", None), ("c1", ("n1",)))
    plan.trace.fused["n1"] = "its activation 'relu'"
    plan.after()
    assert not plan.before(["n1"])
    assert "its activation 'relu' stands between it and 'c1'" in plan.left["n1"]
