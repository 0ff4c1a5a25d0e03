"""The same inputs through every form of a model, side by side."""

from flatwater.verify.compare import (
    TOLERANCES,
    Difference,
    check_tolerance,
    default_tolerance,
    difference,
    largest_difference,
)
from flatwater.verify.divergence import find_divergence, look_inside
from flatwater.verify.forms import Arrays, Decode, Form, Inside, Look, Run, Written, one_line
from flatwater.verify.html import verify_page
from flatwater.verify.inputs import (
    InputSpec,
    batch_sizes_of,
    load_inputs,
    make_inputs,
    narrowed,
    resize_batch,
    running_inputs,
)
from flatwater.verify.report import Divergence, Finding, VerifyReport, VerifyRow, share
from flatwater.verify.side_by_side import compare_forms

__all__ = [
    "TOLERANCES",
    "Arrays",
    "Decode",
    "Difference",
    "Divergence",
    "Finding",
    "Form",
    "InputSpec",
    "Inside",
    "Look",
    "Run",
    "VerifyReport",
    "VerifyRow",
    "Written",
    "batch_sizes_of",
    "check_tolerance",
    "compare_forms",
    "default_tolerance",
    "difference",
    "find_divergence",
    "largest_difference",
    "load_inputs",
    "look_inside",
    "make_inputs",
    "narrowed",
    "one_line",
    "resize_batch",
    "running_inputs",
    "share",
    "verify_page",
]
