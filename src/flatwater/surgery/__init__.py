"""Changes to a model that are planned without a framework, proven on example inputs, and reversible."""

from flatwater.surgery.arithmetic import (
    Affine,
    LinearValues,
    NormValues,
    WeightLayout,
    affine_after,
    affine_before,
    affine_before_norm,
    affine_of,
    check_statistics,
)
from flatwater.surgery.fold import fold_model
from flatwater.surgery.plan import Planner
from flatwater.surgery.report import ChangeReport, FoldedPair, FoldReport, Movement
from flatwater.surgery.view import (
    ELSEWHERE,
    Absorption,
    Call,
    Fold,
    ModelView,
    Movements,
    Ports,
    Source,
    Trace,
)

__all__ = [
    "ELSEWHERE",
    "Absorption",
    "Affine",
    "Call",
    "ChangeReport",
    "Fold",
    "FoldReport",
    "FoldedPair",
    "LinearValues",
    "ModelView",
    "Movement",
    "Movements",
    "NormValues",
    "Planner",
    "Ports",
    "Source",
    "Trace",
    "WeightLayout",
    "affine_after",
    "affine_before",
    "affine_before_norm",
    "affine_of",
    "check_statistics",
    "fold_model",
]
