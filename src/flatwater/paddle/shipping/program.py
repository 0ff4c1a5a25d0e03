"""Files of Paddle programs, without the model that they came from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from flatwater.errors import CheckpointError
from flatwater.paddle.running import parameter_dtype
from flatwater.paddle.shipping.examples import input_spec
from flatwater.paddle.shipping.forms import ModelFiles, forms_of, inference_forms, load_program, program_inputs
from flatwater.paddle.shipping.legacy import legacy_dtype, legacy_inputs, read_legacy
from flatwater.verify import Form, InputSpec

__all__ = ["Program", "open_program"]


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
    program = read_legacy(path)
    dtype = legacy_dtype(program)
    return Program(inference_forms(path, parameters, dtype), legacy_inputs(program), dtype)
