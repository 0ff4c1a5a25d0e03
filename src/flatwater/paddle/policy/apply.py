"""``apply_policy``: everything that a policy says about a model's norm layers, done to all of them or to none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle

from flatwater.advice import check_count
from flatwater.errors import BackendError, InputError
from flatwater.paddle.choosing.walk import inputs_of
from flatwater.paddle.policy.applied import AppliedPolicy
from flatwater.paddle.running import as_inputs

if TYPE_CHECKING:
    from flatwater.policy import Policy

__all__ = ["apply_policy"]


def apply_policy(
    model: paddle.nn.Layer,
    policy: Policy | str | Path | Sequence[Mapping[str, Any]],
    *,
    inputs: Any = None,
    input_spec: Any = None,
    batch_size: int | None = None,
    world_size: int | None = None,
) -> AppliedPolicy:
    """Make the norm layers of ``model`` what the policy says, in place: all of it, or on any error nothing.

    Layers and parameters stay the same objects, so that optimizers made before go on working; yet call
    ``applied.prepare(optimizer)`` for those, and for AdamW, Lamb and parameter groups in any case. What ``to_static``
    captured of ``model`` is captured anew at the next call, also after what is frozen later; a momentum schedule, and
    rules that look at ``inputs``, need a model without ``full_graph=True``.
    Initial values of γ and β are written over what is there, trained or not.

    Args:
        policy: a :class:`flatwater.policy.Policy`, the path of its YAML file, or a list of rules as dicts.
        inputs: what the model would be called with in one training step, on one device, as for
            :func:`~flatwater.paddle.fold`. ``norm: auto`` and ``zero_init_residual`` look at it run, in ``eval()``.
        input_spec: what to make such inputs from, as for :func:`~flatwater.paddle.export`; None for what the policy
            says under ``training``, if anything.
        batch_size: samples per device, for inputs that are made, and for ``norm: auto`` without any.
        world_size: how many devices share statistics, for ``norm: auto``; None for what the policy says, or else as
            many as there are.

    Returns:
        What was done to each norm layer and why, and the object to tell steps, epochs and optimizers to.

    Raises:
        ConfigError: the policy is wrong in itself, matches nothing, or asks for what the layers have not. The line of
            its file is named.
        SurgeryError: ``model`` is not a ``paddle.nn.Layer``, or does not run on ``inputs``.
        InputError: ``inputs`` that are none, both of these and ``input_spec``, or a batch or world size that is missing
            or below 1.
        StatisticsError: statistics to freeze that are NaN, infinite or negative.
        BackendError: pydantic or PyYAML, which policies need, is not installed.
    """
    for name, number in (("batch_size", batch_size), ("world_size", world_size)):
        check_count(name, number)
    try:
        from flatwater.paddle.policy.rules import apply_rules, as_policy
    except ImportError as error:
        raise BackendError(
            f"{error.name} is not installed, which policies need; pip install pydantic pyyaml"
        ) from error
    rules = as_policy(policy)
    if inputs is not None and input_spec is not None:
        raise InputError("inputs and input_spec were both given; drop one of them")
    said = rules.training
    if said is not None:
        batch_size = said.batch_size if batch_size is None else batch_size
        world_size = said.world_size if world_size is None else world_size
    example = None if inputs is None else as_inputs(inputs, nested=True)
    if input_spec is not None:
        example = inputs_of(model, input_spec, batch_size)
    size = paddle.distributed.get_world_size() if world_size is None else world_size
    return apply_rules(model, rules, inputs=example, batch_size=batch_size, world_size=size)
