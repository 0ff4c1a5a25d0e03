"""``norm: auto`` in a policy: what it looks at, and what the other fields of a policy make of its choice."""

from __future__ import annotations

import numpy as np
import pytest
from networks import example, state_of, three_norms
from paddle import nn

import flatwater.paddle as fw
from flatwater.errors import ConfigError, InputError, SurgeryError


@pytest.mark.parametrize(
    ("inputs", "world", "kinds"),
    [
        ((16, 3, 4, 4), 1, [fw.BatchNorm2D, fw.BatchNorm2D]),
        ((2, 3, 4, 4), 1, [fw.GroupNorm, fw.GroupNorm]),
        ((2, 3, 4, 4), 4, [fw.SyncBatchNorm, fw.SyncBatchNorm]),
    ],
)
def test_auto_looks_at_the_batch(inputs: tuple[int, ...], world: int, kinds: list[type]) -> None:
    model = three_norms()
    before = state_of(model)
    report = fw.apply_policy(model, [{"norm": "auto"}], inputs=example(*inputs), world_size=world)
    assert [type(model.stem[1]), type(model.body[1])] == kinds
    assert "note: auto leaves what was built as group_norm" in str(report)
    assert f"{inputs[0]} samples per device" in str(report)
    fw.revert(model, pattern="stem.*")
    after = state_of(model)
    assert all(np.array_equal(after[name], value) for name, value in before.items() if name.startswith("stem"))
    again = three_norms()
    fw.apply_policy(again, [{"match": "stem.*", "norm": "auto"}], batch_size=inputs[0], world_size=world)
    assert type(again.stem[1]) is kinds[0]


def test_auto_names_what_the_inputs_do_not_reach() -> None:
    model = three_norms()
    model.unused = nn.BatchNorm2D(3)
    report = fw.apply_policy(model, [{"norm": "auto"}], inputs=example(2, 3, 4, 4), world_size=4)
    assert (type(model.unused), type(model.stem[1])) == (nn.BatchNorm2D, fw.SyncBatchNorm)
    [entry] = [entry for entry in report.entries if entry.path == "unused"]
    assert "do not reach it in eval(): it belongs to a branch of training alone" in entry.notes[0]
    with pytest.raises(ConfigError, match="norm has no effect on any layer that the rule is for; 'unused': auto"):
        fw.apply_policy(model, [{"match": "unused", "norm": "auto"}], inputs=example(16, 3, 4, 4))
    with pytest.raises(SurgeryError, match="does not run on the inputs"):
        fw.apply_policy(model, [{"norm": "auto"}], inputs=example(16, 5, 4, 4))
    for wrong in (0, "2", 2.5, True):
        with pytest.raises(InputError, match=f"batch_size={wrong!r} must be at least 1"):
            fw.apply_policy(model, [{"match": "stem.*", "norm": "auto"}], batch_size=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "world", "kind", "in_vain"),
    [
        (32, 1, fw.BatchNorm2D, "has no groups"),
        (2, 4, fw.SyncBatchNorm, "has no groups"),
        (2, 1, fw.GroupNorm, "keeps no statistics, so no momentum"),
    ],
)
def test_what_auto_makes_vain_is_noted_not_refused(batch: int, world: int, kind: type, in_vain: str) -> None:
    model = three_norms()
    rules = [{"match": "stem.*", "norm": "auto", "groups": 1, "momentum_schedule": {"at": {0: 0.5, 10: 0.99}}}]
    report = fw.apply_policy(model, rules, batch_size=batch, world_size=world)
    assert type(model.stem[1]) is kind
    [entry] = [entry for entry in report.entries if entry.path == "stem.1"]
    assert [note for note in entry.notes if in_vain in note]


def test_what_another_rule_makes_vain_is_refused_as_ever() -> None:
    rules = [{"norm": "auto"}, {"match": "stem.*", "norm": "group_norm"}, {"match": "stem.*", "momentum": 0.5}]
    with pytest.raises(ConfigError, match="momentum has no effect on any layer"):
        fw.apply_policy(three_norms(), rules, batch_size=2, world_size=1)
