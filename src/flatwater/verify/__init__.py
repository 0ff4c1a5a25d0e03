"""The same inputs through every form of a model, side by side."""

from flatwater.verify.compare import TOLERANCES, Difference, default_tolerance, difference, largest_difference
from flatwater.verify.forms import Arrays, Form, Run, compare_forms, one_line, onnx_form, resize_batch
from flatwater.verify.report import VerifyReport, VerifyRow

__all__ = [
    "TOLERANCES",
    "Arrays",
    "Difference",
    "Form",
    "Run",
    "VerifyReport",
    "VerifyRow",
    "compare_forms",
    "default_tolerance",
    "difference",
    "largest_difference",
    "one_line",
    "onnx_form",
    "resize_batch",
]
