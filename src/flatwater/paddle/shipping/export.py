"""``export``: a model into files that are proven to compute what the model computes, or no files at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import paddle

from flatwater.errors import CheckpointError, ExportError, InputError, VerificationError
from flatwater.paddle.kinds import BATCH_NORMS
from flatwater.paddle.running import Inputs, as_inputs, evaluating, layers_of, parameter_dtype
from flatwater.paddle.shipping.conversion import convert_to_onnx, count_batch_norms, require_onnx
from flatwater.paddle.shipping.examples import check_input_spec, input_spec, make_examples
from flatwater.paddle.shipping.forms import ModelFiles, forms_of, live_form
from flatwater.paddle.shipping.localize import first_divergence, probing
from flatwater.paddle.shipping.verify import verify
from flatwater.paddle.surgery.fold import fold as fold_norms
from flatwater.surgery import FoldReport
from flatwater.verify import Decode, VerifyReport, VerifyRow, batch_sizes_of, one_line, resize_batch, share

__all__ = ["ExportReport", "Format", "export"]

Format = Literal["paddle", "onnx"]
_FORMATS = ("paddle", "onnx")


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        files: the files written.
        fold: what folding did; None if it was not asked for.
        verification: how far each form is from the live, unfolded model.
        onnx_batch_norms: BatchNormalization nodes left in the ONNX graph; None if there is no such file.
    """

    files: list[Path]
    fold: FoldReport | None
    verification: VerifyReport
    onnx_batch_norms: int | None

    def __str__(self) -> str:
        lines = [f"wrote {', '.join(map(str, self.files))}"]
        if self.onnx_batch_norms is not None:
            lines.append(f"{self.onnx_batch_norms} BatchNormalization nodes in the ONNX graph")
        lines += [str(self.fold)] if self.fold is not None else []
        return "\n".join([*lines, str(self.verification)])


def export(
    model: paddle.nn.Layer,
    path: str | Path,
    input_spec: Sequence[paddle.static.InputSpec],
    formats: Sequence[Format] = ("paddle", "onnx"),
    fold: bool = True,
    *,
    example_inputs: Any = None,
    tolerance: float | None = None,
    decode: Decode | None = None,
    without: Sequence[str] = (),
    show: bool = False,
) -> ExportReport:
    """Export ``model`` as it computes in ``eval()``, verify every form against it, and only then write the files.

    The model is folded, captured with ``paddle.jit.save``, converted with paddle2onnx, and unfolded again. What was
    captured is then compared with the unfolded model (:func:`~flatwater.paddle.verify`, batch sizes 1, 2 and 17). All
    this happens in a temporary folder. Afterwards, and after any error, the model is as it was before, bit for bit.

    Args:
        path: prefix of what is written: ``path.json`` and ``path.pdiparams`` (a PIR program), ``path.onnx``.
        input_spec: the inputs in order; None or -1 for a dynamic size, as the batch.
        formats: ``"paddle"``, ``"onnx"`` or both. ONNX needs ``pip install 'flatwater[onnx]'``.
        fold: fold batch norms into convolutions, as :func:`~flatwater.paddle.fold` does.
        example_inputs: what to fold and verify on. Default: reproducible random numbers of the shapes in
            ``input_spec``, dynamic sizes other than the batch being tried as 64, 224 and 32.
        tolerance: of folding and of verification, see :func:`~flatwater.paddle.verify`.
        decode: what is made of the outputs, and has to be equal too, see :func:`~flatwater.paddle.verify`.
        without: forms that are not compared, where nobody deploys with them, see :func:`~flatwater.paddle.verify`.
        show: print the verification table.

    Raises:
        VerificationError: a form computes something else, or does not run; the message names the first layer that
            diverges. Nothing was written.
        ExportError: the model cannot be captured or converted, or the disk is full. Nothing was written.
        InputError: a prefix, input_spec, format or form that is none.
        SurgeryError, StatisticsError: see :func:`~flatwater.paddle.fold`.
        BackendError: ONNX was asked for and its packages are not installed.
    """
    layers_of(model)
    files = ModelFiles(path)
    specs = check_input_spec(input_spec)
    if not formats or isinstance(formats, str) or any(one not in _FORMATS for one in formats):
        raise InputError(f"formats={formats!r} is not a sequence of {' and '.join(map(repr, _FORMATS))}")
    targets = [files.program, files.parameters] if "paddle" in formats else []
    targets += [files.onnx] if "onnx" in formats else []
    for target in targets:
        if target.is_dir():
            raise ExportError(f"{target}: is a folder; choose another prefix")
    if "onnx" in formats:
        require_onnx()
    examples = make_examples(model, specs) if example_inputs is None else as_inputs(example_inputs)
    if len(examples.arrays()) != len(specs):
        raise InputError(
            f"{len(examples.arrays())} example inputs for an input_spec of {len(specs)}; give one for each"
        )
    job = _Job(model, specs, examples, "onnx" in formats, fold, tolerance, decode, without)
    with _folder_beside(files.prefix) as folder:
        staged = ModelFiles(folder / files.prefix.name)
        with job.folded() as fold_report:
            job.write(staged)
        report = job.verify(staged, show)
        batch_norms = count_batch_norms(staged.onnx) if "onnx" in formats else None
        try:
            files.prefix.parent.mkdir(parents=True, exist_ok=True)
            _move_all(folder, targets)
        except OSError as error:
            raise ExportError(
                f"{files.prefix}: cannot be written ({error.strerror}); free the place or choose another"
            ) from error
    return ExportReport(targets, fold_report, report, batch_norms)


@dataclass(frozen=True)
class _Job:
    """One export, up to and including its verification."""

    model: paddle.nn.Layer
    specs: list[paddle.static.InputSpec]
    examples: Inputs
    onnx: bool
    fold: bool
    tolerance: float | None
    decode: Decode | None
    without: Sequence[str]

    @contextlib.contextmanager
    def folded(self) -> Iterator[FoldReport | None]:
        """The model folded, if that was asked for, and unfolded afterwards."""
        if not self.fold:
            yield None
            return
        fold_report = fold_norms(self.model, self._arguments(), tolerance=self.tolerance)
        try:
            yield fold_report
        finally:
            fold_report.undo()

    def write(self, files: ModelFiles) -> None:
        """Capture the model as it is now, and convert the program.

        Raises:
            ExportError: Paddle cannot capture it, or paddle2onnx cannot convert it.
        """
        name = type(self.model).__name__
        with evaluating(self.model):
            try:
                with warnings.catch_warnings():
                    # The order of a dict's values in the program is what `flatten` gives the live model's.
                    warnings.filterwarnings("ignore", message="Found 'dict' in given outputs", category=UserWarning)
                    # with_hook: hooks on the model itself are part of what the live model computes.
                    paddle.jit.save(self.model, str(files.prefix), self.specs, with_hook=True)
            except OSError as error:
                raise ExportError(f"{files.prefix}: cannot be written ({error.strerror}); free some space") from error
            except Exception as error:  # Paddle's own errors share no class
                raise ExportError(
                    f"{name} cannot be captured as a program: {one_line(error)}; see paddle.jit.to_static"
                ) from error
        if self.onnx:
            convert_to_onnx(files.program, files.parameters, files.onnx, name)

    def verify(self, files: ModelFiles, show: bool) -> VerifyReport:
        """Compare what was written with the model.

        Raises:
            VerificationError: some form differs, or does not run.
        """
        sizes = batch_sizes_of([input_spec(spec, 0) for spec in self.specs[:1]], (1, 2, 17))
        try:
            report = verify(
                self.model,
                files.prefix,
                self._arguments(),
                batch_sizes=sizes,
                tolerance=self.tolerance,
                decode=self.decode,
                without=self.without,
                show=show,
            )
        except CheckpointError as error:
            raise VerificationError(
                f"{type(self.model).__name__}: what was exported cannot be read back: {error}"
            ) from error
        if not report.passed:
            raise VerificationError(self._explain(report))
        return report

    def _explain(self, report: VerifyReport) -> str:
        name = type(self.model).__name__
        found = "; ".join(f"{finding.layer}: {finding.problem}" for finding in report.findings)
        if not report.failures:
            return f"{name}: {found}; nothing was written"
        row = report.failures[0]
        if row.max_rel is None:
            what = f"{row.form} at batch {row.batch}: {row.note}"
            if row.broken:
                found = found or f"if nobody deploys with it, leave it out: without=[{row.form!r}]"
        elif row.max_rel <= row.tolerance:
            what = f"{row.form} at batch {row.batch}: only {share(row.decoded)} is decoded alike"
            found = found or f"the outputs are within the tolerance ({row.max_rel:.2g} of their scale)"
        else:
            what = (
                f"{row.form} at batch {row.batch} differs by {row.max_rel:.2g} of the output's scale "
                f"(tolerance {row.tolerance:.2g})"
            )
        if not found and report.rounding and report.diverging is None and row.max_rel is not None:
            found = report.rounding
        if not found:
            first = self._first_divergence(row)
            found = f"the first layer to diverge is {first}" if first else "no single layer shows it when probed"
        return f"{name}: {what}; {found}; {len(report.failures)} comparisons failed and nothing was written"

    def _first_divergence(self, row: VerifyRow) -> str | None:
        """Export once more with what layers write as outputs, and compare these in the form that failed.

        An output more can keep a runtime from fusing layers, and so hide what is wrong with their fusion: what does
        not show with all layers as outputs may with the norms alone.
        """
        layers = dict(layers_of(self.model))
        innermost = {path for path, layer in layers.items() if not layer._sub_layers}
        norms = {path for path in innermost if isinstance(layers[path], BATCH_NORMS)}
        for paths in (innermost, norms):
            try:
                found = self._probe(row, paths)
            except Exception:  # the form may fail to run with the probes too; that it fails is reported already
                continue
            if found is not None:
                return found
        return None

    def _probe(self, row: VerifyRow, paths: set[str]) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            files = ModelFiles(Path(folder) / "probe")
            with self.folded() as fold_report:
                # What a convolution writes is another thing before and after its norm went into it.
                merged = fold_report.rewritten if fold_report is not None else set()
                with probing(self.model, paths - merged) as names:
                    self.write(files)
                captured = list(names)
            form = next(form for form in forms_of(files, parameter_dtype(self.model)) if form.name == row.form)
            batch = resize_batch(self.examples.arrays(), row.batch)
            actual = form.load()(batch)
            with evaluating(self.model), probing(self.model, paths - merged) as names:
                expected = live_form(self.model, self.examples)(batch)
            return first_divergence(dict(zip(names, expected, strict=True)), captured, actual, row.tolerance)

    def _arguments(self) -> Any:
        return self.examples.kwargs or list(self.examples.args)


def _move_all(folder: Path, targets: Sequence[Path]) -> None:
    """Move the files of these names out of ``folder``. Where one cannot be, what stood at the others comes back."""
    former = folder / "former"
    former.mkdir()
    for target in targets:
        if target.exists():
            shutil.copy2(target, former)
    moved: list[Path] = []
    try:
        for target in targets:
            (folder / target.name).replace(target)
            moved.append(target)
    except OSError:
        for target in moved:
            if (former / target.name).exists():
                (former / target.name).replace(target)
            else:
                target.unlink()
        raise


@contextlib.contextmanager
def _folder_beside(prefix: Path) -> Iterator[Path]:
    """A temporary folder on the target's file system, so that moving out of it is atomic."""
    home = prefix.absolute().parent
    while not home.is_dir():
        if home.exists():
            raise ExportError(f"{home}: is a file, so nothing can be written below it; choose another prefix")
        home = home.parent
    try:
        folder = tempfile.TemporaryDirectory(dir=home, prefix=f".{prefix.name}.")
    except OSError as error:
        raise ExportError(f"{home}: cannot be written to ({error.strerror}); choose another prefix") from error
    with folder as name:
        yield Path(name)
