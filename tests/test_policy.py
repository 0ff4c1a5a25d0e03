"""The policy by itself: its grammar, which rule wins, and errors that name the line. No framework."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatwater.advice import choose_norm
from flatwater.errors import ConfigError, InputError
from flatwater.lined import parse_yaml, place_of
from flatwater.policy import Chosen, NormInfo, Policy, Rule

NORMS = {
    "stem.bn": NormInfo("batch_norm", "BatchNorm2D"),
    "neck.0.bn": NormInfo("batch_norm", "BatchNorm"),
    "neck.1.gn": NormInfo("group_norm", "GroupNorm"),
    "head.norm": NormInfo("sync_batch_norm", "SyncBatchNorm"),
}
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "norm": st.sampled_from(["batch_norm", "sync_batch_norm", "auto"]),
    "momentum": st.floats(0, 1),
    "epsilon": st.floats(1e-9, 1),
    "gamma": st.floats(-4, 4),
    "beta": st.floats(-4, 4),
    "weight_decay": st.floats(0, 1),
    "learning_rate_factor": st.floats(0, 10),
    "keep_float32": st.booleans(),
}


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    """Rules that match something, each with some of the fields."""
    rule: dict[str, Any] = {}
    if draw(st.booleans()):
        rule["match"] = draw(st.lists(st.sampled_from(["*", "stem.*", "neck.*", "*bn", "head.norm"]), min_size=1))
    for name in draw(st.sets(st.sampled_from(sorted(VALUES)), min_size=1)):
        rule[name] = draw(VALUES[name])
    return rule


@settings(max_examples=60, deadline=None)
@given(st.lists(rules(), min_size=1, max_size=6))
def test_the_last_rule_that_sets_a_field_wins_and_the_others_stay(policy: list[dict[str, Any]]) -> None:
    resolved = Policy.of(policy).resolve(NORMS)
    for path in NORMS:
        expected: dict[str, Chosen] = {}
        for number, rule in enumerate(policy):
            if any(fnmatchcase(path, pattern) for pattern in rule.get("match", ["*"])):
                expected |= {name: Chosen(value, number) for name, value in rule.items() if name != "match"}
        assert resolved.get(path, {}) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(rules(), min_size=1, max_size=4))
def test_what_a_policy_writes_down_it_reads_back(policy: list[dict[str, Any]]) -> None:
    import yaml

    first = Policy.of(policy)
    assert Policy.parse(yaml.safe_dump(first.model_dump(mode="json"))) == first


def test_kinds_are_ours_or_names_of_classes() -> None:
    def matching(*kinds: str) -> set[str]:
        return set(Policy.of([{"kind": kinds, "momentum": 0.5}]).resolve(NORMS))

    assert matching("batch_norm") == {"stem.bn", "neck.0.bn"}
    assert matching("BatchNorm") == {"neck.0.bn"}
    assert matching("*BatchNorm*") == {"stem.bn", "neck.0.bn", "head.norm"}
    assert matching("group_norm", "SyncBatchNorm") == {"neck.1.gn", "head.norm"}


def test_path_and_kind_must_both_match() -> None:
    resolved = Policy.of([{"match": "neck.*", "kind": "batch_norm", "momentum": 0.5}]).resolve(NORMS)
    assert resolved == {"neck.0.bn": {"momentum": Chosen(0.5, 0)}}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("norm_type: bn", "norm: batch_norm"),
        ("norm_type: sync_bn", "norm: sync_batch_norm"),
        ("norm_type: gn", "norm: group_norm"),
        ("freeze_norm: true", "freeze: both"),
        ("freeze_norm: false", "freeze: none"),
        ("norm_decay: 0.", "weight_decay: false"),
        ("norm_decay: 1e-4", "weight_decay: 0.0001"),  # without a dot, YAML 1.1 reads 1e-4 as text
        ("freeze: {what: both}", "freeze: both"),
    ],
)
def test_paddledetections_names_are_understood(theirs: str, ours: str) -> None:
    assert Policy.parse(f"- {theirs}") == Policy.parse(f"- {ours}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- norm: gn\n  gruops: 4", r"line 2: unknown key rules\.0\.gruops; did you mean groups\?"),
        ("- norm: gn\n- momentum: 0.5\n  norm: bn\n  momentum: 0.6", r"line 4: 'momentum' is given in line 2 already"),
        ("- norm: gn\n  norm_type: bn", "line 2: .*norm and norm_type are two names"),
        ("- freeze: both\n  freeze_norm: true", "line 2: .*freeze and freeze_norm are two names"),
        ("- match: a\n  epsilon: 0", r"line 2: rules\.0\.epsilon=0: input should be greater than 0"),
        ("- match: a\n  norm_decay: -1", r"line 2: rules\.0\.norm_decay=-1"),
        ("- match: a\n  momentum: yes", "line 2: .*yes is no number"),
        ("- match: a", r"line 1: .*sets nothing; give it one of norm, groups"),
        ("- match: []\n  beta: 0", "line 1: .*an empty list"),
        ("- beta: .inf", "line 1: .*finite number"),
        ("- keep_float32: 1", "line 1: .*valid boolean"),
        ("- norm: bn\n  groups: 4", "line 2: .*groups=4 contradicts norm=batch_norm"),
        ("- norm: gn\n  momentum: 0.5", "line 2: .*momentum contradicts norm=group_norm"),
        ("- norm_type: gn\n  freeze: statistics", "line 2: .*freeze=statistics contradicts norm=group_norm"),
        ("- norm: frozen\n  freeze_norm: false", "line 2: .*freeze=none contradicts norm=frozen"),
        ("- freeze: both\n  zero_init_residual: true", "line 2: .*would stay 0"),
        ("- freeze:\n    what: both\n    from_step: 1\n    from_epoch: 2", "line 4: .*from_step and from_epoch"),
        ("- freeze:\n    what: none\n    from_step: 1", "line 2: .*not frozen from any time on"),
        ("- freeze: {what: all}", r"line 1: rules\.0\.freeze\.what='all'"),
        ("[]", "at least 1 item"),
        ("- 3", "valid dictionary"),
        ("3", "holds a int, not a list of rules"),
        ("rulez: []", "line 1: unknown key rulez; did you mean rules"),
        ("- norm: [", "line 1: is not YAML"),
    ],
)
def test_errors_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Policy.parse(text, "norms.yaml")
    assert str(caught.value).startswith("norms.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- beta: 0\n- match: [stem.*, nekc.*]\n  beta: 1", r"line 2: match='nekc\.\*' matches none of the 4 .*'neck"),
        ("- kind: LayerNorm\n  beta: 1", "line 1: kind='LayerNorm' matches none.*BatchNorm2D"),
        ("- beta: 1\n  match: stem.*\n  kind: group_norm", "line 1: no norm layer matches both"),
    ],
)
def test_patterns_that_match_nothing_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Policy.parse(text, "norms.yaml").resolve(NORMS)


def test_a_policy_from_code_numbers_its_rules() -> None:
    policy = Policy(rules=(Rule(momentum=0.5), Rule(match="nowhere", beta=1)))
    with pytest.raises(ConfigError, match=r"^rule 2: match='nowhere'"):
        policy.resolve(NORMS)


def test_a_policy_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "norms.yaml"
    file.write_text("rules:\n- norm_type: gn\n  groups: 4\n", encoding="utf-8")
    policy = Policy.load(file)
    assert policy.rules == (Rule(norm="group_norm", groups=4),)
    assert policy.place(0, "norm") == f"{file}, line 2"
    assert policy.place(0, "groups") == f"{file}, line 3"
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        Policy.load(tmp_path / "absent.yaml")


def test_yaml_merge_keys_keep_their_lines_and_are_no_repetition() -> None:
    document = parse_yaml("base: &base\n  a: 1\n  b: 2\nother:\n  <<: *base\n  b: 3\n", "f.yaml")
    assert document == {"base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}}
    assert place_of(document, ("other", "b")) == "f.yaml, line 6"
    assert place_of(document, ("other", "a")) == "f.yaml, line 5"
    assert place_of({"no": {"file": 1}}, ("no", "file")) is None
    document.override("base", 3)
    assert place_of(document, ("base",)) is None


@pytest.mark.parametrize(
    ("samples", "world_size", "positions", "kind"),
    [
        (16, 1, None, "batch_norm"),
        (16, 8, 1, "batch_norm"),
        (15, 1, None, "group_norm"),
        (2, 8, None, "sync_batch_norm"),
        (2, 8, 1, "sync_batch_norm"),
        (1, 8, 1, "group_norm"),
        (1, 2, 49, "sync_batch_norm"),
    ],
)
def test_the_rule_of_thumb(samples: int, world_size: int, positions: int | None, kind: str) -> None:
    choice = choose_norm(samples, world_size, positions=positions)
    assert choice.kind == kind
    assert str(samples) in choice.reason


def test_no_samples_are_no_batch() -> None:
    with pytest.raises(InputError, match="samples=0 must be at least 1"):
        choose_norm(0)
