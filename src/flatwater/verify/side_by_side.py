"""The comparison: the same inputs through every form of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from flatwater.errors import CheckpointError, InputError
from flatwater.rounding import NOISE_FACTOR, shaken, with_rounding
from flatwater.verify.compare import Difference, largest_difference, same_argmax, same_items
from flatwater.verify.divergence import find_divergence
from flatwater.verify.forms import Arrays, Decode, Form, Look, Run, one_line
from flatwater.verify.inputs import resize_batch
from flatwater.verify.report import Divergence, Finding, VerifyReport, VerifyRow

__all__ = ["compare_forms"]


def compare_forms(
    live: Run,
    forms: Sequence[Form],
    inputs: Arrays,
    *,
    batch_sizes: Sequence[int],
    tolerance: float,
    decode: Decode | None = None,
    reference: str = "the live model",
    findings: Sequence[Finding] = (),
    look: Look | None = None,
    adapt: bool = False,
    without: Sequence[str] = (),
) -> VerifyReport:
    """Run ``inputs`` at every batch size through the live model and every form.

    A form that cannot be loaded or fails to run is a row that does not pass, with the first line of its reason.

    Args:
        live: what is right.
        forms: what is compared with it.
        inputs: cut or repeated to each batch size, see :func:`resize_batch`.
        batch_sizes: at least one.
        tolerance: what the relative difference may be, unless ``adapt`` allows more.
        decode: makes one item a sample, as a text, of a model's outputs; every item has to be equal too.
        reference: what ``live`` is called.
        findings: what is known to be wrong already; a report with findings does not pass.
        adapt: where something is off, allow what rounding does to this model, see :mod:`flatwater.rounding`.
        look: shows what the layers of ``live`` write, to say where the first form that fails starts to differ.
        without: names of forms that are not compared, which the report says.

    Raises:
        InputError: ``without`` names a form that there is not, or ``live`` does not run at a batch size.
        CheckpointError: a file is not a model of its kind.
    """
    if unknown := [name for name in without if name not in {form.name for form in forms}]:
        known = ", ".join(repr(form.name) for form in forms)
        raise InputError(f"without={list(unknown)!r} is no form of this model; its forms are {known}")
    forms = [form for form in forms if form.name not in without]
    batches = {size: resize_batch(inputs, size) for size in batch_sizes}
    expected = {size: _expected(live, batch, size, reference) for size, batch in batches.items()}
    findings = list(findings)
    if any(np.isnan(array).any() for arrays in expected.values() for array in arrays if array.dtype.kind == "f"):
        problem = "yields NaN on these inputs, so comparing proves nothing; give inputs on which it computes numbers"
        findings.append(Finding(reference, problem))
    rows = []
    noise: dict[int, float] = {}
    moved: tuple[Form, int] | None = None
    for form in forms:
        run: Run | None = None
        broken = ""
        try:
            run = form.load()
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # whatever a runtime raises is its reason for not running this model
            broken = f"cannot be loaded: {one_line(error)}"
        for size, batch in batches.items():
            if run is None:
                rows.append(_broken(form.name, size, tolerance, broken))
                continue
            try:
                actual = run([array.copy() for array in batch])
            except MemoryError:
                raise
            except Exception as error:  # as above
                rows.append(_broken(form.name, size, tolerance, f"fails to run: {one_line(error)}"))
                continue
            found = largest_difference(expected[size], actual)
            limit = tolerance
            if adapt and tolerance < found.max_rel < math.inf:
                if size not in noise:
                    again = live([shaken(array) for array in batch])
                    noise[size] = largest_difference(expected[size], again).max_rel
                limit = with_rounding(tolerance, noise[size])
            rows.append(_row(form.name, size, found, (expected[size], actual), limit, decode))
            # What rounding alone may have moved has no layer to blame.
            if moved is None and found.max_rel > max(limit, NOISE_FACTOR * noise.get(size, 0.0)):
                moved = form, size
    diverging = None
    if look is not None and moved is not None:
        form, size = moved
        diverging = _explain(form, look, batches[size], with_rounding(tolerance, noise.get(size, 0.0)))
    multiplied = [one for one in noise.values() if with_rounding(tolerance, one) > tolerance]
    return VerifyReport(rows, reference, findings, diverging, max(multiplied, default=None), list(without))


def _expected(live: Run, batch: Arrays, size: int, reference: str) -> Arrays:
    try:
        return live([array.copy() for array in batch])
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # whatever a runtime raises on a size that the model cannot take
        raise InputError(
            f"{reference} does not run at batch size {size}: {one_line(error)}; give batch sizes that it takes"
        ) from error


def _broken(name: str, size: int, tolerance: float, note: str) -> VerifyRow:
    return VerifyRow(name, size, None, None, tolerance, passed=False, note=note, broken=True)


def _row(
    name: str,
    size: int,
    found: Difference,
    outputs: tuple[Arrays, Arrays],
    tolerance: float,
    decode: Decode | None,
) -> VerifyRow:
    expected, actual = outputs
    comparable = math.isfinite(found.max_rel)
    decoded = None if decode is None or found.note else same_items(decode(expected), decode(actual))
    return VerifyRow(
        name,
        size,
        found.max_abs if math.isfinite(found.max_abs) else None,
        found.max_rel if comparable else None,
        tolerance,
        passed=found.max_rel <= tolerance and decoded in (None, 1.0),
        note=found.note or (None if comparable else "differs from a reference that is all zero"),
        argmax=None if found.note else same_argmax(expected, actual),
        decoded=decoded,
    )


def _explain(form: Form, look: Look, inputs: Arrays, tolerance: float) -> Divergence | None:
    try:
        return find_divergence(form, look(inputs), inputs, tolerance)
    except MemoryError:
        raise
    except Exception as error:  # a runtime may refuse to return what lies inside; that the form fails is said already
        return Divergence(form.name, None, f"where it diverges could not be found: {one_line(error)}")
