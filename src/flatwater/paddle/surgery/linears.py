"""Linear layers as folding sees them: convolutions of all kinds, and ``Linear``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import paddle

from flatwater.surgery import Ports, WeightLayout

__all__ = ["LINEARS", "channel_axis", "layout_of", "linear_obstacle", "ports_of"]

_LAYOUTS: dict[Any, WeightLayout] = {
    paddle.nn.Conv1D: "output-first",
    paddle.nn.Conv2D: "output-first",
    paddle.nn.Conv3D: "output-first",
    paddle.nn.Conv1DTranspose: "transposed",
    paddle.nn.Conv2DTranspose: "transposed",
    paddle.nn.Conv3DTranspose: "transposed",
    paddle.nn.Linear: "output-last",
    paddle.vision.ops.DeformConv2D: "output-first",
}

LINEARS: tuple[Any, ...] = tuple(_LAYOUTS)

_FORWARDS = {kind.forward for kind in LINEARS}


def layout_of(layer: paddle.nn.Layer) -> WeightLayout:
    """Where its weight keeps its output channels."""
    return next(layout for kind, layout in _LAYOUTS.items() if isinstance(layer, kind))


def linear_obstacle(layer: Any, strangers: Sequence[str]) -> str | None:
    """Why a linear layer can never take up a norm, None if nothing speaks against it.

    Args:
        strangers: layers of other kinds that have a parameter in common with it.
    """
    if type(layer).forward not in _FORWARDS or "forward" in vars(layer):
        return f"{type(layer).__name__} has a forward of its own"
    if layer._parameters.get("weight") is None:
        return "its weight is computed from other parameters (weight_norm, spectral_norm); remove that first"
    return f"it shares a parameter with {strangers[0]!r}" if strangers else None


def ports_of(layer: Any) -> Ports:
    """How many channels it has, and whether a constant input gives constant outputs."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return Ports(0, 0)
    layout, groups, shape = layout_of(layer), getattr(layer, "_groups", 1), weight.shape
    if layout == "output-first":
        return Ports(
            shape[1] * groups, shape[0], not isinstance(layer, paddle.vision.ops.DeformConv2D) and not _pads(layer)
        )
    if layout == "output-last":
        return Ports(shape[0], shape[1], even=True)
    single = math.prod([*layer._kernel_size, *layer._stride]) == 1
    return Ports(shape[0], shape[1] * groups, single and not _pads(layer) and not _any(layer.output_padding))


def channel_axis(layer: paddle.nn.Layer, rank: int) -> int:
    """The axis of channels in a tensor of this rank, of linear and norm layers; a Linear's outputs are its channels."""
    if isinstance(layer, paddle.nn.Linear) or rank < 3:
        return rank - 1
    layout: str = getattr(layer, "_data_layout", None) or getattr(layer, "_data_format", None) or "NCHW"
    return 1 if layout[1] == "C" else rank - 1


def _pads(layer: Any) -> bool:
    """Whether some outputs of a convolution see zeros beyond the border of its input."""
    if getattr(layer, "_padding_mode", "zeros") != "zeros":
        return False
    if isinstance(layer._padding, str):
        return layer._padding.upper() != "VALID" and math.prod(layer._kernel_size) > 1
    return _any(layer._padding)


def _any(sizes: Any) -> bool:
    """Whether any of some nested sizes is not zero."""
    return any(map(_any, sizes)) if isinstance(sizes, list | tuple) else sizes != 0
