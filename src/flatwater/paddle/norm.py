"""What all norm layers share: the arguments that Paddle's layers lack, and the checks of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import paddle
from paddle.base.framework import in_dygraph_mode

from flatwater.errors import InputError
from flatwater.paddle.backend import Backend, choose_backend
from flatwater.paddle.composite import activate
from flatwater.spec import NormSpec, SingleValue, canonical_activation

__all__ = ["Held", "Input", "NormLayer", "check_residual_shape"]

_FLOATS = ("float32", "float64", "bfloat16", "float16")


class Held(NamedTuple):
    """The tensors of a norm layer, None for what it has not."""

    weight: paddle.Tensor | None
    bias: paddle.Tensor | None
    mean: paddle.Tensor | None = None
    variance: paddle.Tensor | None = None

    def present(self) -> list[paddle.Tensor]:
        return [tensor for tensor in self if tensor is not None]


class Input(NamedTuple):
    """What a layer knows about inputs of one shape and dtype, once it has taken the first.

    Attributes:
        channels_last: where their channels stand.
        channels: how many.
        single_value: whether there is one value per channel, over all samples.
    """

    channels_last: bool
    channels: int
    single_value: bool


class NormLayer(paddle.nn.Layer):
    """What all norm layers share. Mixed in before Paddle's class.

    The attributes are class-level defaults, so that a stock layer becomes one of these by
    exchanging its class (:func:`flatwater.paddle.convert`).
    """

    _act: str | None = None
    _single_value: SingleValue = "error"
    _ranks: tuple[int, ...] = ()

    def _extend(self, act: str | None, single_value: SingleValue = "error") -> None:
        """Take the arguments that Paddle's constructor does not know, and check the others."""
        self._act = None if canonical_activation(act) == "none" else act
        self._single_value = single_value
        self._spec()

    def _spec(self) -> NormSpec:
        return _spec_of(self._epsilon, getattr(self, "_momentum", 0.9), self._single_value, self._act)

    def _format(self) -> str:
        own = self.__dict__
        return str(own.get("_data_layout") or own["_data_format"])

    def _channels_last(self) -> bool:
        # As Paddle reads it: the second letter decides, so "NC" is channels-first.
        return self._format()[1] != "C"

    def _channels(self) -> int:
        raise NotImplementedError

    def _tensor(self, name: str) -> paddle.Tensor | None:
        # What Paddle's __getattr__ finds too, after a search that a training step makes four times for each norm.
        found = self._parameters.get(name) if in_dygraph_mode() else None
        return getattr(self, name, None) if found is None else found

    def _held(self) -> Held:
        """Parameters and moving statistics, as far as the layer has them."""
        raise NotImplementedError

    def _label(self) -> str:
        return f"{type(self).__name__} {self.full_name()!r}"

    @paddle.jit.not_to_static
    def _check(self, x: paddle.Tensor, residual: paddle.Tensor | None, held: Held) -> Input:
        """What the layer knows about these inputs; raises InputError unless it takes them."""
        of_x = (x.shape, x.dtype)
        of_residual = None if residual is None else (residual.shape, residual.dtype)
        key = (of_x, of_residual, None if held.weight is None else held.weight.dtype, self._format())
        accepted: tuple[Any, Input] | None = self.__dict__.get("_accepted")
        if accepted is not None and accepted[0] == key:
            return accepted[1]  # as in nearly every step
        self._check_anew(x, residual, held.present())
        last = self._channels_last()
        shape = list(x.shape)
        channels = shape.pop(-1 if last else 1)
        # A size of -1 is not known while a graph is captured.
        found = Input(last, channels, all(size == 1 for size in shape))
        if isinstance(x, paddle.Tensor):
            self.__dict__["_accepted"] = (key, found)
        return found

    def _check_anew(self, x: paddle.Tensor, residual: paddle.Tensor | None, tensors: list[paddle.Tensor]) -> None:
        # In code that to_static rewrites sizes would be tensors; here they are numbers, -1 where not known yet.
        dtype = str(x.dtype).removeprefix("paddle.").rpartition(".")[2].lower()
        rank = len(x.shape)
        if rank not in self._ranks:
            wanted = " or ".join(map(str, self._ranks)) if len(self._ranks) < 3 else f"{self._ranks[0]} or more"
            raise InputError(f"{self._label()} got an input of shape {list(x.shape)}; it takes rank {wanted}")
        if dtype not in _FLOATS:
            raise InputError(f"{self._label()} got {dtype} input; normalization needs floats: use x.astype('float32')")
        channels = x.shape[-1 if self._channels_last() else 1]
        if channels not in (self._channels(), -1):
            raise InputError(
                f"{self._label()} has {self._channels()} channels but its input of shape {list(x.shape)} "
                f"has {channels} ({self._format()}); give the layer the channel count of what it reads"
            )
        check_residual_shape(self._label, x, residual)
        if residual is not None and residual.dtype != x.dtype:
            raise InputError(f"{self._label()} got a {residual.dtype} residual for {x.dtype} input; cast one of them")
        for parameter in tensors:
            if (dtype == "float64") != (parameter.dtype == paddle.float64):
                raise InputError(
                    f"{self._label()} has {parameter.dtype} parameters but got {dtype} input; "
                    f"cast the input, or the layer with layer.to(dtype={dtype!r})"
                )

    def _backend(self, x: paddle.Tensor, held: Held) -> Backend:
        return choose_backend(x, held.present(), training=self.training)

    def _finish(self, z: paddle.Tensor, residual: paddle.Tensor | None) -> paddle.Tensor:
        return activate(z if residual is None else z + residual, canonical_activation(self._act))

    def extra_repr(self) -> str:
        """Paddle's description of the layer, and what is added to it."""
        parts = [super().extra_repr()] if hasattr(super(), "extra_repr") else []
        parts += [f"act={self._act}"] if self._act else []
        parts += [f"single_value={self._single_value}"] if self._single_value != "error" else []
        return ", ".join(part for part in parts if part)


@lru_cache(maxsize=1024)
def _spec_of(epsilon: float, momentum: float, single_value: SingleValue, act: str | None) -> NormSpec:
    return NormSpec(epsilon, momentum, single_value=single_value, activation=canonical_activation(act))


@paddle.jit.not_to_static
def check_residual_shape(label: Callable[[], str], x: paddle.Tensor, residual: paddle.Tensor | None) -> None:
    """Raise InputError unless the residual has x's shape.

    In code that to_static rewrites, sizes are tensors; here they are numbers, -1 where not known yet.
    """
    if residual is None:
        return
    sizes = zip(x.shape, residual.shape, strict=False)
    if len(x.shape) != len(residual.shape) or any(one != two and -1 not in (one, two) for one, two in sizes):
        raise InputError(
            f"{label()} got a residual of shape {list(residual.shape)} for an input of shape "
            f"{list(x.shape)}; they are added, so the shapes must be equal"
        )
