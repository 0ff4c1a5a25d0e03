"""The folds that optimisers of ONNX files do not know, in float64, with the arithmetic of :mod:`flatwater.surgery`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from flatwater.inspection import Norm, Way, find_way
from flatwater.onnx.inspect import attributes_of, graph_of
from flatwater.surgery.arithmetic import (
    Affine,
    LinearValues,
    NormValues,
    WeightLayout,
    affine_after,
    affine_before,
    affine_of,
)

__all__ = ["absorb", "norm_values"]

_Array = npt.NDArray[Any]


def absorb(model: onnx.ModelProto) -> None:
    """Fold every batch norm for which there is a way, in place.

    A norm of a nested graph, or one with parameters that are not initializers, stays.
    """
    while _absorb_one(model):
        pass
    _drop_unread(model)


def _absorb_one(model: onnx.ModelProto) -> bool:
    graph = graph_of(model)
    nodes = {node.output[0]: node for node in model.graph.node}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for operation in graph.operations:
        if not isinstance(operation.part, Norm):
            continue
        way = find_way(graph, operation, operation.part)
        if not isinstance(way, Way):
            continue
        chain = [way.target, *(shift for shift, _ in way.shifts), operation]
        if any(one.writes[0] not in nodes for one in chain):
            continue  # of a nested graph
        target, *between, norm = (nodes[one.writes[0]] for one in chain)
        shifts = [(node, part.constant) for node, (_, part) in zip(between, way.shifts, strict=True)]
        read = [*norm.input[1:], *filter(None, target.input[1:]), *(constant for _, constant in shifts)]
        linked = [target, *between, norm] if way.after else [norm, target]
        adjoin = all(one.output[0] in two.input for one, two in itertools.pairwise(linked))
        if not adjoin or not initializers.keys() >= set(read):
            continue
        edit = _Edit(model.graph, initializers)
        if target.op_type == "BatchNormalization":
            edit.into_norm(norm, target)
        elif way.after:
            edit.into_linear_before(norm, target, shifts)
        else:
            edit.into_linear_behind(norm, target)
        model.graph.node.remove(norm)
        return True
    return False


def norm_values(node: onnx.NodeProto, initializers: dict[str, onnx.TensorProto]) -> NormValues:
    """What a BatchNormalization node computes with."""
    weight, bias, mean, variance = (_float64(initializers[name]) for name in node.input[1:5])
    return NormValues(mean, variance, weight, bias, attributes_of(node).get("epsilon", 1e-5))


def _float64(tensor: onnx.TensorProto) -> _Array:
    return np.asarray(numpy_helper.to_array(tensor), np.float64)


class _Edit:
    """One fold. New values are new initializers, as others may read the old ones."""

    def __init__(self, graph: onnx.GraphProto, initializers: dict[str, onnx.TensorProto]) -> None:
        self._graph = graph
        self._initializers = initializers

    def into_norm(self, norm: onnx.NodeProto, target: onnx.NodeProto) -> None:
        affine = affine_of(norm_values(norm, self._initializers))
        weight, bias = (_float64(self._initializers[name]) for name in target.input[1:3])
        self._replace(target, 1, weight * affine.scale)
        self._replace(target, 2, bias * affine.scale + affine.shift)
        target.output[0] = norm.output[0]

    def into_linear_before(
        self, norm: onnx.NodeProto, target: onnx.NodeProto, shifts: list[tuple[onnx.NodeProto, str]]
    ) -> None:
        affine = affine_of(norm_values(norm, self._initializers))
        linear = self._linear(target)
        if not shifts:
            self._store(target, *affine_after(linear, affine))
            target.output[0] = norm.output[0]
            return
        weight, bias = affine_after(linear, Affine(affine.scale, np.zeros_like(affine.shift)))
        self._store(target, weight, None if linear.bias is None else bias)
        for node, constant in shifts:
            last = node is shifts[-1][0]
            values = _float64(self._initializers[constant])
            channels = values.reshape(-1) * affine.scale + (affine.shift if last else 0.0)
            # A single value becomes one for each channel, on the axis on which batch norm has them.
            rank = len(linear.weight.shape)
            shape = values.shape if values.size == channels.size else (-1, *(1,) * (rank - 2))
            self._replace(node, list(node.input).index(constant), channels.reshape(shape), like=constant)
        shifts[-1][0].output[0] = norm.output[0]

    def into_linear_behind(self, norm: onnx.NodeProto, target: onnx.NodeProto) -> None:
        affine = affine_of(norm_values(norm, self._initializers))
        self._store(target, *affine_before(self._linear(target), affine))
        target.input[0] = norm.input[0]

    def _linear(self, node: onnx.NodeProto) -> LinearValues:
        weight = _float64(self._initializers[node.input[1]])
        layout: WeightLayout = "output-last"
        groups = 1
        if node.op_type == "Conv":
            layout, groups = "output-first", attributes_of(node).get("group", 1)
        elif node.op_type == "ConvTranspose":
            layout, groups = "transposed", attributes_of(node).get("group", 1)
        elif attributes_of(node).get("transB"):
            layout = "output-first"
        bias = None
        if len(node.input) > 2 and node.input[2]:
            outputs = weight.shape[0] if layout == "output-first" else weight.shape[1] * groups
            bias = np.broadcast_to(_float64(self._initializers[node.input[2]]).reshape(-1), (outputs,))
        return LinearValues(weight, bias, layout, groups)

    def _store(self, node: onnx.NodeProto, weight: _Array, bias: _Array | None) -> None:
        old = node.input[1]
        self._replace(node, 1, weight)
        if bias is not None:
            self._replace(node, 2, bias, like=old)
            if node.op_type == "MatMul":  # of rank 2, or there would have been no way
                node.op_type = "Gemm"

    def _replace(self, node: onnx.NodeProto, place: int, values: _Array, like: str | None = None) -> None:
        """Let the node read these values there, of the dtype of the initializer ``like``, by default the old one."""
        old = node.input[place] if place < len(node.input) else ""
        dtype = helper.tensor_dtype_to_np_dtype(self._initializers[like or old].data_type)
        name = stem = f"{old or node.output[0] + '.bias'}.folded"
        count = 1
        while name in self._initializers:
            count += 1
            name = f"{stem}.{count}"
        with np.errstate(over="ignore"):  # what becomes infinite does not pass the proof
            tensor = numpy_helper.from_array(np.ascontiguousarray(values.astype(dtype)), name)
        self._graph.initializer.append(tensor)
        self._initializers[name] = tensor
        while len(node.input) <= place:
            node.input.append("")
        node.input[place] = name


def _drop_unread(model: onnx.ModelProto) -> None:
    graph = graph_of(model)
    kept = [one for one in model.graph.initializer if graph.readers(one.name) or one.name in graph.results]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    # What is known of tensors that are no longer there.
    present = {tensor for operation in graph.operations for tensor in operation.writes}
    values = [one for one in model.graph.value_info if one.name in present]
    del model.graph.value_info[:]
    model.graph.value_info.extend(values)
