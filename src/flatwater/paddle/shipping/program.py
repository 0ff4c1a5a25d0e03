"""Files of Paddle programs, without the model that they came from: the older format, a protobuf message, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from flatwater.errors import CheckpointError
from flatwater.inspection import Inspection, inspect_graph
from flatwater.inspection.pir import Call, graph_of_calls
from flatwater.paddle.running import parameter_dtype
from flatwater.paddle.shipping.examples import input_spec
from flatwater.paddle.shipping.forms import ModelFiles, forms_of, inference_forms, load_program, program_inputs
from flatwater.verify import Form, InputSpec

__all__ = ["Program", "inspect_legacy", "open_program"]

# Which inputs of an operator are its parameters; the tensor it works on is X or Input.
_PARAMETERS = ("Filter", "Scale", "Bias", "Mean", "Variance")


class Program(NamedTuple):
    """A program that can be run.

    Attributes:
        forms: in which it can be run here.
        inputs: what it takes.
        dtype: of its parameters.
    """

    forms: list[Form]
    inputs: list[InputSpec]
    dtype: str


def open_program(path: Path) -> Program:
    """The program in ``path``, a ``.json`` or ``.pdmodel`` file with its ``.pdiparams`` beside it.

    Only Paddle Inference runs the older format: ``paddle.jit.load`` reads it in processes that were started for it.

    Raises:
        CheckpointError: a file that is missing, or is not such a program.
    """
    prefix = path.with_suffix("")
    if path.suffix == ".json":
        files = ModelFiles(prefix)
        if not files.has_paddle:
            raise CheckpointError(f"{prefix}: there is no {files.program.name}; export the model again")
        layer = load_program(files)
        dtype = parameter_dtype(layer)
        forms = [form for form in forms_of(files, dtype) if not form.name.startswith("ONNX")]
        return Program(forms, [input_spec(spec, index) for index, spec in enumerate(program_inputs(layer))], dtype)
    parameters = prefix.with_name(prefix.name + ".pdiparams")
    if not parameters.is_file():
        raise CheckpointError(f"{parameters}: is missing beside the program; export the model again")
    blocks = _read(path).blocks
    variables = {variable.name: variable for block in blocks for variable in block.vars}
    operators = [operator for block in blocks for operator in block.ops]
    feeds = sorted((operator for operator in operators if operator.type == "feed"), key=_column)
    dtypes = {_tensor_of(variable)[1] for variable in variables.values() if variable.persistable}
    inputs = []
    for feed in feeds:
        name = feed.outputs[0].arguments[0]
        shape, dtype = _tensor_of(variables[name])
        inputs.append(InputSpec(name, [size if size > 0 else None for size in shape], dtype))
    dtype = next((dtype for dtype in ("float16", "float32", "float64") if dtype in dtypes), "float32")
    return Program(inference_forms(path, parameters, dtype), inputs, dtype)


def _column(feed: Any) -> int:
    """Which input of the program it is."""
    return next(int(attribute.i) for attribute in feed.attrs if attribute.name == "col")


def _tensor_of(variable: Any) -> tuple[list[int], str]:
    from paddle.base.proto import framework_pb2

    tensor = variable.type.dense_tensor.tensor
    word = framework_pb2.VarType.Type.Name(tensor.data_type).lower()
    return list(tensor.dims), {"fp16": "float16", "fp32": "float32", "fp64": "float64"}.get(word, word)


def inspect_legacy(path: str | Path) -> Inspection:
    """The norms of a ``.pdmodel`` file, which Paddle wrote until version 3, found without running it.

    Raises:
        CheckpointError: there is no such file, or it is not such a program.
    """
    program = _read(Path(path))
    variables = [variable for block in program.blocks for variable in block.vars]
    shapes = {variable.name: list(variable.type.dense_tensor.tensor.dims) for variable in variables}
    parameters = {variable.name: shapes[variable.name] for variable in variables if variable.persistable}
    calls = [_call(operator) for block in program.blocks for operator in block.ops]
    return inspect_graph(str(path), "Paddle program (.pdmodel)", graph_of_calls(calls, parameters, shapes))


def _read(path: Path) -> Any:
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
