"""``advise``: which norm each layer of a model should have, by the batch that it really gets."""

from __future__ import annotations

from typing import Any

import paddle

from flatwater.advice import AdviceReport, Batch, LayerAdvice, check_count, choose_norm
from flatwater.errors import InputError
from flatwater.paddle.choosing.walk import batch_size_of, batches_of, inputs_of
from flatwater.paddle.kinds import BATCH_NORMS, INSTANCE_NORMS, normalizes_by_batch
from flatwater.paddle.running import as_inputs, layers_of
from flatwater.paddle.surgery.recast import channels_of, is_recast, kind_of, recast_obstacle

__all__ = ["UNREACHED", "advise", "advise_layer", "why_it_stays"]

UNREACHED = (
    "the inputs do not reach it in eval(): it belongs to a branch of training alone, is not used, "
    "or is hidden in a forward captured by to_static"
)
"""Why nothing is known of a norm layer."""


def advise(
    model: paddle.nn.Layer,
    *,
    batch_size: int | None = None,
    world_size: int | None = None,
    input_spec: Any = None,
    inputs: Any = None,
) -> AdviceReport:
    """Which norm each layer of ``model`` should have; nothing is changed.

    =============================  ===========================================================================
    samples of the layer's batch   advice
    =============================  ===========================================================================
    16 or more per device          batch norm
    fewer, several devices         sync batch norm, if all devices together hold 16 values per channel
    fewer, one device              group norm; or batch norm with a momentum that averages over more steps
    =============================  ===========================================================================

    ``momentum`` is Paddle's: the share of the OLD statistics kept, so that small batches want a HIGHER one (in PyTorch,
    where it is the share of the new ones, a lower one). How high is derived in
    :func:`flatwater.advice.steadier_momentum`.

    Frozen layers, and group, instance and layer norms, stay: the batch plays no part in them. So do layers that the
    inputs do not reach, of which nothing is known. A layer that cannot be another kind of norm (a subclass of somebody
    else's, or one whose γ and β are frozen), and one that group norm would leave a single value to
    normalize, is advised to stay batch norm, with a higher momentum.

    The model runs once with the whole batch, in ``eval()`` and without gradients, so that branches of training alone
    are not seen; before, inputs are tried with a batch of two. Nothing of the model is different afterwards.

    Args:
        batch_size: samples on one device in one forward pass (not over gradient accumulation).
        world_size: how many devices share statistics; None for as many as there are.
        input_spec: as for :func:`~flatwater.paddle.export`; or else
        inputs: a batch of what the model would be called with in training, as for :func:`~flatwater.paddle.fold`; an
            argument may be a dict or list of tensors, so that ``[{"image": x}]`` is for a model that takes one dict.

    Returns:
        A table of all norm layers, and the policy to act on it: ``fw.apply_policy(model, report.policy())``.

    Raises:
        InputError: a model without norm layers, neither or both of ``input_spec`` and ``inputs``, a batch size that is
            missing or contradicts them, or a number that is not a whole one from 1 on.
        SurgeryError: ``model`` is not a ``paddle.nn.Layer``, or does not run.
    """
    norms: dict[str, Any] = {path: layer for path, layer in layers_of(model) if kind_of(layer) is not None}
    if not norms:
        raise InputError(f"{type(model).__name__} has no norm layer; there is nothing to advise on")
    if (input_spec is None) == (inputs is None):
        raise InputError("give one of input_spec= and inputs=, to see what batch each layer gets")
    for name, number in (("batch_size", batch_size), ("world_size", world_size)):
        check_count(name, number)
    example = as_inputs(inputs, nested=True) if inputs is not None else inputs_of(model, input_spec, batch_size)
    size = batch_size_of(example)
    if batch_size not in (None, size):
        raise InputError(f"batch_size={batch_size} contradicts inputs of {size} samples; drop one of them")
    devices = paddle.distributed.get_world_size() if world_size is None else world_size
    batches = batches_of(model, norms, example)
    return AdviceReport(
        [advise_layer(path, layer, batches.get(path), devices) for path, layer in norms.items()], size, devices
    )


def advise_layer(path: str, layer: Any, batch: Batch | None, world_size: int) -> LayerAdvice:
    """The advice for one norm layer, which gets this batch; None if nothing reaches it.

    Raises:
        InputError: a number below 1.
    """
    name, channels = type(layer).__name__, channels_of(layer)
    staying = why_it_stays(layer)
    if staying is None and batch is None:
        staying = UNREACHED
    if staying is not None or batch is None:
        alone = "; it has one value to normalize at a time, so that it gives β whatever it reads"
        return LayerAdvice(path, name, channels, batch, None, f"{staying}{alone if _is_constant(layer, batch) else ''}")
    choice = choose_norm(
        batch.samples,
        world_size,
        positions=batch.positions,
        channels=channels,
        momentum=getattr(layer, "_momentum", 0.9),
        obstacle=recast_obstacle(layer),
    )
    return LayerAdvice(path, name, channels, batch, choice.kind, choice.reason, choice.groups, choice.momentum)


def _is_constant(layer: Any, batch: Batch | None) -> bool:
    """Whether a norm of each sample has sets of a single value."""
    if batch is None or isinstance(layer, BATCH_NORMS):
        return False
    if isinstance(layer, INSTANCE_NORMS):
        return batch.positions == 1
    if isinstance(layer, paddle.nn.GroupNorm):
        return batch.positions == 1 and layer._num_groups == layer._num_channels
    return channels_of(layer) == 1


def why_it_stays(layer: Any) -> str | None:
    """What a norm layer is, in words, of which the batch does not decide what it should be; None if it does."""
    if not (isinstance(layer, BATCH_NORMS) or is_recast(layer)):
        return f"was built as {kind_of(layer)}, which needs no batch"
    if isinstance(layer, BATCH_NORMS) and not normalizes_by_batch(layer, training=True):
        return "has frozen statistics, in which the batch plays no part"
    return None
