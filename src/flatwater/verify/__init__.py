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
from flatwater.verify.html import verify_page
from flatwater.verify.inputs import InputSpec, batch_sizes_of, load_inputs, make_inputs, running_inputs
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
    "batch_sizes_of",
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
    "running_inputs",
    "verify_page",
]
