"""A Paddle model as surgery sees it: values, dataflow under hooks, and the substitution of a pair."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import paddle

from flatwater.errors import SurgeryError
from flatwater.paddle import layers
from flatwater.paddle.folded import FoldedNorm
from flatwater.paddle.kinds import BATCH_NORMS, SAMPLE_NORMS, normalizes_by_batch
from flatwater.paddle.running import Inputs, SyncBatchNormOnCPU, layers_of, run, to_numpy
from flatwater.paddle.sync import SyncBatchNorm
from flatwater.surgery import Call, FoldedPair, LinearValues, Movement, NormValues, Trace, WeightLayout
from flatwater.verify import difference, one_line

__all__ = ["Observation", "PaddleView", "norm_values"]

_Array: TypeAlias = npt.NDArray[np.float64]

_LAYOUTS: dict[Any, WeightLayout] = {
    paddle.nn.Conv1D: "output-first",
    paddle.nn.Conv2D: "output-first",
    paddle.nn.Conv3D: "output-first",
    paddle.nn.Conv1DTranspose: "transposed",
    paddle.nn.Conv2DTranspose: "transposed",
    paddle.nn.Conv3DTranspose: "transposed",
    paddle.nn.Linear: "output-last",
}
_LINEARS = tuple(_LAYOUTS)
_FORWARDS = {kind.forward for kind in _LINEARS}
_NORM_FORWARDS = {
    kind.forward
    for kind in (
        paddle.nn.BatchNorm,
        paddle.nn.BatchNorm2D,
        paddle.nn.SyncBatchNorm,
        layers.BatchNorm,
        layers.BatchNorm2D,
        SyncBatchNorm,
        SyncBatchNormOnCPU,
    )
}
# Of what a norm layer writes, so many values are kept to compare: enough to see any channel move.
_SAMPLE = 1 << 16


class Observation(NamedTuple):
    """One run: output tensors by name, and samples of what each norm layer wrote, by path, in running order."""

    outputs: dict[str, npt.NDArray[Any]]
    norms: dict[str, npt.NDArray[Any]]


class PaddleView:
    """Implements :class:`flatwater.surgery.ModelView` for a ``paddle.nn.Layer``.

    Use it inside ``evaluating(model)``.
    """

    def __init__(self, model: paddle.nn.Layer, inputs: Inputs) -> None:
        self.model = model
        self.inputs = inputs
        self.layers = dict(layers_of(model))
        self.linears: dict[str, Any] = {
            path: layer for path, layer in self.layers.items() if isinstance(layer, _LINEARS)
        }
        self.norms: dict[str, Any] = {
            path: layer for path, layer in self.layers.items() if isinstance(layer, (*BATCH_NORMS, *SAMPLE_NORMS))
        }
        for path, layer in self.layers.items():
            if isinstance(vars(layer).get("forward"), paddle.jit.dy2static.program_translator.StaticFunction):
                raise SurgeryError(
                    f"layer {path!r} was captured by to_static, which keeps the unfolded program; "
                    "fold first and capture then, or call layer.forward.rollback()"
                )

    def trace(self) -> Trace:
        calls: list[Call] = []
        seen: list[Any] = []  # keeps every tensor alive, so that no two of them get the same id

        def token(value: Any) -> int | None:
            if not isinstance(value, paddle.Tensor):
                return None
            seen.append(value)
            return id(value)

        def hook(path: str, layer: paddle.nn.Layer) -> Callable[..., None]:
            def note(_: paddle.nn.Layer, inputs: tuple[Any, ...], output: Any) -> None:
                reads = inputs[0] if inputs else None
                tensor = output if path in self.linears else reads
                axis = _channel_axis(layer, tensor.ndim) if isinstance(tensor, paddle.Tensor) else 0
                calls.append(Call(path, token(reads), token(output), axis))

            return note

        observed = {**self.linears, **self.norms}
        with _hooks() as hooks:
            for path, layer in observed.items():
                hooks.enter_context(_hooked(layer.register_forward_post_hook(hook(path, layer))))
            try:
                run(self.model, self.inputs)
            except Exception as error:
                raise SurgeryError(
                    f"{type(self.model).__name__} does not run on the example inputs: {one_line(error)}; "
                    "give what you would call it with"
                ) from error
        return Trace(
            {path: self._linear_obstacle(layer) for path, layer in self.linears.items()},
            {path: _norm_obstacle(layer) for path, layer in self.norms.items()},
            calls,
        )

    def _linear_obstacle(self, layer: paddle.nn.Layer) -> str | None:
        if type(layer).forward not in _FORWARDS or "forward" in vars(layer):
            return f"{type(layer).__name__} has a forward of its own"
        weight = layer._parameters.get("weight")
        if weight is None:
            return "its weight is computed from other parameters (weight_norm, spectral_norm); remove that first"
        own = [parameter for parameter in layer._parameters.values() if parameter is not None]
        for path, other in self.layers.items():
            if other is not layer and any(mine is theirs for mine in own for theirs in other._parameters.values()):
                return f"it shares a parameter with {path!r}"
        return None

    def linear_values(self, path: str) -> LinearValues:
        layer = self.linears[path]
        layout = next(layout for kind, layout in _LAYOUTS.items() if isinstance(layer, kind))
        bias = None if layer.bias is None else _float64(layer.bias)
        return LinearValues(_float64(layer.weight), bias, layout, getattr(layer, "_groups", 1))

    def norm_values(self, path: str) -> NormValues:
        return norm_values(self.norms[path])

    def observe(self) -> Observation:
        norms: dict[str, npt.NDArray[Any]] = {}

        def hook(path: str) -> Callable[..., None]:
            def note(_: paddle.nn.Layer, inputs: tuple[Any, ...], output: Any) -> None:
                norms[path] = _sample(to_numpy(output)) if isinstance(output, paddle.Tensor) else np.zeros(0)

            return note

        present = dict(layers_of(self.model))
        with _hooks() as hooks:
            for path in self.norms:
                hooks.enter_context(_hooked(present[path].register_forward_post_hook(hook(path))))
            tensors = run(self.model, self.inputs)
        names = ["the output"] if len(tensors) == 1 else [f"output {index}" for index in range(len(tensors))]
        return Observation(dict(zip(names, map(to_numpy, tensors), strict=True)), norms)

    def unprovable(self, observation: Observation) -> str | None:
        arrays = list(observation.outputs.values())
        if not arrays:
            return f"{type(self.model).__name__} returns no tensor, so no change of it can be proven right"
        if any(np.isnan(array.astype(np.float64)).any() for array in arrays):
            return (
                f"{type(self.model).__name__} yields NaN on the example inputs, so no change of it can be proven "
                "right; give inputs on which it computes numbers"
            )
        return None

    def observe_poisoned(self, pairs: Sequence[FoldedPair]) -> list[Observation]:
        observations = []
        for poison in (_all_nan, _large):
            true: dict[str, paddle.Tensor] = {}
            with _hooks() as hooks:
                for pair in pairs:
                    conv, norm = self.layers[pair.conv], self.layers[pair.norm]
                    hooks.enter_context(_hooked(conv.register_forward_post_hook(_hide(true, pair.conv, poison))))
                    hooks.enter_context(_hooked(norm.register_forward_pre_hook(_reveal(true, pair.conv))))
                try:
                    observations.append(self.observe())
                except Exception:  # whatever the model's own code raises on rubbish: so it has read it
                    return []
        return observations

    def movement(self, before: Observation, after: Observation, *, outputs_only: bool = False) -> Movement:
        compared = {} if outputs_only else {f"what {path!r} writes": path for path in before.norms}
        worst = Movement(0.0, 0.0)
        max_abs = 0.0
        for where, one, two in (
            *((where, before.norms[path], after.norms.get(path)) for where, path in compared.items()),
            *((name, array, after.outputs.get(name)) for name, array in before.outputs.items()),
        ):
            found = difference(one, two) if two is not None else difference(np.zeros(1), np.full(1, np.nan))
            max_abs = max(max_abs, found.max_abs)
            if found.max_rel > worst.max_rel:
                worst = Movement(found.max_abs, found.max_rel, where)
        return worst._replace(max_abs=max_abs)

    def substitute(self, pair: FoldedPair, weight: _Array, bias: _Array) -> Callable[[], None]:
        conv, norm = self.linears[pair.conv], self.norms[pair.norm]
        like = conv.weight if norm.bias is None else norm.bias
        restore_conv = _set_linear(conv, weight, bias, stop_gradient=like.stop_gradient)
        places = [
            (parent, name)
            for parent in self.layers.values()
            for name, child in parent._sub_layers.items()
            if child is norm
        ]
        folded = FoldedNorm(getattr(norm, "_act", None))
        folded.training = norm.training
        # The very dictionaries: handles that the user holds go on removing hooks.
        folded._forward_pre_hooks = norm._forward_pre_hooks
        folded._forward_post_hooks = norm._forward_post_hooks
        for parent, name in places:
            parent._sub_layers[name] = folded

        def restore() -> None:
            if any(parent._sub_layers.get(name) is not folded for parent, name in places):
                raise SurgeryError(f"{pair.norm!r} was replaced after folding; put it back before undo()")
            for parent, name in places:
                parent._sub_layers[name] = norm
            norm.training = folded.training
            restore_conv()

        return restore


def norm_values(layer: Any) -> NormValues:
    """γ, β, running statistics and ε of a batch norm layer, as float64 copies."""
    weight, bias = (None if one is None else _float64(one) for one in (layer.weight, layer.bias))
    epsilon = float(np.float32(layer._epsilon))  # as Paddle's operators hold it, in float64 too
    return NormValues(_float64(layer._mean), _float64(layer._variance), weight, bias, epsilon)


def _norm_obstacle(layer: Any) -> str | None:
    kind = type(layer).__name__
    if isinstance(layer, SAMPLE_NORMS):
        return f"{kind} normalizes each sample by itself; nothing of it is constant"
    if type(layer).forward not in _NORM_FORWARDS or "forward" in vars(layer):
        return f"{kind} has a forward of its own"
    if normalizes_by_batch(layer, training=False):
        return "it normalizes by the batch in eval() too (use_global_stats=False); set it to None first"
    try:
        FoldedNorm(getattr(layer, "_act", None))
    except ValueError:
        return f"its activation {layer._act!r} is not one that FoldedNorm knows"
    return None


def _channel_axis(layer: paddle.nn.Layer, rank: int) -> int:
    """The axis of channels in a tensor of this rank; a Linear's outputs are its channels."""
    if isinstance(layer, paddle.nn.Linear) or rank < 3:
        return rank - 1
    layout: str = getattr(layer, "_data_layout", None) or getattr(layer, "_data_format", None) or "NCHW"
    return 1 if layout[1] == "C" else rank - 1


def _set_linear(layer: Any, weight: _Array, bias: _Array, *, stop_gradient: bool) -> Callable[[], None]:
    """Write new values, cast once; returns the exact way back."""
    old_weight = layer.weight.clone().detach()
    _write(layer.weight, weight)
    if layer.bias is not None:
        old_bias = layer.bias.clone().detach()
        _write(layer.bias, bias)

        def restore() -> None:
            layer.weight.set_value(old_weight)
            layer.bias.set_value(old_bias)

        return restore

    attributes = {key: vars(layer)[key] for key in ("bias",) if key in vars(layer)}
    created = layer.create_parameter([len(bias)], dtype=layer.weight.dtype, is_bias=True)
    created.stop_gradient = stop_gradient
    _write(created, bias)
    layer.bias = created

    def remove() -> None:
        layer.weight.set_value(old_weight)
        del layer._parameters["bias"]
        vars(layer).update(attributes)

    return remove


def _write(parameter: paddle.Tensor, values: _Array) -> None:
    parameter.set_value(paddle.to_tensor(values, place=parameter.place).astype(parameter.dtype))


def _float64(tensor: paddle.Tensor) -> _Array:
    return np.array(tensor.detach().astype("float64").numpy())


def _sample(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values at an odd stride, which channels and rows do not share."""
    stride = (array.size // _SAMPLE) | 1
    return array.reshape(-1)[::stride].copy()


def _all_nan(tensor: paddle.Tensor) -> paddle.Tensor:
    return paddle.full_like(tensor, float("nan"))


def _large(tensor: paddle.Tensor) -> paddle.Tensor:
    """Numbers of both signs, for readers that swallow NaN, as a maximum may."""
    signs = np.where(np.arange(int(tensor.size)) % 2, 1e3, -1e3).reshape(tensor.shape)
    return paddle.to_tensor(signs, place=tensor.place).astype(tensor.dtype)


def _hide(
    true: dict[str, paddle.Tensor], path: str, poison: Callable[[paddle.Tensor], paddle.Tensor]
) -> Callable[..., paddle.Tensor]:
    def hide(_: paddle.nn.Layer, inputs: tuple[Any, ...], output: paddle.Tensor) -> paddle.Tensor:
        true[path] = output
        return poison(output)

    return hide


def _reveal(true: dict[str, paddle.Tensor], path: str) -> Callable[..., tuple[Any, ...]]:
    def reveal(_: paddle.nn.Layer, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (true[path], *inputs[1:])

    return reveal


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _hooks() -> contextlib.ExitStack:
    return contextlib.ExitStack()
