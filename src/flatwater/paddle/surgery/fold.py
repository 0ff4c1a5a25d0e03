"""``fold``: batch norms into the convolutions before them, on a live model."""

from __future__ import annotations

from typing import Any

import paddle

from flatwater.paddle.running import as_inputs, evaluating, layers_of, parameter_dtype
from flatwater.paddle.surgery.view import PaddleView
from flatwater.surgery import FoldReport, fold_model
from flatwater.verify import default_tolerance

__all__ = ["fold"]


def fold(model: paddle.nn.Layer, example_inputs: Any, *, tolerance: float | None = None) -> FoldReport:
    """Fold every batch norm into the convolution or Linear layer before it, in place, and prove it.

        w' = w·γ·(var + ε)^(-1/2)        b' = β + (b - mean)·γ·(var + ε)^(-1/2)

    in float64, cast once to the weight's dtype. A norm is folded if, while the example inputs run in ``eval()``, it
    runs once and reads the very tensor that one convolution (1D, 2D, 3D, grouped, depthwise, dilated, transposed) or
    Linear layer wrote, and nothing else reads it. Afterwards the inputs run again; what moved too far is taken back.

    The convolution gets a bias parameter if it had none. The norm's place takes a
    :class:`~flatwater.paddle.FoldedNorm` that applies the activation and residual which the norm fused. Modes,
    hooks, names and ``stop_gradient`` stay. The folded model computes in ``train()`` what it computes in ``eval()``,
    and its ``state_dict`` has other keys: fold what is to be deployed, not what is still to be trained.

    Args:
        example_inputs: a tensor or array, a list of them (arguments in order) or a dict (arguments by name).
        tolerance: how far the outputs, and what any norm layer writes, may move, relative to the largest magnitude
            in that tensor. Default: :data:`flatwater.verify.TOLERANCES` for the dtype of the parameters
            (float32 1e-4: rounding through a deep network stays well below it, a wrong layer does not).

    Returns:
        The pairs folded, why other norms stayed, how far the outputs moved, and ``undo()``.

    Raises:
        InputError: example inputs that are not tensors.
        StatisticsError: running statistics that are NaN, infinite or negative.
        SurgeryError: the model does not run on the inputs, or yields NaN. The model is as it was, after any error.
    """
    inputs = as_inputs(example_inputs)
    layers_of(model)
    adapt = tolerance is None
    if tolerance is None:
        tolerance = default_tolerance(parameter_dtype(model))
    with evaluating(model):
        return fold_model(PaddleView(model, inputs), tolerance, adapt=adapt)
