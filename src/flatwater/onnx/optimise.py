"""ONNX Runtime's own optimiser, for the folds that it knows.

What was compared, on the graphs of the tests: ONNX Runtime 1.32 at its level BASIC, onnxoptimizer 0.4.2, onnxslim
0.1.98 and onnxsim 0.8.1. All fold convolutions, grouped ones too. onnxoptimizer leaves the arithmetic as nodes in the
graph; onnxsim leaves grouped transposed convolutions; ONNX Runtime alone folds behind a ``MatMul``. None folds behind
a ``Gemm``, into what follows, or a norm into a norm: that is :mod:`flatwater.onnx.absorb`. ONNX Runtime is a package
that whoever verifies an ONNX model has anyway, and every release of it is tested on more models than any other's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from flatwater.errors import BackendError, ExportError
from flatwater.verify import one_line

__all__ = ["optimise"]


def optimise(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every simplification that holds on any hardware: ONNX Runtime's level BASIC.

    It has the same inputs, outputs and operator sets. Levels above BASIC are not for files: they put in operators of
    ONNX Runtime's own, and layouts for the processor at hand.

    Raises:
        ExportError: ONNX Runtime cannot load the model.
        BackendError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("onnxruntime is not installed; pip install 'flatwater[onnx]'") from error
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has one exception class per status code, in a private module
            raise ExportError(f"ONNX Runtime cannot load the model: {one_line(error)}") from error
        optimised = onnx.load(str(target))
    # It imports every operator set that it has, used or not.
    del optimised.opset_import[:]
    optimised.opset_import.extend(model.opset_import)
    # It takes initializers out of the inputs, where they have to be up to version 3.
    optimised.ir_version = max(model.ir_version, 4)
    return optimised
