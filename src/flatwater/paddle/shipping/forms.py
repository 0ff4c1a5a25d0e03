"""The forms of a model that run with Paddle: the live one, the reloaded program, Paddle Inference."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import paddle

from flatwater.errors import CheckpointError, InputError
from flatwater.paddle.running import Inputs, flatten, run, to_numpy
from flatwater.paddle.shipping.inference import load_inference
from flatwater.paddle.shipping.probes import Load, look_into
from flatwater.verify import Arrays, Form, Inside, Run, one_line

__all__ = ["ModelFiles", "forms_of", "inference_forms", "live_form", "load_program", "program_inputs"]


class ModelFiles:
    """The files of an exported model, by the prefix that they share.

    Raises:
        InputError: the path of one of the files instead of the prefix.
    """

    def __init__(self, prefix: str | Path) -> None:
        prefix = Path(prefix)
        if prefix.suffix in (".json", ".pdiparams", ".onnx", ".pdmodel"):
            raise InputError(f"{prefix}: give the prefix without {prefix.suffix}; each form adds its own suffix")
        if prefix.name in ("", ".."):
            raise InputError(f"{str(prefix)!r} is a folder; give a prefix such as {str(prefix / 'model')!r}")
        self.prefix = prefix
        self.program = prefix.with_name(prefix.name + ".json")
        self.parameters = prefix.with_name(prefix.name + ".pdiparams")
        self.onnx = prefix.with_name(prefix.name + ".onnx")

    @property
    def has_paddle(self) -> bool:
        """Whether there is a Paddle program.

        Raises:
            CheckpointError: there is only one of its two files.
        """
        present = [file.is_file() for file in (self.program, self.parameters)]
        if any(present) and not all(present):
            missing = (self.program, self.parameters)[present.index(False)]
            raise CheckpointError(f"{missing}: is missing beside the model's other file; export the model again")
        return all(present)

    def require(self) -> None:
        """Check that there is a model at all.

        Raises:
            CheckpointError: there is none.
        """
        if not self.has_paddle and not self.onnx.is_file():
            raise CheckpointError(
                f"{self.prefix}: there is no {self.program.name} and no {self.onnx.name}; export first"
            )


def live_form(model: paddle.nn.Layer, inputs: Inputs) -> Run:
    """The model itself, called as ``inputs`` are; in whatever mode it is."""
    names = list(inputs.kwargs)

    def call(arrays: Arrays) -> Arrays:
        tensors = [paddle.to_tensor(array) for array in arrays]
        count = len(tensors) - len(names)
        fed = Inputs(tuple(tensors[:count]), dict(zip(names, tensors[count:], strict=True)))
        return [to_numpy(tensor) for tensor in run(model, fed)]

    return call


def forms_of(files: ModelFiles, dtype: str) -> list[Form]:
    """Every form in which files with parameters of ``dtype`` can be run here."""
    forms: list[Form] = []
    if files.has_paddle:
        load = functools.partial(_run_program, files.program, files.parameters)
        forms.append(Form("paddle.jit.load", load, _inside(files.program, files.parameters, _run_program)))
        forms += inference_forms(files.program, files.parameters, dtype)
    if files.onnx.is_file():
        from flatwater.onnx import onnx_forms

        forms += onnx_forms(files.onnx)
    return forms


def inference_forms(program: Path, parameters: Path, dtype: str) -> list[Form]:
    """Paddle Inference with its IR passes off, on, and on with oneDNN, which has no float64."""

    def form(words: str, *, ir: bool, onednn: bool) -> Form:
        load = functools.partial(load_inference, ir=ir, onednn=onednn)
        inside = _inside(program, parameters, load)
        return Form(f"Paddle Inference, {words}", functools.partial(load, program, parameters), inside)

    forms = [form("IR off", ir=False, onednn=False), form("IR on", ir=True, onednn=False)]
    on_cpu = paddle.device.get_device().startswith("cpu")
    if on_cpu and dtype != "float64" and paddle.base.core.is_compiled_with_onednn():
        forms.append(form("oneDNN", ir=True, onednn=True))
    return forms


def _inside(program: Path, parameters: Path, load: Load) -> Callable[[], Inside]:
    # paddle.jit.load runs a program as it stands, but only one of the newer format.
    plain = _run_program if program.suffix == ".json" else functools.partial(load_inference, ir=False, onednn=False)
    return functools.partial(look_into, program, parameters, plain, load)


def load_program(files: ModelFiles) -> paddle.nn.Layer:
    """The reloaded program, in ``eval()``.

    Raises:
        CheckpointError: the files are not a Paddle program and its parameters.
    """
    try:
        # Paddle reads these files in C++, where not every wrong file is an exception: so look first.
        header = json.loads(files.program.read_text(encoding="utf-8"))
        if not isinstance(header, dict) or "program" not in header:
            raise ValueError("it holds no program")
    except ValueError as error:
        raise CheckpointError(
            f"{files.program}: is not a Paddle program ({one_line(error)}); export it again"
        ) from error
    try:
        program = paddle.jit.load(str(files.prefix))
    except Exception as error:  # Paddle's own errors share no class
        raise CheckpointError(
            f"{files.parameters}: does not fit {files.program.name} or is damaged ({one_line(error)}); export it again"
        ) from error
    program.eval()
    return program


def program_inputs(program: paddle.nn.Layer) -> list[paddle.static.InputSpec]:
    """Shapes, dtypes and names of a reloaded program's inputs."""
    return list(program._input_spec())


def _run_program(program: Path, parameters: Path) -> Run:
    """With ``parameters`` beside ``program``, as Paddle finds them by their common prefix."""
    layer = load_program(ModelFiles(program.with_suffix("")))

    def call(arrays: Arrays) -> Arrays:
        with paddle.no_grad():
            return [to_numpy(tensor) for tensor in flatten(layer(*map(paddle.to_tensor, arrays)))]

    return call
