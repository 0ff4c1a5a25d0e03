"""Example inputs made from an ``input_spec``, the same ones every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle

from flatwater.errors import ExportError, InputError
from flatwater.paddle.running import Inputs, as_inputs, evaluating, run
from flatwater.verify import InputSpec, make_inputs, one_line

__all__ = ["check_input_spec", "input_spec", "make_examples"]


def check_input_spec(input_spec: Any) -> list[paddle.static.InputSpec]:
    """The specs as a list.

    Raises:
        InputError: not a sequence of ``paddle.static.InputSpec`` with shapes.
    """
    if isinstance(input_spec, paddle.static.InputSpec):
        input_spec = [input_spec]
    if not isinstance(input_spec, Sequence) or not input_spec:
        raise InputError(f"input_spec={input_spec!r} is not a list of paddle.static.InputSpec")
    for spec in input_spec:
        if not isinstance(spec, paddle.static.InputSpec) or spec.shape is None:
            raise InputError(
                f"input_spec holds {spec!r}; give paddle.static.InputSpec([None, 3, 224, 224], 'float32') or the like"
            )
    return list(input_spec)


def make_examples(model: paddle.nn.Layer, specs: Sequence[paddle.static.InputSpec]) -> Inputs:
    """What :func:`flatwater.verify.make_inputs` makes, in the first sizes with which the model runs.

    Raises:
        ExportError: it runs with none of them.
    """
    wanted = [input_spec(spec, index) for index, spec in enumerate(specs)]
    reason = ""
    for arrays in make_inputs(wanted):
        inputs = as_inputs(arrays)
        with evaluating(model):
            try:
                run(model, inputs)
            except Exception as error:  # whatever the model raises on a size that it cannot take
                reason = one_line(error)
                continue
        return inputs
    raise ExportError(
        f"{type(model).__name__} does not run on inputs made from its input_spec ({reason}); "
        "give example_inputs that it takes"
    )


def input_spec(spec: paddle.static.InputSpec, index: int) -> InputSpec:
    """The same in the words of :mod:`flatwater.verify`; an input without a name has its index for one."""
    shape = [None if size in (None, -1) else size for size in spec.shape]
    return InputSpec(spec.name or f"number {index}", shape, str(spec.dtype).removeprefix("paddle.").lower())
