"""``fold``: batch norms into the layers beside them, on a live model."""

from __future__ import annotations

from typing import Any

import paddle

from flatwater.paddle.running import as_inputs, evaluating, layers_of, parameter_dtype, untouched
from flatwater.paddle.surgery.view import PaddleView
from flatwater.surgery import FoldReport, fold_model
from flatwater.verify import check_tolerance, default_tolerance

__all__ = ["fold"]


def fold(model: paddle.nn.Layer, example_inputs: Any, *, tolerance: float | None = None) -> FoldReport:
    """Fold every batch norm into a layer before or behind it, in place, and prove it.

        w' = w·γ·(var + ε)^(-1/2)        b' = β + (b - mean)·γ·(var + ε)^(-1/2)

    in float64, cast once to the weight's dtype. What reads what is seen while the example inputs run in ``eval()``: a
    norm goes into the convolution (1D, 2D, 3D, grouped, depthwise, dilated, transposed) or Linear layer whose output
    it reads, also where that was only moved in between, or into the convolution, Linear layer or norm that reads it,
    if nothing else reads what lies between the two. Afterwards the inputs run again; what moved too far is taken back.
    The proof is of the paths that the inputs take: code that computes otherwise on other shapes or values is not seen.

    The convolution gets a bias parameter if it had none. The norm's place takes a
    :class:`~flatwater.paddle.FoldedNorm` that applies the activation and residual which the norm fused. Modes,
    hooks, names and ``stop_gradient`` stay. The folded model computes in ``train()`` what it computes in ``eval()``,
    and its ``state_dict`` has other keys: fold what is to be deployed, not what is still to be trained.

    Args:
        example_inputs: a tensor or array, a list of them (arguments in order) or a dict (arguments by name). An
            argument may be a number, or a dict or list of tensors: ``[{"image": x}]``. All are copied for each run.
        tolerance: how far the outputs, and what any norm layer writes, may move, relative to the largest magnitude
            in that tensor. Default: :data:`flatwater.verify.TOLERANCES` for the dtype of the parameters
            (float32 1e-4: rounding through a deep network stays well below it, a wrong layer does not).

    Returns:
        The pairs folded, why other norms stayed, how far the outputs moved, and ``undo()``.

    Raises:
        InputError: example inputs that are not tensors, or a tolerance that is no number of at least 0.
        StatisticsError: running statistics that are NaN, infinite or negative.
        SurgeryError: the model does not run on the inputs, or yields NaN. The model is as it was, after any error.
    """
    inputs = as_inputs(example_inputs, nested=True)
    layers_of(model)
    adapt = tolerance is None
    tolerance = default_tolerance(parameter_dtype(model)) if tolerance is None else check_tolerance(tolerance)
    with untouched(model), evaluating(model):
        return fold_model(PaddleView(model, inputs), tolerance, adapt=adapt)
