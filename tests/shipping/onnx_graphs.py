"""Small ONNX models: norms beside what can and what cannot take them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Nodes and their weights, in order; random values, the same every time."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(3)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int) -> str:
        """A weight whose products keep the scale of what they multiply."""
        scale = np.sqrt(max(1, np.prod(shape[1:])))
        return self.store(name, self.random.normal(size=shape) / scale)

    def store(self, name: str, values: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values, "float32"), name))
        return name

    def node(self, operator: str, reads: Sequence[str], writes: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, reads, [writes], name=f"the {writes}", **attributes))
        return writes

    def norm(self, data: str, writes: str, channels: int, **attributes: Any) -> str:
        values = {
            "scale": self.random.uniform(0.5, 1.5, channels),
            "shift": self.random.normal(0, 0.3, channels),
            "mean": self.random.normal(0, 0.3, channels),
            "variance": self.random.uniform(0.5, 2, channels),
        }
        parameters = [self.store(f"{writes}.{name}", value) for name, value in values.items()]
        return self.node("BatchNormalization", [data, *parameters], writes, **attributes)

    def model(
        self, shape: Sequence[int | str] = ("N", 4, 9, 8), *, opset: int = 14, version: int = 8
    ) -> onnx.ModelProto:
        """From the input ``x`` to the output ``y``."""
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            self.weights,
        )
        imports = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=version, producer_name="a test")
        return onnx.shape_inference.infer_shapes(model)


def conv_norm(**attributes: Any) -> Builder:
    b = Builder()
    groups = attributes.get("group", 1)
    b.node("Conv", ["x", b.weight("w", 6 if groups < 4 else 8, 4 // groups, 3, 3)], "c", **attributes)
    b.norm("c", "y", 6 if groups < 4 else 8)
    return b


def _transposed(group: int) -> onnx.ModelProto:
    b = Builder()
    b.node("ConvTranspose", ["x", b.weight("w", 4, 6 // group, 3, 3)], "c", strides=[2, 2], group=group)
    b.norm("c", "y", 6)
    return b.model()


def _gemm() -> onnx.ModelProto:
    b = Builder()
    b.node("Gemm", ["x", b.weight("w", 6, 4), b.weight("b", 6)], "c", transB=1)
    b.norm("c", "y", 6)
    return b.model(["N", 4])


def _matmul(biased: bool) -> onnx.ModelProto:
    b = Builder()
    b.node("MatMul", ["x", b.weight("w", 4, 6)], "c")
    b.norm(b.node("Add", ["c", b.weight("b", 6)], "d") if biased else "c", "y", 6)
    return b.model(["N", 4])


def _norm_conv(**attributes: Any) -> onnx.ModelProto:
    b = Builder()
    b.norm("x", "n", 4)
    b.node("Conv", ["n", b.weight("w", 6, 4 // attributes.get("group", 1), 3, 3), b.weight("b", 6)], "y", **attributes)
    return b.model()


def _norm_gemm() -> onnx.ModelProto:
    b = Builder()
    b.norm(b.node("Relu", ["x"], "r"), "n", 4)
    b.node("Gemm", ["n", b.weight("w", 6, 4)], "y", transB=1)
    return b.model(["N", 4])


def _norm_matmul() -> onnx.ModelProto:
    b = Builder()
    b.norm("x", "n", 4)
    b.node("MatMul", ["n", b.weight("w", 4, 6)], "y")
    return b.model(["N", 4])


def _norm_norm() -> onnx.ModelProto:
    b = Builder()
    b.norm(b.node("Relu", ["x"], "r"), "first", 4)
    b.norm("first", "second", 4)
    b.node("Relu", ["second"], "y")
    return b.model()


def _conv_sum_norm() -> onnx.ModelProto:
    b = Builder()
    b.node("Conv", ["x", b.weight("w", 6, 4, 3, 3)], "c")
    b.norm(b.node("Add", [b.weight("b", 1, 6, 1, 1), "c"], "d"), "y", 6)
    return b.model()


def _shared_weight() -> onnx.ModelProto:
    b = Builder()
    b.weight("w", 4, 4, 3, 3)
    b.norm(b.node("Conv", ["x", "w"], "c"), "d", 4)
    b.node("Conv", ["d", "w"], "y")
    return b.model()


def _extremes() -> onnx.ModelProto:
    b = conv_norm()
    values = {tensor.name: tensor for tensor in b.weights}
    values["y.scale"].CopyFrom(numpy_helper.from_array(np.float32([0, 1, 1, 1, 1, 1]), "y.scale"))
    values["y.variance"].CopyFrom(numpy_helper.from_array(np.float32([0, 0, 1e-30, 1, 1, 1]), "y.variance"))
    return b.model()


FOLDABLE: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv": lambda: conv_norm(pads=[1, 1, 1, 1]).model(),
    "grouped": lambda: conv_norm(group=2, strides=[2, 2]).model(),
    "depthwise": lambda: conv_norm(group=4).model(),
    "transposed": lambda: _transposed(1),
    "transposed, grouped": lambda: _transposed(2),
    "gemm": _gemm,
    "matmul": lambda: _matmul(False),
    "matmul, sum": lambda: _matmul(True),
    "conv, sum": _conv_sum_norm,
    "shared weight": _shared_weight,
    "γ of 0, variances of 0": _extremes,
    "into the conv behind": _norm_conv,
    "into the grouped conv behind": lambda: _norm_conv(group=2),
    "into the gemm behind": _norm_gemm,
    "into the matmul behind": _norm_matmul,
    "into the norm before": _norm_norm,
    "operator set 9": lambda: conv_norm().model(opset=9),
}


def _read_twice() -> onnx.ModelProto:
    b = Builder()
    b.norm(b.node("Conv", ["x", b.weight("w", 6, 4, 3, 3)], "c"), "n", 6)
    b.node("Add", ["c", "n"], "y")
    return b.model()


def _an_output_too() -> onnx.ModelProto:
    model = conv_norm().model()
    model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    return model


def _computed_weight() -> onnx.ModelProto:
    b = Builder()
    b.node("Conv", ["x", b.node("Abs", ["x"], "a")], "c")
    b.norm("c", "y", 1)
    return b.model([1, 4, 9, 8])


def _overridable() -> onnx.ModelProto:
    model = conv_norm().model()
    model.graph.input.append(helper.make_tensor_value_info("y.mean", TensorProto.FLOAT, [6]))
    return model


def _other_axis() -> onnx.ModelProto:
    b = Builder()
    b.node("MatMul", ["x", b.weight("w", 4, 6)], "c")
    b.norm("c", "y", 6)
    return b.model(["N", 6, 4])


def _instance_norm() -> onnx.ModelProto:
    b = Builder()
    b.node("Conv", ["x", b.weight("w", 6, 4, 3, 3)], "c")
    b.node("InstanceNormalization", ["c", b.weight("s", 6), b.weight("b", 6)], "y")
    return b.model()


def _training_mode() -> onnx.ModelProto:
    b = conv_norm()
    b.nodes[-1].attribute.append(helper.make_attribute("training_mode", 1))
    b.nodes[-1].output.extend(["mean", "variance"])
    return b.model()


def _training_outputs() -> onnx.ModelProto:
    b = conv_norm()
    b.nodes[-1].output.extend(["mean", "variance", "saved mean", "saved variance"])
    return b.model(opset=9)


# Each stays; the words are in the reason.
STAYS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "read twice": (_read_twice, "is read by BatchNormalization the n and Add the y"),
    "an output too": (_an_output_too, "is an output too"),
    "computed weight": (_computed_weight, "the weight of Conv the c is no constant"),
    "overridable": (_overridable, "its parameter y.mean is no constant"),
    "on another axis": (_other_axis, "lie on another axis"),
    "padded conv behind": (lambda: _norm_conv(pads=[1, 1, 1, 1]), "pads with zeros"),
    "instance norm": (_instance_norm, "its statistics are those of what it reads"),
    "training mode": (_training_mode, "training_mode=1"),
    "training mode, old": (_training_outputs, "it returns statistics"),
}
