"""``verify``: one table of how far every exported form is from the live model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paddle
from rich.console import Console

from flatwater.errors import SurgeryError
from flatwater.inspection.pir import batch_statistics_in_eval
from flatwater.paddle.kinds import BATCH_NORMS, normalizes_by_batch
from flatwater.paddle.running import as_inputs, evaluating, layers_of, parameter_dtype, run
from flatwater.paddle.shipping.examples import input_spec
from flatwater.paddle.shipping.forms import ModelFiles, forms_of, live_form, load_program, program_inputs
from flatwater.paddle.shipping.localize import look_at
from flatwater.verify import (
    Decode,
    Finding,
    VerifyReport,
    batch_sizes_of,
    check_tolerance,
    compare_forms,
    default_tolerance,
    one_line,
)

__all__ = ["verify"]


def verify(
    model: paddle.nn.Layer,
    path: str | Path,
    inputs: Any,
    *,
    batch_sizes: Sequence[int] = (1, 2, 17),
    tolerance: float | None = None,
    decode: Decode | None = None,
    without: Sequence[str] = (),
    show: bool = True,
) -> VerifyReport:
    """Run the same inputs through the live model and every form exported at ``path``, and compare.

    Forms: the program reloaded with ``paddle.jit.load``; Paddle Inference with its IR passes off, on, and on with
    oneDNN; ONNX Runtime at each of its optimisation levels. Which of them there are depends on the files that stand
    at ``path``. The live model runs in ``eval()`` and is put back into its mode. Without a live model:
    :func:`flatwater.models.verify_models`, and ``flatwater verify`` in a shell.

    ``max_abs`` = max |form - live|, ``max_rel`` = max_abs / max |live| within an output tensor, the largest
    over all outputs; a row passes if ``max_rel <= tolerance``. NaN and infinity equal only themselves. A form that
    fails to load or to run is a row that does not pass, with its reason. A model with a norm that uses the batch's
    statistics in ``eval()`` does not pass either, as Paddle's own forms of it differ: the report names each. If a form
    is off, the report names the first norm layer at which it is, see :func:`flatwater.verify.find_divergence`.

    Args:
        path: prefix of ``path.json``, ``path.pdiparams`` and ``path.onnx``.
        inputs: as for :func:`~flatwater.paddle.fold`; cut along the first axis to each batch size, or repeated with
            floats scaled, see :func:`flatwater.verify.resize_batch`.
        batch_sizes: where the program was exported with a fixed batch size, only that one is run.
        tolerance: default :data:`flatwater.verify.TOLERANCES` for the dtype of the parameters (float32: 1e-4), or more
            where the model multiplies rounding, see :mod:`flatwater.rounding`.
        decode: from the list of a model's outputs, as arrays, to one item a sample, such as the text that was read.
            A row in which an item differs from that of the live model does not pass.
        without: names of forms that are not compared, as ``["Paddle Inference, oneDNN"]`` where nobody deploys with it.
        show: print the table.

    Raises:
        CheckpointError: there is no model at ``path``, or a file is not one.
        InputError: inputs that are not tensors or hold no sample, a batch size that is not positive, or a form that
            there is not.
        SurgeryError: the live model does not run on the inputs.
    """
    files = ModelFiles(path)
    files.require()
    examples = as_inputs(inputs)
    findings, look = _findings(model), look_at(model, examples)
    if files.has_paddle:
        specs = program_inputs(load_program(files))
        batch_sizes = batch_sizes_of([input_spec(spec, index) for index, spec in enumerate(specs)], batch_sizes)
    with evaluating(model):
        try:
            run(model, examples)
        except Exception as error:
            raise SurgeryError(f"{type(model).__name__} does not run on the inputs: {one_line(error)}") from error
        report = compare_forms(
            live_form(model, examples),
            forms_of(files, parameter_dtype(model)),
            examples.arrays(),
            batch_sizes=batch_sizes,
            tolerance=default_tolerance(parameter_dtype(model)) if tolerance is None else check_tolerance(tolerance),
            decode=decode,
            findings=findings,
            look=look,
            adapt=tolerance is None,
            without=without,
        )
    if show:
        Console().print(report)
    return report


def _findings(model: paddle.nn.Layer) -> list[Finding]:
    """Batch norms that take the batch's statistics in ``eval()``."""
    findings = []
    for path, layer in layers_of(model):
        if isinstance(layer, BATCH_NORMS) and normalizes_by_batch(layer, training=False):
            setting = (
                "trainable_statistics=True" if isinstance(layer, paddle.nn.BatchNorm) else "use_global_stats=False"
            )
            findings.append(Finding(f"{path} ({type(layer).__name__})", batch_statistics_in_eval(setting)))
    return findings
