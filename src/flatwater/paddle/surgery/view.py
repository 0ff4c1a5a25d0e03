"""A Paddle model as surgery sees it: values, dataflow under hooks, proof under poison, and the changes themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import paddle

from flatwater.errors import SurgeryError
from flatwater.paddle import layers
from flatwater.paddle.kinds import BATCH_NORMS, SAMPLE_NORMS, normalizes_by_batch
from flatwater.paddle.running import (
    Inputs,
    SyncBatchNormOnCPU,
    called,
    flatten,
    layers_of,
    map_tensors,
    run,
    run_to_arrays,
    to_numpy,
)
from flatwater.paddle.surgery.dataflow import Seen, find_copies, trace_calls
from flatwater.paddle.surgery.folded import FoldedNorm
from flatwater.paddle.surgery.linears import LINEARS, channel_axis, layout_of, linear_obstacle, ports_of
from flatwater.paddle.surgery.poison import POISONS, poisoned, read_elsewhere, readings_of
from flatwater.paddle.sync.layer import SyncBatchNorm
from flatwater.surgery import Call, Fold, LinearValues, Movement, Movements, NormValues, Source, Trace
from flatwater.verify import difference, one_line

__all__ = ["NORM_FORWARDS", "Observation", "PaddleView", "norm_values"]

_Array: TypeAlias = npt.NDArray[np.float64]

NORM_FORWARDS = {
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
"""Of the batch norms that Paddle and Flatwater have; whatever has another may do anything."""

# Of what a norm layer writes, so many values are kept to compare: enough to see any channel move.
_SAMPLE = 1 << 15


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
            path: layer for path, layer in self.layers.items() if isinstance(layer, LINEARS)
        }
        self.norms: dict[str, Any] = {
            path: layer for path, layer in self.layers.items() if isinstance(layer, (*BATCH_NORMS, *SAMPLE_NORMS))
        }
        self._calls: list[Seen] = []
        for path, layer in self.layers.items():
            if isinstance(vars(layer).get("forward"), paddle.jit.dy2static.program_translator.StaticFunction):
                raise SurgeryError(
                    f"layer {path!r} was captured by to_static, which keeps the unfolded program; "
                    "fold first and capture then, or call layer.forward.rollback()"
                )

    def is_norm(self, path: str) -> bool:
        return path in self.norms

    # --- Dataflow -------------------------------------------------------------------------------------

    def trace(self) -> Trace:
        observed = self._observed()
        try:
            calls = trace_calls(observed, self._run)
        except Exception as error:
            raise SurgeryError(
                f"{type(self.model).__name__} does not run on the example inputs: {one_line(error)}; "
                "give what you would call it with"
            ) from error
        self._calls = calls
        linears = {path: linear_obstacle(layer, sorted(self._strangers(layer))) for path, layer in self.linears.items()}
        norms = {path: _norm_obstacle(layer) for path, layer in self.norms.items()}
        sources = [self._source(call) for call in calls]
        unknown = {index for index, call in enumerate(calls) if call.same is None}
        if any(norms.get(calls[index].path, "not a norm") is None for index in unknown):
            sources_of = find_copies(observed, calls, unknown, self._axis, self._run)
            sources = [sources_of.get(index, source) for index, source in enumerate(sources)]
        return Trace(
            linears,
            norms,
            [Call(call.path, source, self._note(call)) for call, source in zip(calls, sources, strict=True)],
            {path: ports_of(layer) for path, layer in self.linears.items()},
            {
                **{path: shared for path, layer in self.linears.items() if (shared := self._sharing(path, layer))},
                **{path: shared for path, layer in self.norms.items() if (shared := self._strangers(layer))},
            },
            {path: what for path in norms if (what := self._fused(path, calls))},
        )

    def _observed(self) -> dict[str, paddle.nn.Layer]:
        """Linear and norm layers, without the norms that are folded."""
        present = dict(layers_of(self.model))
        return {path: one for path, one in {**self.linears, **self.norms}.items() if present.get(path) is one}

    def _run(self) -> list[paddle.Tensor]:
        return run(self.model, self.inputs)

    def _axis(self, path: str, rank: int) -> int:
        return channel_axis(self.layers[path], rank)

    def _axes(self, call: Seen) -> tuple[int, int] | None:
        """The axes of channels as the writer of the tensor has them, and as its reader; None without both."""
        if call.same is None or call.reads is None:
            return None
        rank = len(call.reads)
        return self._axis(self._calls[call.same].path, rank), self._axis(call.path, rank)

    def _source(self, call: Seen) -> Source | None:
        axes = self._axes(call)
        if axes is None or axes[0] != axes[1] or call.same is None or call.reads is None:
            return None
        return Source.whole(call.same, call.reads[axes[1]])

    def _note(self, call: Seen) -> str:
        axes = self._axes(call)
        if axes is None or axes[0] == axes[1] or call.same is None:
            return ""
        return f"{self._calls[call.same].path!r} has its channels on axis {axes[0]}, the norm on another"

    def _fused(self, path: str, calls: list[Seen]) -> str:
        act = getattr(self.norms[path], "_act", None)
        if act:
            return f"its activation {act!r}"
        return "the residual that it adds" if any(call.more for call in calls if call.path == path) else ""

    def _sharing(self, path: str, layer: paddle.nn.Layer) -> set[str]:
        """The linear layers with which this one has a parameter in common."""
        return {other for other, one in self.linears.items() if one is not layer and _share(layer, one)}

    def _strangers(self, layer: paddle.nn.Layer) -> set[str]:
        """The layers that are not linear and have a parameter in common with this one."""
        others = self.layers.items() - self.linears.items()
        return {path for path, one in others if one is not layer and _share(layer, one)}

    # --- Values ---------------------------------------------------------------------------------------

    def linear_values(self, path: str) -> LinearValues:
        layer = self.linears[path]
        bias = None if layer.bias is None else _float64(layer.bias)
        return LinearValues(_float64(layer.weight), bias, layout_of(layer), getattr(layer, "_groups", 1))

    def norm_values(self, path: str) -> NormValues:
        return norm_values(self.norms[path])

    def largest(self, path: str) -> float:
        layer = self.layers[path]
        return float(paddle.finfo((layer._mean if self.is_norm(path) else layer.weight).dtype).max)

    # --- Proof ----------------------------------------------------------------------------------------

    def observe(self, *, shaken: bool = False) -> Observation:
        norms: dict[str, npt.NDArray[Any]] = {}

        def hook(path: str) -> Callable[..., None]:
            def note(_: paddle.nn.Layer, inputs: tuple[Any, ...], output: Any) -> None:
                norms[path] = _sample(to_numpy(output)) if isinstance(output, paddle.Tensor) else np.zeros(0)

            return note

        present = dict(layers_of(self.model))
        with contextlib.ExitStack() as hooks:
            for path in self.norms:
                hooks.callback(present[path].register_forward_post_hook(hook(path)).remove)
            arrays = run_to_arrays(self.model, _shaken(self.inputs) if shaken else self.inputs)
        names = ["the output"] if len(arrays) == 1 else [f"output {index}" for index in range(len(arrays))]
        return Observation(dict(zip(names, arrays, strict=True)), norms)

    def unprovable(self, observation: Observation) -> str | None:
        arrays = list(observation.outputs.values())
        if not arrays:
            return f"{type(self.model).__name__} returns no tensor, so no change of it can be proven right"
        if not any(array.size for array in arrays):
            return (
                f"{type(self.model).__name__} returns no values on the example inputs, its outputs are empty, so no "
                "change of it can be proven right; give a batch of at least one sample"
            )
        if any(np.isnan(array.astype(np.float64)).any() for array in arrays):
            return (
                f"{type(self.model).__name__} yields NaN on the example inputs, so no change of it can be proven "
                "right; give inputs on which it computes numbers"
            )
        return None

    def observe_poisoned(self, folds: Sequence[Fold]) -> list[Observation]:
        observed = self._observed()
        readings = readings_of(observed, self._calls, folds, self._run)
        observations = []
        for poison in POISONS:
            with poisoned(observed, self._calls, folds, readings, poison):
                try:
                    observations.append(self.observe())
                except MemoryError:
                    raise
                except Exception:  # whatever the model's own code raises on rubbish: so it has read it
                    return []
        return observations

    def read_elsewhere(self, folds: Sequence[Fold]) -> list[Fold]:
        observed = self._observed()
        readings = readings_of(observed, self._calls, folds, self._run)
        state = paddle.get_rng_state()
        try:
            return read_elsewhere(observed, self._calls, folds, readings, self._run_with_gradients)
        except MemoryError:
            raise
        except Exception:  # whatever an operator without a gradient raises, or code that works in place
            return []
        finally:
            paddle.set_rng_state(state)

    def _run_with_gradients(self) -> list[paddle.Tensor]:
        return flatten(called(self.model, self.inputs))

    def movements(self, before: Observation, after: Observation) -> Movements:
        outputs = {name: _movement(name, array, after.outputs.get(name)) for name, array in before.outputs.items()}
        norms = {
            path: _movement(f"what {path!r} writes", array, after.norms.get(path))
            for path, array in before.norms.items()
        }
        return Movements(outputs, norms)

    # --- Changes --------------------------------------------------------------------------------------

    def absorb(self, path: str, weight: _Array, bias: _Array | None, *, like: str) -> Callable[[], None]:
        layer, norm = self.layers[path], self.norms[like]
        trained = norm.bias if norm.bias is not None else self._main_parameter(layer)
        undo = [_set_parameter(layer, "weight", weight, like=trained)]
        if bias is not None:
            undo.append(_set_parameter(layer, "bias", bias, like=trained))

        def restore() -> None:
            for step in undo:
                step()

        return restore

    def _main_parameter(self, layer: Any) -> paddle.Tensor:
        return layer._mean if layer.weight is None else layer.weight

    def retire(self, norm: str) -> Callable[[], None]:
        layer = self.norms[norm]
        places = [
            (parent, name)
            for parent in self.layers.values()
            for name, child in parent._sub_layers.items()
            if child is layer
        ]
        folded = FoldedNorm(getattr(layer, "_act", None))
        folded.training = layer.training
        # The very dictionaries: handles that the user holds go on removing hooks.
        folded._forward_pre_hooks = layer._forward_pre_hooks
        folded._forward_post_hooks = layer._forward_post_hooks
        for parent, name in places:
            parent._sub_layers[name] = folded

        def restore() -> None:
            if any(parent._sub_layers.get(name) is not folded for parent, name in places):
                raise SurgeryError(f"{norm!r} was replaced after folding; put it back before undo()")
            for parent, name in places:
                parent._sub_layers[name] = layer
            layer.training = folded.training

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
    if type(layer).forward not in NORM_FORWARDS or "forward" in vars(layer):
        return f"{kind} has a forward of its own"
    if normalizes_by_batch(layer, training=False):
        return "it normalizes by the batch in eval() too (use_global_stats=False); set it to None first"
    try:
        FoldedNorm(getattr(layer, "_act", None))
    except ValueError:
        return f"its activation {layer._act!r} is not one that FoldedNorm knows"
    return None


def _share(one: paddle.nn.Layer, other: paddle.nn.Layer) -> bool:
    """Whether two layers have a parameter in common."""
    others = {id(parameter) for parameter in other._parameters.values() if parameter is not None}
    return any(id(parameter) in others for parameter in one._parameters.values())


def _movement(where: str, before: npt.NDArray[Any], after: npt.NDArray[Any] | None) -> Movement:
    found = difference(before, after) if after is not None else difference(np.zeros(1), np.full(1, np.nan))
    return Movement(found.max_abs, found.max_rel, where)


def _set_parameter(layer: Any, name: str, values: _Array, *, like: paddle.Tensor) -> Callable[[], None]:
    """Write new values, cast once, into a parameter that is made if there is none; returns the exact way back."""
    parameter = getattr(layer, name)
    if parameter is not None:
        old = parameter.detach().clone()
        _write(parameter, values)
        return lambda: parameter.set_value(old)

    attributes = {key: vars(layer)[key] for key in (name,) if key in vars(layer)}
    created = layer.create_parameter([len(values)], dtype=like.dtype, is_bias=name == "bias")
    created.stop_gradient = like.stop_gradient
    _write(created, values)
    setattr(layer, name, created)

    def remove() -> None:
        del layer._parameters[name]
        vars(layer).update(attributes)

    return remove


def _write(parameter: paddle.Tensor, values: _Array) -> None:
    parameter.set_value(paddle.to_tensor(values, place=parameter.place).astype(parameter.dtype))


def _float64(tensor: paddle.Tensor) -> _Array:
    return to_numpy(tensor).astype(np.float64)


def _sample(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values at an odd stride, which channels and rows do not share."""
    stride = (array.size // _SAMPLE) | 1
    return array.reshape(-1)[::stride].copy()


def _shaken(inputs: Inputs) -> Inputs:
    """Every float moved up or down by one unit in the last place."""

    def shake(tensor: Any) -> Any:
        if not isinstance(tensor, paddle.Tensor) or not tensor.is_floating_point():
            return tensor
        signs = np.random.default_rng(20150211).choice([-1.0, 1.0], tensor.shape)
        steps = paddle.to_tensor(signs * paddle.finfo(tensor.dtype).eps, place=tensor.place).astype(tensor.dtype)
        return tensor + tensor * steps

    return Inputs(map_tensors(inputs.args, shake), map_tensors(inputs.kwargs, shake))
