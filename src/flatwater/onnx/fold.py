"""``fold_onnx``: batch norms of an ONNX file into what stands beside them, proven, or no file at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from flatwater.errors import ExportError, VerificationError
from flatwater.files import write_whole
from flatwater.inspection import Norm, find_way
from flatwater.onnx.absorb import absorb, norm_values
from flatwater.onnx.inspect import graph_of, graphs_of
from flatwater.onnx.model import load_onnx, weight_dtype
from flatwater.onnx.optimise import optimise
from flatwater.onnx.runtime import onnx_forms, onnx_inputs, open_onnx
from flatwater.surgery.arithmetic import check_statistics
from flatwater.verify import (
    VerifyReport,
    batch_sizes_of,
    check_tolerance,
    compare_forms,
    default_tolerance,
    look_inside,
    running_inputs,
)

__all__ = ["OnnxFoldReport", "fold_onnx"]


@dataclass(frozen=True)
class OnnxFoldReport:
    """What was folded in an ONNX file.

    Attributes:
        path: the file that was written.
        folded: names of the norms that are gone.
        left: name of a norm -> why it stayed.
        operations: nodes before and after.
        verification: how far the new model is from the old one, at every level of ONNX Runtime.
    """

    path: Path
    folded: list[str]
    left: dict[str, str]
    operations: tuple[int, int]
    verification: VerifyReport

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "path": str(self.path),
            "folded": self.folded,
            "left": [{"norm": name, "reason": reason} for name, reason in self.left.items()],
            "operations": {"before": self.operations[0], "after": self.operations[1]},
            "verification": self.verification.as_dict(),
        }

    def __str__(self) -> str:
        before, after = self.operations
        lines = [f"{len(self.folded)} norms folded, {len(self.left)} left; {before} operations before, {after} after"]
        lines += [f"  folded  {name}" for name in self.folded]
        lines += [f"  left    {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join([*lines, str(self.verification), f"wrote {self.path}"])


def fold_onnx(
    path: str | Path,
    output: str | Path,
    *,
    inputs: Sequence[str | Path] = (),
    batch_sizes: Sequence[int] = (1, 2, 17),
    tolerance: float | None = None,
) -> OnnxFoldReport:
    """Fold the batch norms of an ONNX model, compare with the original in ONNX Runtime, and only then write the file.

    ONNX Runtime folds what it can (:mod:`flatwater.onnx.optimise`), and :mod:`flatwater.onnx.absorb` the rest; all of
    it where weights are not float32, for on CPUs ONNX Runtime would turn half precision into float32. Inputs, outputs,
    their names and the operator sets stay, and nothing in the file is for one kind of processor. A model of which no
    norm can be folded is written as it was.

    Args:
        path: the model.
        output: the file to write, which may be ``path`` itself.
        inputs: see :func:`flatwater.verify.load_inputs`; by default what :func:`flatwater.verify.make_inputs` makes.
        batch_sizes: to compare at, where the model does not fix the batch.
        tolerance: how far, relative to its scale, an output may move; default
            :data:`flatwater.verify.TOLERANCES` for the dtype of the weights (float32: 1e-4), or more where the
            model multiplies rounding, see :mod:`flatwater.rounding`.

    Raises:
        VerificationError: the folded model computes something else. Nothing was written.
        ExportError: ONNX Runtime cannot load or run the model, it is larger than a file of this format can be, or
            the file cannot be written. Nothing was written.
        StatisticsError: running statistics that are NaN, infinite or negative.
        CheckpointError: ``path`` is not an ONNX model.
        InputError: inputs that are not what the model takes.
        BackendError: onnxruntime is not installed.
    """
    path, output = Path(path), Path(output)
    if output.is_dir():
        raise ExportError(f"{output}: is a folder; name the file to write")
    original = load_onnx(path)
    _check_statistics(original)
    content = _serialise(original, path)
    specs = onnx_inputs(open_onnx(content, "ORT_DISABLE_ALL"))
    reference = onnx_forms(content)[0]
    run = reference.load()
    examples = running_inputs(run, specs, inputs)

    before = _norms(original)
    folded = optimise(original) if _computes_in_float32(original) else copy.deepcopy(original)
    absorb(folded)
    after = _norms(folded)
    gone = [name for name in before if name not in after]
    result = _serialise(folded, path) if gone else content
    report = compare_forms(
        run,
        onnx_forms(result),
        examples,
        batch_sizes=batch_sizes_of(specs, batch_sizes),
        tolerance=default_tolerance(weight_dtype(original)) if tolerance is None else check_tolerance(tolerance),
        reference="the original, unoptimised",
        look=look_inside(reference),
        adapt=tolerance is None,
    )
    if not report.passed:
        row = report.failures[0]
        what = row.note or f"{row.max_rel:.2g} of the output's scale (tolerance {row.tolerance:.2g})"
        where = f"{report.diverging.words}; " if report.diverging else ""
        raise VerificationError(
            f"{path}: folded, it differs in {row.form} at batch {row.batch}: {what}; {where}nothing was written"
        )
    try:
        write_whole(output, result)
    except OSError as error:
        raise ExportError(f"{output}: cannot be written ({error.strerror}); choose another place") from error
    counts = (len(original.graph.node), len(folded.graph.node if gone else original.graph.node))
    return OnnxFoldReport(output, gone, after if gone else before, counts, report)


def _serialise(model: onnx.ModelProto, path: Path) -> bytes:
    try:
        return bytes(model.SerializeToString())
    except ValueError as error:
        raise ExportError(f"{path}: is larger than the 2 GiB that an ONNX file can hold") from error


def _norms(model: onnx.ModelProto) -> dict[str, str]:
    """Name of each norm in the file -> why it stays, empty if it need not."""
    graph = graph_of(model)
    found = {}
    for operation in graph.operations:
        if isinstance(operation.part, Norm):
            way = find_way(graph, operation, operation.part)
            found[operation.name] = way if isinstance(way, str) else "its parameters are not stored as initializers"
    return found


def _check_statistics(model: onnx.ModelProto) -> None:
    initializers: dict[str, onnx.TensorProto] = {}
    for graph in graphs_of(model.graph):
        initializers |= {tensor.name: tensor for tensor in graph.initializer}
    for graph in graphs_of(model.graph):
        for node in graph.node:
            if node.op_type == "BatchNormalization" and initializers.keys() >= set(node.input[1:5]):
                check_statistics(node.name or node.output[0], norm_values(node, initializers))


def _computes_in_float32(model: onnx.ModelProto) -> bool:
    floats = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    return not any(tensor.data_type in floats for graph in graphs_of(model.graph) for tensor in graph.initializer)
