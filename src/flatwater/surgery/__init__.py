"""Changes to a model that are planned without a framework, proven on example inputs, and reversible."""

from flatwater.surgery.arithmetic import LinearValues, NormValues, WeightLayout, check_statistics, fold_values
from flatwater.surgery.fold import fold_model, pair_up
from flatwater.surgery.report import ChangeReport, FoldedPair, FoldReport, Movement
from flatwater.surgery.view import Call, ModelView, Trace

__all__ = [
    "Call",
    "ChangeReport",
    "FoldReport",
    "FoldedPair",
    "LinearValues",
    "ModelView",
    "Movement",
    "NormValues",
    "Trace",
    "WeightLayout",
    "check_statistics",
    "fold_model",
    "fold_values",
    "pair_up",
]
