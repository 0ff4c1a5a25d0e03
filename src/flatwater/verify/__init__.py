"""The same inputs through every form of a model, side by side."""

from flatwater.verify.compare import TOLERANCES, Difference, default_tolerance, difference, largest_difference
from flatwater.verify.forms import (
    Arrays,
    Decode,
    Form,
    Run,
    compare_forms,
    one_line,
    onnx_forms,
    onnx_inputs,
    open_onnx,
    resize_batch,
)
from flatwater.verify.inputs import InputSpec, load_inputs, make_inputs
from flatwater.verify.report import Finding, VerifyReport, VerifyRow

__all__ = [
    "TOLERANCES",
    "Arrays",
    "Decode",
    "Difference",
    "Finding",
    "Form",
    "InputSpec",
    "Run",
    "VerifyReport",
    "VerifyRow",
    "compare_forms",
    "default_tolerance",
    "difference",
    "largest_difference",
    "load_inputs",
    "make_inputs",
    "one_line",
    "onnx_forms",
    "onnx_inputs",
    "open_onnx",
    "resize_batch",
]
