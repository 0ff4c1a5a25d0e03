"""Loading ONNX files."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from flatwater.errors import CheckpointError

__all__ = ["load_onnx", "weight_dtype"]


def load_onnx(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Parse an ONNX file.

    Args:
        path: the file.
        weights: also read the weights that lie in files beside it.

    Raises:
        CheckpointError: there is no such file, or it is not an ONNX model, or its weights are missing.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give the .onnx file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; give an ONNX model")
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise CheckpointError(f"{path}: is not an ONNX model, or it was cut short; export it again") from error
    # Protobuf takes many a file that is something else for a message without content.
    if not model.ir_version or not model.opset_import or not model.graph.node:
        raise CheckpointError(f"{path}: is not an ONNX model (it holds no graph); export it again")
    if weights:
        try:
            onnx.load_external_data_for_model(model, str(path.absolute().parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: its weights are in another file that cannot be read ({reason})") from error
    return model


def weight_dtype(model: onnx.ModelProto) -> str:
    """The least exact float among the weights."""
    present = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    words = {"BFLOAT16": "bfloat16", "FLOAT16": "float16", "FLOAT": "float32", "DOUBLE": "float64"}
    return next((dtype for word, dtype in words.items() if word in present), "float32")
