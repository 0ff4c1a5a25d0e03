"""Norm layers of ours beside Paddle's and the float64 oracle: cases, and one training step of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from flatwater import reference
from flatwater.spec import canonical_activation

# A result takes about ten operations and sums whose error grows slower than their length: relative to
# the largest value of a result, 64 roundings of the dtype's unit (2^-24, 2^-53) are ample for any shape here.
TOLERANCE = {"float32": 64 * 2.0**-24, "float64": 64 * 2.0**-53}


@dataclass
class Step:
    """What one training step leaves behind, as NumPy."""

    y: np.ndarray
    gradients: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


def randomise(layer: paddle.nn.Layer, seed: int = 0) -> None:
    """Give every parameter and statistic of the layer a value that is not its default."""
    random = np.random.default_rng(seed)
    for name, tensor in layer.state_dict().items():
        low = 0.5 if "variance" in name else -1.0
        tensor.set_value(random.uniform(low, 2.0, tensor.shape).astype(tensor.numpy().dtype))


def tensor_of(array: np.ndarray, *, stop_gradient: bool = False) -> paddle.Tensor:
    tensor = paddle.to_tensor(array)
    tensor.stop_gradient = stop_gradient
    return tensor


def step(layer: paddle.nn.Layer, x: np.ndarray, dy: np.ndarray, residual: np.ndarray | None = None) -> Step:
    """Forward and backward; the norm stands between two other operators, as in a model."""
    leaf = tensor_of(x)
    added = None if residual is None else tensor_of(residual)
    inputs = [leaf * 1.0] if added is None else [leaf * 1.0, added * 1.0]
    y = layer(*inputs)
    (y * tensor_of(dy, stop_gradient=True)).sum().backward()
    gradients = {"x": leaf.grad.numpy()}
    if added is not None:
        gradients["residual"] = added.grad.numpy()
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            gradients["weight" if name == "scale" else name] = parameter.grad.numpy()
            parameter.clear_gradient(False)
    state = layer.state_dict()
    return Step(y.numpy(), gradients, {key: state[key].numpy() for key in ("_mean", "_variance") if key in state})


def oracle(layer: Any, x: np.ndarray, dy: np.ndarray, residual: np.ndarray | None = None) -> Step:
    """The same step by the float64 reference; the layer's own values are only read."""
    weight, bias = (None if tensor is None else tensor.numpy() for tensor in layer._held()[:2])
    axis = x.ndim - 1 if layer._channels_last() and x.ndim > 2 else 1
    options: dict[str, Any] = {
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "activation": canonical_activation(layer._act),
        "epsilon": layer._epsilon,
        "axis": axis,
    }
    if hasattr(layer, "_groups"):
        forward = reference.group_norm(x, layer._groups(), **options)
        found = reference.group_norm_gradients(dy, x, layer._groups(), **options)
        statistics = {}
    else:
        moving = layer._mean.numpy(), layer._variance.numpy()
        if layer._use_global_stats:
            options["statistics"] = reference.Statistics(*(value.astype(np.float64) for value in moving), count=0)
            statistics = dict(zip(("_mean", "_variance"), moving, strict=True))
        forward = reference.batch_norm(x, **options)
        found = reference.batch_norm_gradients(dy, x, **options)
        if not layer._use_global_stats:
            updated = reference.update_running(*moving, forward.statistics, momentum=layer._momentum)
            statistics = dict(zip(("_mean", "_variance"), updated, strict=True))
    gradients = {"x": found.x}
    if residual is not None:
        gradients["residual"] = found.residual
    if weight is not None:
        gradients["weight"] = found.weight
    if bias is not None:
        gradients["bias"] = found.bias
    return Step(forward.y, gradients, statistics)


def assert_same_step(found: Step, expected: Step, tolerance: float) -> None:
    """Every array of both steps agrees to within ``tolerance`` of its largest value (and of 1)."""
    assert_close(found.y, expected.y, tolerance, "y")
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_close(found.gradients[name], gradient, tolerance, f"gradient of {name}")
    assert found.statistics.keys() == expected.statistics.keys()
    for name, value in expected.statistics.items():
        assert_close(found.statistics[name], value, tolerance, name)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, what
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    worst = float(np.abs(found - expected).max(initial=0.0))
    assert worst <= tolerance * scale, f"{what}: off by {worst:.3g}, allowed {tolerance * scale:.3g}"
