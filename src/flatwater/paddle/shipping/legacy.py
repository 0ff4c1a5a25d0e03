"""The older format of Paddle programs, ``.pdmodel``, a protobuf message."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flatwater.errors import CheckpointError
from flatwater.inspection import Graph, Inspection, inspect_graph
from flatwater.inspection.pir import Call, graph_of_calls
from flatwater.verify import InputSpec

__all__ = [
    "inspect_legacy",
    "legacy_dtype",
    "legacy_graph",
    "legacy_inputs",
    "legacy_outputs",
    "legacy_tensors",
    "read_legacy",
    "return_from_legacy",
]

# Which inputs of an operator are its parameters; the tensor it works on is X or Input.
_PARAMETERS = ("Filter", "Scale", "Bias", "Mean", "Variance")
_FLOATS = ("float16", "float32", "float64")


def inspect_legacy(path: str | Path) -> Inspection:
    """The norms of a ``.pdmodel`` file, which Paddle wrote until version 3, found without running it.

    Raises:
        CheckpointError: there is no such file, or it is not such a program.
    """
    return inspect_graph(str(path), "Paddle program (.pdmodel)", legacy_graph(read_legacy(Path(path))))


def read_legacy(path: Path) -> Any:
    """The whole program.

    Raises:
        CheckpointError: there is no such file, or it is not such a program.
    """
    from google.protobuf.message import DecodeError
    from paddle.base.proto import framework_pb2

    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; give an exported program")
    program = framework_pb2.ProgramDesc()
    try:
        program.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{path}: is not a Paddle program, or it was cut short; export it again") from error
    if not any(block.vars for block in program.blocks):
        raise CheckpointError(f"{path}: is not a Paddle program (it holds no variables); export it again")
    return program


def legacy_graph(program: Any) -> Graph:
    """The graph of a program."""
    variables = _variables(program)
    shapes = {name: _tensor_of(variable)[0] for name, variable in variables.items()}
    parameters = {name: shapes[name] for name, variable in variables.items() if _is_parameter(variable)}
    calls = [_call(operator) for block in program.blocks for operator in block.ops]
    return graph_of_calls(calls, parameters, shapes)


def legacy_inputs(program: Any) -> list[InputSpec]:
    """What the program takes."""
    variables = _variables(program)
    inputs = []
    for operator in sorted((one for one in program.blocks[0].ops if one.type == "feed"), key=_column):
        name = operator.outputs[0].arguments[0]
        shape, dtype = _tensor_of(variables[name])
        inputs.append(InputSpec(name, [size if size > 0 else None for size in shape], dtype))
    return inputs


def legacy_dtype(program: Any) -> str:
    """The least exact float among the parameters."""
    dtypes = {_tensor_of(variable)[1] for variable in _variables(program).values() if _is_parameter(variable)}
    return next((dtype for dtype in _FLOATS if dtype in dtypes), "float32")


def legacy_outputs(program: Any) -> list[str]:
    """The tensors that the program returns."""
    fetches = sorted((one for one in program.blocks[0].ops if one.type == "fetch"), key=_column)
    return [operator.inputs[0].arguments[0] for operator in fetches]


def legacy_tensors(program: Any) -> list[str]:
    """The tensors that it could be made to return: the first that each operator writes, where that is of floats."""
    variables = _variables(program)
    written = [
        _call(operator).writes[:1] for operator in program.blocks[0].ops if operator.type not in ("feed", "fetch")
    ]
    return [name for (name,) in filter(None, written) if _tensor_of(variables[name])[1] in _FLOATS]


def return_from_legacy(program: Any, tensors: Sequence[str]) -> bytes:
    """The file of a program that returns these tensors besides its own outputs, behind them."""
    changed = type(program)()
    changed.CopyFrom(program)
    block = changed.blocks[0]
    fetch = next(operator for operator in program.blocks[0].ops if operator.type == "fetch")
    for column, name in enumerate(tensors, len(legacy_outputs(program))):
        operator = block.ops.add()
        operator.CopyFrom(fetch)
        operator.inputs[0].arguments[:] = [name]
        next(attribute for attribute in operator.attrs if attribute.name == "col").i = column
    return bytes(changed.SerializeToString())


def _is_parameter(variable: Any) -> bool:
    # The lists that inputs come from and outputs go to are kept between runs too.
    return bool(variable.persistable) and variable.type.HasField("dense_tensor")


def _variables(program: Any) -> dict[str, Any]:
    return {variable.name: variable for block in program.blocks for variable in block.vars}


def _column(feed: Any) -> int:
    """Which input of the program it is."""
    return next(int(attribute.i) for attribute in feed.attrs if attribute.name == "col")


def _tensor_of(variable: Any) -> tuple[list[int], str]:
    from paddle.base.proto import framework_pb2

    tensor = variable.type.dense_tensor.tensor
    word = framework_pb2.VarType.Type.Name(tensor.data_type).lower()
    return list(tensor.dims), {"fp16": "float16", "fp32": "float32", "fp64": "float64"}.get(word, word)


def _call(operator: Any) -> Call:
    inputs = {entry.parameter: list(entry.arguments) for entry in operator.inputs}
    outputs = {entry.parameter: list(entry.arguments) for entry in operator.outputs}
    parameters = tuple(name for key in _PARAMETERS for name in inputs.get(key, ()))
    data = tuple(name for key in ("X", "Input", "Y") for name in inputs.get(key, ()))
    others = tuple(name for key in inputs for name in inputs[key] if name not in parameters and name not in data)
    main = [name for key in ("Y", "Out", "Output") for name in outputs.get(key, ())]
    writes = tuple(dict.fromkeys([*main, *(name for names in outputs.values() for name in names)]))
    writes = tuple(name for name in writes if name not in parameters)  # statistics that a norm writes back
    attributes = {attribute.name: _value(attribute) for attribute in operator.attrs}
    name = writes[0] if writes else operator.type
    if "Mean" in inputs:
        name = inputs["Mean"][0].rsplit(".", 1)[0]
    return Call(operator.type, name, data + others, parameters, writes, attributes)


def _value(attribute: Any) -> Any:
    """The one field of the message that its type names."""
    for field in ("b", "i", "l", "f", "float64", "s", "ints", "longs"):
        repeated = field.endswith("s") and field != "s"
        if not repeated and attribute.HasField(field):
            return getattr(attribute, field)
        if repeated and getattr(attribute, field):
            return list(getattr(attribute, field))
    return None
