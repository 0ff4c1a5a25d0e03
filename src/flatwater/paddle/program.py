"""The norms in a Paddle inference program of the older format, a protobuf message, found without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatwater.errors import CheckpointError
from flatwater.inspection import Inspection, inspect_graph
from flatwater.inspection.pir import Call, graph_of_calls

__all__ = ["inspect_legacy"]

# Which inputs of an operator are its parameters; the tensor it works on is X or Input.
_PARAMETERS = ("Filter", "Scale", "Bias", "Mean", "Variance")


def inspect_legacy(path: str | Path) -> Inspection:
    """The norms of a ``.pdmodel`` file, which Paddle wrote until version 3.

    Raises:
        CheckpointError: there is no such file, or it is not such a program.
    """
    from google.protobuf.message import DecodeError
    from paddle.base.proto import framework_pb2

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; give an exported program")
    program = framework_pb2.ProgramDesc()
    try:
        program.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{path}: is not a Paddle program, or it was cut short; export it again") from error
    variables = [variable for block in program.blocks for variable in block.vars]
    if not variables:
        raise CheckpointError(f"{path}: is not a Paddle program (it holds no variables); export it again")
    shapes = {variable.name: list(variable.type.dense_tensor.tensor.dims) for variable in variables}
    parameters = {variable.name: shapes[variable.name] for variable in variables if variable.persistable}
    calls = [_call(operator) for block in program.blocks for operator in block.ops]
    return inspect_graph(str(path), "Paddle program (.pdmodel)", graph_of_calls(calls, parameters, shapes))


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
