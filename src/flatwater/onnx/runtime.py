"""ONNX Runtime: what a model takes, and the forms in which it runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from flatwater.errors import BackendError, CheckpointError, ExportError, InputError
from flatwater.onnx.inspect import graph_of
from flatwater.onnx.model import load_onnx
from flatwater.verify import Form, InputSpec, Inside, Run, one_line

__all__ = ["onnx_forms", "onnx_inputs", "open_onnx"]

_LEVELS = {
    "unoptimised": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)


def onnx_forms(model: Path | bytes) -> list[Form]:
    """ONNX Runtime on the CPU at each of its optimisation levels, none first; ``model`` is a file or its content."""
    return [
        Form(
            f"ONNX Runtime, {words}",
            functools.partial(_run, model, level),
            functools.partial(_inside, model, level),
        )
        for words, level in _LEVELS.items()
    ]


def _run(model: Path | bytes, level: str, tensors: Sequence[str] | None = None) -> Run:
    session = open_onnx(model, level)
    names = [entry.name for entry in session.get_inputs()]
    return lambda inputs: list(session.run(tensors, dict(zip(names, inputs, strict=True))))


def _inside(model: Path | bytes, level: str) -> Inside:
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else load_onnx(model)
    graph = graph_of(proto)
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    floats = {
        entry.name for entry in (*inferred.value_info, *inferred.output) if entry.type.tensor_type.elem_type in _FLOATS
    }
    # Those of nested graphs cannot be outputs of the model.
    written = {name for node in proto.graph.node for name in node.output if name in floats}
    tensors = [
        name for one in graph.operations for name in one.writes if name in written and name not in graph.constants
    ]
    outputs = {entry.name for entry in proto.graph.output}

    def load(level: str, names: Sequence[str]) -> Run:
        probed = onnx.ModelProto()
        probed.CopyFrom(proto)
        more = (onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
        probed.graph.output.extend(more)
        return _run(probed.SerializeToString(), level, list(names))

    return Inside(graph, tensors, functools.partial(load, "ORT_DISABLE_ALL"), functools.partial(load, level))


def open_onnx(model: Path | bytes, level: str = "ORT_ENABLE_ALL") -> Any:
    """A session of ONNX Runtime on the CPU.

    Raises:
        BackendError: onnxruntime is not installed.
        CheckpointError: the file is not an ONNX model.
        ExportError: ONNX Runtime cannot load it, as for an operator that it does not know.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("onnxruntime is not installed; pip install 'flatwater[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = "the model" if isinstance(model, bytes) else str(model)
        # ONNX Runtime has one exception class per status code, in a private module.
        if type(error).__name__ in ("InvalidProtobuf", "NoSuchFile", "NoModel"):
            raise CheckpointError(f"{name}: is not an ONNX model ({one_line(error)}); export it again") from error
        raise ExportError(f"{name}: cannot be loaded by ONNX Runtime ({one_line(error)})") from error


def onnx_inputs(session: Any) -> list[InputSpec]:
    """What a session's model takes.

    Raises:
        InputError: an input that is not a tensor.
    """
    specs = []
    for entry in session.get_inputs():
        if not entry.type.startswith("tensor("):
            raise InputError(f"input {entry.name!r} is a {entry.type}; only tensors can be given")
        word = entry.type[len("tensor(") : -1]
        dtype = {"float": "float32", "double": "float64"}.get(word, word)
        shape = [size if isinstance(size, int) and size > 0 else None for size in entry.shape]
        specs.append(InputSpec(entry.name, shape, dtype))
    return specs
