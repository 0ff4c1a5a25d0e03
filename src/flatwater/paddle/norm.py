"""What all norm layers share: the arguments that Paddle's layers lack, and the checks of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import paddle

from flatwater.errors import InputError
from flatwater.paddle.backend import Backend, choose_backend
from flatwater.paddle.composite import activate
from flatwater.spec import NormSpec, SingleValue, canonical_activation

__all__ = ["NormLayer", "check_residual_shape"]

_FLOATS = ("float32", "float64", "bfloat16", "float16")


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
        return str(getattr(self, "_data_layout", None) or self._data_format)

    def _channels_last(self) -> bool:
        # As Paddle reads it: the second letter decides, so "NC" is channels-first.
        return self._format()[1] != "C"

    def _channels(self) -> int:
        raise NotImplementedError

    def _affine(self) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        return self.weight, self.bias

    def _norm_tensors(self) -> list[paddle.Tensor]:
        """Parameters and moving statistics, as far as the layer has them."""
        tensors = [*self._affine(), getattr(self, "_mean", None), getattr(self, "_variance", None)]
        return [tensor for tensor in tensors if tensor is not None]

    def _label(self) -> str:
        return f"{type(self).__name__} {self.full_name()!r}"

    @paddle.jit.not_to_static
    def _check(self, x: paddle.Tensor, residual: paddle.Tensor | None, tensors: list[paddle.Tensor]) -> None:
        """Raise InputError unless the layer, whose parameters and statistics ``tensors`` are, takes these inputs."""
        inputs = [(tensor.shape, tensor.dtype) for tensor in (x, residual, *tensors[:1]) if tensor is not None]
        if inputs == self.__dict__.get("_accepted"):
            return  # as in nearly every step
        self._check_anew(x, residual, tensors)
        if isinstance(x, paddle.Tensor):
            self.__dict__["_accepted"] = inputs

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

    def _backend(self, x: paddle.Tensor, tensors: list[paddle.Tensor]) -> Backend:
        return choose_backend(x, tensors, training=self.training)

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
