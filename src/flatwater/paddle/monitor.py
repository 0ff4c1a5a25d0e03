"""What the normalization layers of a model do to their activations, sampled while it trains.

    monitor = NormMonitor(model, every=100)
    for step, (x, target) in enumerate(batches):
        with monitor.sampling(step):
            y = model(x)
        ...
    monitor.save("norms.json")

Forward hooks exist inside the ``with`` block only, and only at the steps that ``every`` selects: between, the
model runs as if there were no monitor. A hook reads the pass that happens anyway. It runs nothing of its own,
so no statistic is updated twice, no random number is drawn and no gradient changes.

**What a sample holds**, per layer and step:

* *before*: the layer's input x;
* *after*: γ·x̂ + β, computed here in float64 from x, before the residual and the activation that a layer may
  fuse (so the picture is the same whether or not they are fused). A batch norm is normalized with the
  statistics that its mode selects: in training those of the sampled positions (on one process; SyncBatchNorm
  shares them among all), otherwise the running statistics. Group and instance norm use whole samples of the batch;
* the running mean and variance after the pass, as five numbers each over the channels.

Large inputs are thinned to about ``max_elements`` values at evenly spaced positions, all channels kept: the same
positions every time.

**The record** (:meth:`NormMonitor.record`, ``norms.json``)::

    {"format": "flatwater-norms", "version": 1,
     "quantile_levels": [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99],
     "layers": [{"path": "backbone.0.bn",             # as in model.named_sublayers()
                 "kind": "batch" | "group" | "instance",
                 "channels": 64,
                 "samples": [{"step": 100,            # ascending, each step once
                              "statistics": "batch" | "running" | "sample",   # what x was normalized with
                              "before": DISTRIBUTION, "after": DISTRIBUTION,
                              "running_mean": [min, q25, median, q75, max] | null,
                              "running_variance": [min, q25, median, q75, max] | null}]}],
     "unobserved": {"path": "why a sampled pass said nothing about this layer"}}

    DISTRIBUTION = {"count": 65536,                   # values looked at
                    "non_finite": 0,                  # of these NaN or infinite; all else is about the finite ones
                    "mean": 0.1, "std": 1.2,          # null where no value is finite, as below
                    "quantiles": [...],               # at quantile_levels
                    "low": -3.1, "high": 4.0,         # the 0.1% and 99.9% quantiles: the histogram's range
                    "counts": [...]}                  # in `bins` equal bins; values outside the range are left out
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import paddle
from paddle import nn

from flatwater.errors import CheckpointError, InputError
from flatwater.files import write_whole
from flatwater.paddle.kinds import BATCH_NORMS, INSTANCE_NORMS, normalizes_by_batch

__all__ = ["NormMonitor"]

Array = npt.NDArray[np.float64]

_FORMAT = "flatwater-norms"
_VERSION = 1
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_RANGE = (0.001, 0.999)  # a single outlier must not squeeze the whole histogram into one bin

_CHANNELS_LAST = ("NLC", "NHWC", "NDHWC")


class _Observed(NamedTuple):
    """One norm layer of the model, and what was seen of it, by step."""

    layer: nn.Layer
    kind: str
    channels: int
    samples: dict[int, dict[str, Any]]


class NormMonitor:
    """Samples the norm layers of a model: stock Paddle's, Flatwater's, and subclasses of either.

    Args:
        model: any layer; its norm layers are found once, here.
        every: :meth:`sampling` looks at steps that are a multiple of this.
        bins: how many bins each histogram has.
        max_elements: about how many values of a layer's input one sample looks at.

    Raises:
        InputError: an argument below 1, or a model without norm layers.
    """

    def __init__(self, model: nn.Layer, *, every: int = 1, bins: int = 48, max_elements: int = 1 << 16) -> None:
        for name, value in (("every", every), ("bins", bins), ("max_elements", max_elements)):
            if value < 1:
                raise InputError(f"{name}={value!r} must be at least 1")
        self._every = every
        self._bins = bins
        self._max_elements = max_elements
        self._observed: dict[str, _Observed] = {}
        self._unobserved: dict[str, str] = {}
        for path, layer in model.named_sublayers(include_self=True):
            found = _identify(layer)
            if found is not None:
                self._observed[path] = _Observed(layer, *found, samples={})
        if not self._observed:
            raise InputError(
                f"{type(model).__name__} has no batch, group or instance norm layer; there is nothing to monitor"
            )

    @contextlib.contextmanager
    def sampling(self, step: int) -> Iterator[None]:
        """Record, under ``step``, the first forward pass of each norm layer inside the ``with`` block.

        Does nothing where ``step`` is not a multiple of ``every``. A step that was recorded before is replaced.
        """
        if step % self._every:
            yield
            return
        for observed in self._observed.values():
            observed.samples.pop(step, None)
        hooks = [
            observed.layer.register_forward_post_hook(self._hook(path, step))
            for path, observed in self._observed.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str, step: int) -> Any:
        def observe(layer: nn.Layer, inputs: tuple[Any, ...], output: Any) -> None:
            # A layer that is used twice, or recomputed in backward, is recorded once.
            if step in self._observed[path].samples:
                return
            if not inputs:
                self._unobserved[path] = "its input is passed by keyword, which a forward hook does not see"
            elif not paddle.in_dynamic_mode() or not isinstance(inputs[0], paddle.Tensor):
                self._unobserved[path] = "it runs inside a static program (paddle.jit.to_static), which calls no hooks"
            elif inputs[0].size == 0:
                self._unobserved[path] = "its input was empty"
            else:
                # A diverged run is when one looks hardest: NaN and infinity are counted, so they need no warning.
                with np.errstate(all="ignore"):
                    self._observed[path].samples[step] = self._sample(self._observed[path], inputs[0], step)
                self._unobserved.pop(path, None)

        return observe

    def _sample(self, observed: _Observed, x: paddle.Tensor, step: int) -> dict[str, Any]:
        layer = observed.layer
        view = _as_view(x, layer)
        keep = max(2, self._max_elements // view.shape[1])  # positions; each has a value per channel
        if observed.kind == "batch":
            statistics = "batch" if normalizes_by_batch(layer, training=layer.training) else "running"
            before = _spaced_positions(view, keep)
            mean, variance = _running(layer) if statistics == "running" else (before.mean(axis=0), before.var(axis=0))
            after = _affine((before - mean) / np.sqrt(variance + layer._epsilon), layer)
        else:
            statistics = "sample"
            whole = view[_spaced(len(view), max(1, keep // max(1, view.shape[2])))].astype(np.float64)
            groups = layer._num_groups if observed.kind == "group" else observed.channels
            before = _spaced_positions(whole, keep)
            after = _affine(_spaced_positions(_normalize_groups(whole, groups, layer._epsilon), keep), layer)

        running = [None, None] if observed.kind != "batch" else [_five_numbers(values) for values in _running(layer)]
        return {
            "step": step,
            "statistics": statistics,
            "before": _distribution(before, self._bins),
            "after": _distribution(after, self._bins),
            "running_mean": running[0],
            "running_variance": running[1],
        }

    def record(self) -> dict[str, Any]:
        """Everything seen so far, ready for JSON; the module's docstring holds the schema."""
        layers = [
            {
                "path": path,
                "kind": observed.kind,
                "channels": observed.channels,
                "samples": [observed.samples[step] for step in sorted(observed.samples)],
            }
            for path, observed in self._observed.items()
        ]
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "quantile_levels": list(_QUANTILES),
            "layers": layers,
            "unobserved": dict(self._unobserved),
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`record` to ``path``, whole or not at all."""
        write_whole(Path(path), json.dumps(self.record(), allow_nan=False, separators=(",", ":")))

    def load(self, path: str | Path, *, before: int | None = None) -> None:
        """Go on from a saved record.

        Args:
            path: what :meth:`save` wrote.
            before: forget samples from this step on, where training resumes at an earlier checkpoint.

        Raises:
            CheckpointError: the file is missing, is no such record, or is about another model. What the
                monitor held stays.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as a norm record ({error}); delete it to begin a new one"
            ) from error
        samples = self._samples_of(record, path)
        for layer_path, observed in self._observed.items():
            observed.samples.clear()
            for sample in samples[layer_path]:
                if before is None or sample["step"] < before:
                    observed.samples[sample["step"]] = sample
        self._unobserved = dict(record.get("unobserved", {}))

    def _samples_of(self, record: Any, path: str | Path) -> dict[str, list[dict[str, Any]]]:
        remedy = "delete it to begin a new one"
        if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (_FORMAT, _VERSION):
            raise CheckpointError(f"{path}: is not a norm record of version {_VERSION}; {remedy}")
        try:
            layers = {layer["path"]: (layer["channels"], layer["samples"]) for layer in record["layers"]}
            steps_are_numbers = all(isinstance(one["step"], int) for _, many in layers.values() for one in many)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: is a damaged norm record ({error!r}); {remedy}") from error
        here = {layer_path: observed.channels for layer_path, observed in self._observed.items()}
        if not steps_are_numbers or {layer_path: channels for layer_path, (channels, _) in layers.items()} != here:
            raise CheckpointError(
                f"{path}: is about another model ({len(layers)} norm layers, this one has {len(here)}); {remedy}"
            )
        return {layer_path: samples for layer_path, (_, samples) in layers.items()}


def _identify(layer: nn.Layer) -> tuple[str, int] | None:
    """The kind of a norm layer and its number of channels; None for any other layer."""
    if isinstance(layer, BATCH_NORMS):
        return "batch", int(layer._mean.shape[0])
    if isinstance(layer, nn.GroupNorm):
        return "group", int(layer._num_channels)
    if isinstance(layer, INSTANCE_NORMS):
        return "instance", int(layer._num_features)
    return None


def _as_view(x: paddle.Tensor, layer: nn.Layer) -> npt.NDArray[Any]:
    """``x`` in NumPy as (N, C, L), L the product of the spatial dimensions."""
    x = x.detach()
    if x.dtype not in (paddle.float32, paddle.float64):
        x = x.astype("float32")  # NumPy has no bfloat16
    array = x.numpy()
    layout = getattr(layer, "_data_format", None) or getattr(layer, "_data_layout", "NCHW")
    if array.ndim > 2 and layout in _CHANNELS_LAST:
        array = np.moveaxis(array, -1, 1)
    return array.reshape(array.shape[0], array.shape[1], -1)


def _spaced(size: int, keep: int) -> npt.NDArray[np.intp]:
    """At most ``keep`` of the indices below ``size``, evenly spaced."""
    keep = min(size, keep)
    return np.arange(keep, dtype=np.intp) * size // keep


def _spaced_positions(view: npt.NDArray[Any], keep: int) -> Array:
    """Evenly spaced positions of a (N, C, L) view, as float64 (positions, C)."""
    index = _spaced(view.shape[0] * view.shape[2], keep)
    return view[index // view.shape[2], :, index % view.shape[2]].astype(np.float64)


def _running(layer: nn.Layer) -> tuple[Array, Array]:
    return layer._mean.numpy().astype(np.float64), layer._variance.numpy().astype(np.float64)


def _affine(normalized: Array, layer: nn.Layer) -> Array:
    """γ·x̂ + β over the last axis; Paddle's instance norm calls γ ``scale``."""
    weight = layer.scale if isinstance(layer, INSTANCE_NORMS) else layer.weight
    if weight is not None:
        normalized = normalized * weight.numpy().astype(np.float64)
    if layer.bias is not None:
        normalized = normalized + layer.bias.numpy().astype(np.float64)
    return normalized


def _normalize_groups(whole: Array, groups: int, epsilon: float) -> Array:
    split = whole.reshape(whole.shape[0], groups, -1)
    normalized = (split - split.mean(axis=2, keepdims=True)) / np.sqrt(split.var(axis=2, keepdims=True) + epsilon)
    return normalized.reshape(whole.shape)


def _five_numbers(values: Array) -> list[float | None]:
    """Over the channels; null for what JSON cannot say, which a diverged run may leave here."""
    return [
        float(number) if np.isfinite(number) else None for number in np.quantile(values, (0.0, 0.25, 0.5, 0.75, 1.0))
    ]


def _distribution(values: Array, bins: int) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    summary: dict[str, Any] = {"count": int(values.size), "non_finite": int(values.size - finite.size)}
    if not finite.size:
        nothing = dict.fromkeys(("mean", "std", "low", "high"))
        return summary | nothing | {"quantiles": [None] * len(_QUANTILES), "counts": [0] * bins}
    low, high, *quantiles = np.quantile(finite, (*_RANGE, *_QUANTILES))
    if low == high:  # a constant still deserves a bin with a width
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(finite, bins=bins, range=(low, high))
    return summary | {
        "mean": float(finite.mean()),
        "std": float(finite.std()),
        "quantiles": [float(quantile) for quantile in quantiles],
        "low": float(low),
        "high": float(high),
        "counts": [int(count) for count in counts],
    }
