"""What each norm layer of a model gets in a step: the model run once on inputs of the real batch size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import paddle

from flatwater.advice import Batch
from flatwater.errors import ExportError, InputError, SurgeryError
from flatwater.paddle.running import Inputs, as_inputs, called, flatten, undisturbed
from flatwater.paddle.shipping.examples import check_input_spec, make_examples
from flatwater.paddle.surgery.population import first_tensor
from flatwater.paddle.surgery.recast import channels_of
from flatwater.verify import one_line, resize_batch

__all__ = ["batch_size_of", "batches_of", "inputs_of"]


def inputs_of(model: paddle.nn.Layer, input_spec: Any, batch_size: int | None) -> Inputs:
    """Inputs of ``batch_size`` samples with which the model runs, made from its ``input_spec``.

    Args:
        input_spec: the inputs in order; dynamic sizes other than the batch are tried as 64, 224 and 32.
        batch_size: None for what the spec fixes.

    Raises:
        InputError: no ``input_spec``, no batch size or two different ones, or one below 1.
        SurgeryError: the model does not run on inputs made from the spec.
    """
    specs = check_input_spec(input_spec)
    fixed = specs[0].shape[0] if specs[0].shape else None
    fixed = None if fixed in (None, -1) else int(fixed)
    if batch_size is None and fixed is None:
        raise InputError("input_spec leaves the size of the batch free; give batch_size=, the samples on one device")
    if batch_size is not None and fixed not in (None, batch_size):
        raise InputError(f"batch_size={batch_size} contradicts input_spec, whose batch is {fixed}; drop one of them")
    try:
        with undisturbed(model):
            examples = make_examples(model, specs)
    except ExportError as error:
        raise SurgeryError(str(error)) from error
    return examples if batch_size is None else as_inputs(resize_batch(examples.arrays(), batch_size))


def batch_size_of(inputs: Inputs) -> int:
    """Samples: the first size of the first input; of a dict, the first by name."""
    shape = flatten([*inputs.args, *inputs.kwargs.values()])[0].shape
    if not shape or not shape[0]:
        raise InputError(f"the first input has the shape {shape}, so no samples; give a batch")
    return int(shape[0])


def batches_of(model: paddle.nn.Layer, norms: Mapping[str, Any], inputs: Inputs) -> dict[str, Batch]:
    """The smallest batch that each of ``norms`` gets, by path, seen in ``eval()``; no layer that gets none is in it.

    Nothing of the model is different afterwards, nor any stream of random numbers.

    Raises:
        SurgeryError: the model does not run on the inputs.
    """
    batches: dict[str, Batch] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs)
            if x is not None and x.size:
                batch = Batch(int(x.shape[0]), math.prod(x.shape[1:]) // channels_of(layer))
                batches[path] = min(batch, batches.get(path, batch))

        return note

    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        for path, layer in norms.items():
            stack.callback(layer.register_forward_pre_hook(hook(path), with_kwargs=True).remove)
        try:
            called(model, inputs)
        except Exception as error:  # whatever the model's own code raises
            alone = "; a dict is taken for arguments by name: for a model that takes one dict, give [that dict]"
            raise SurgeryError(
                f"{type(model).__name__} does not run on the inputs: {one_line(error)}; "
                f"give what you would call it with{alone if inputs.kwargs else ''}"
            ) from error
    return batches
