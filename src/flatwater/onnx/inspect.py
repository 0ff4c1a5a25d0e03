"""What norms an ONNX model holds, found without running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from flatwater.inspection import Graph, Inspection, Linear, Norm, Operation, Shift, inspect_graph
from flatwater.inspection.graph import Part
from flatwater.onnx.model import load_onnx

__all__ = ["attributes_of", "graph_of", "graphs_of", "inspect_onnx", "node_name"]

_NORMS = {
    "BatchNormalization": "batch_norm",
    "InstanceNormalization": "instance_norm",
    "GroupNormalization": "group_norm",
    "LayerNormalization": "layer_norm",
    "RMSNormalization": "rms_norm",
}


def inspect_onnx(path: str | Path) -> Inspection:
    """The norm nodes of an ONNX file: whether each could be folded, and which are in training mode.

    A ``BatchNormalization`` node is in training mode with ``training_mode=1``; before operator set 14 with more than
    one output, and before 7 unless it says ``is_test=1``.

    Raises:
        CheckpointError: see :func:`~flatwater.onnx.load_onnx`.
    """
    model = load_onnx(Path(path), weights=False)
    versions = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
    return inspect_graph(str(path), f"ONNX ({versions})", graph_of(model))


def graph_of(model: onnx.ModelProto) -> Graph:
    """The graph with all that is nested in it: names of tensors are unique over all of it.

    An Identity is left out, and what it writes goes by the name of what it reads, unless it is an output.
    """
    model = _without_identities(model)
    shapes = _shapes(model)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    constants: set[str] = set()
    results: set[str] = set()
    operations = []
    for graph in graphs_of(model.graph):
        # From IR version 4 on, an initializer that is an input too is only a default that callers override.
        inputs = {entry.name for entry in graph.input} if model.ir_version >= 4 else set()
        constants |= {tensor.name for tensor in graph.initializer} - inputs
        constants |= {tensor.values.name for tensor in graph.sparse_initializer} - inputs
        results |= {entry.name for entry in graph.output}
    for graph in graphs_of(model.graph):
        for node in graph.node:
            nested = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
            if not nested and not node.op_type.startswith("Random") and set(filter(None, node.input)) <= constants:
                constants |= set(node.output)
            operations.append(_operation(node, _Known(constants, shapes, opset)))
    return Graph(operations, constants, results)


class _Known(NamedTuple):
    constants: set[str]
    shapes: Mapping[str, Sequence[int | None]]
    opset: int

    def rank(self, tensor: str) -> int | None:
        return len(self.shapes[tensor]) if tensor in self.shapes else None

    def size(self, tensor: str) -> int | None:
        shape = self.shapes.get(tensor)
        return shape[0] if shape is not None and len(shape) == 1 else None


def _without_identities(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    results = {entry.name for graph in graphs_of(copy.graph) for entry in graph.output}
    names: dict[str, str] = {}
    for graph in graphs_of(copy.graph):
        kept = []
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            if node.op_type == "Identity" and node.output[0] not in results:
                names[node.output[0]] = node.input[0]
            else:
                kept.append(node)
        if len(kept) < len(graph.node):
            del graph.node[:]
            graph.node.extend(kept)
    return copy


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and all that are nested in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for nested in (attribute.g, *attribute.graphs):
                if nested.node or nested.output:
                    yield from graphs_of(nested)


def _shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """Of every tensor whose rank is known; None for sizes that are not."""
    shapes: dict[str, list[int | None]] = {}
    for graph in graphs_of(onnx.shape_inference.infer_shapes(model, data_prop=True).graph):
        for entry in (*graph.input, *graph.value_info, *graph.output):
            if entry.type.tensor_type.HasField("shape"):
                dimensions = entry.type.tensor_type.shape.dim
                shapes[entry.name] = [one.dim_value if one.HasField("dim_value") else None for one in dimensions]
        shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    return shapes


def node_name(node: onnx.NodeProto) -> str:
    """Its name, or that of what it writes where it has none."""
    return str(node.name or next(filter(None, node.output), "without output"))


def _operation(node: onnx.NodeProto, known: _Known) -> Operation:
    part = _PARTS[node.op_type](node, known) if node.domain in ("", "ai.onnx") and node.op_type in _PARTS else None
    return Operation(node_name(node), node.op_type, tuple(filter(None, node.input)), tuple(node.output), part)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Those that are given, as Python's values."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _norm(node: onnx.NodeProto, known: _Known) -> Part:
    attributes = attributes_of(node)
    parameters = tuple(filter(None, node.input[1:]))
    channels = known.size(parameters[0]) if parameters else None
    # spatial=0, before operator set 9, is a norm of each element.
    axis = 1 if attributes.get("spatial", 1) else None
    statistics = None
    if node.op_type == "BatchNormalization":
        if attributes.get("training_mode"):
            statistics = "training_mode=1: it normalizes with the statistics of the batch; export from eval()"
        elif known.opset < 7 and not attributes.get("is_test"):
            statistics = "is_test=0: it normalizes with the statistics of the batch; export from eval()"
        elif sum(map(bool, node.output)) > 1:
            statistics = "it returns statistics, so it is in training mode; export from eval()"
    return Norm(_NORMS[node.op_type], node.input[0], parameters, channels, axis, statistics)


def _convolution(node: onnx.NodeProto, known: _Known) -> Part:
    attributes = attributes_of(node)
    padded = any(attributes.get("pads", ())) or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    return Linear(node.input[0], node.input[1], axis=1, even=node.op_type == "Conv" and not padded)


def _gemm(node: onnx.NodeProto, known: _Known) -> Part | None:
    attributes = attributes_of(node)
    plain = not attributes.get("transA") and attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
    if len(node.input) > 2 and node.input[2]:
        plain = plain and node.input[2] in known.constants and len(known.shapes.get(node.input[2], (0, 0))) <= 1
    if not plain:
        return None
    return Linear(node.input[0], node.input[1], axis=1, even=True)


def _product(node: onnx.NodeProto, known: _Known) -> Part | None:
    if known.rank(node.input[1]) != 2:
        return None
    rank = known.rank(node.input[0])
    return Linear(node.input[0], node.input[1], axis=None if rank is None else rank - 1, even=True)


def _sum(node: onnx.NodeProto, known: _Known) -> Part | None:
    for data, constant in (node.input, reversed(node.input)):
        if constant not in known.constants or data in known.constants:
            continue
        shape, rank = known.shapes.get(constant), known.rank(data)
        if shape is None or rank is None or len(shape) > rank:
            continue
        wide = [axis for axis, size in enumerate(shape) if size != 1]
        if len(wide) <= 1:
            return Shift(data, constant, rank - len(shape) + wide[0] if wide else None)
    return None


_PARTS = {
    **dict.fromkeys(_NORMS, _norm),
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "Gemm": _gemm,
    "MatMul": _product,
    "Add": _sum,
}
