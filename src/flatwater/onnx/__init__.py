"""Files in the ONNX format, of whatever origin: what norms are in them, and their folding. Needs no framework."""

from flatwater.errors import BackendError

try:
    import onnx  # noqa: F401
except ImportError as error:
    raise BackendError("onnx is not installed; pip install 'flatwater[onnx]'") from error

from flatwater.onnx.fold import OnnxFoldReport, fold_onnx
from flatwater.onnx.inspect import inspect_onnx
from flatwater.onnx.model import load_onnx, weight_dtype
from flatwater.onnx.runtime import onnx_forms, onnx_inputs, open_onnx

__all__ = [
    "OnnxFoldReport",
    "fold_onnx",
    "inspect_onnx",
    "load_onnx",
    "onnx_forms",
    "onnx_inputs",
    "open_onnx",
    "weight_dtype",
]
