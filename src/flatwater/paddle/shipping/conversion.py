"""From an exported Paddle program to ONNX, with paddle2onnx in a process of its own.

Where paddle2onnx meets something that it cannot convert (a channels-last convolution, for one), it aborts the
process that it runs in. That must not be the user's.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from flatwater.errors import BackendError, ExportError

__all__ = ["convert_to_onnx", "count_batch_norms", "require_onnx"]

# The oldest operator set that has everything that image networks need; old runtimes read it too.
_OPSET = 13

# With a file to save to, paddle2onnx runs Polygraphy, which pip-installs packages; so take the bytes.
_SCRIPT = f"""
import sys, warnings
warnings.simplefilter("ignore")
import paddle2onnx
program, parameters, target = sys.argv[1:]
content = paddle2onnx.export(program, parameters, None, opset_version={_OPSET}, enable_optimize=False)
with open(target, "wb") as file:
    file.write(content)
"""


def require_onnx() -> None:
    """Ask for every package before the work is done, not after it.

    Raises:
        BackendError: one of them is not installed.
    """
    for package in ("paddle2onnx", "onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise BackendError(f"{package} is not installed; pip install 'flatwater[onnx]', or formats=('paddle',)")


def convert_to_onnx(program: Path, parameters: Path, target: Path, name: str) -> None:
    """Convert a program and its parameters into ``target``.

    Raises:
        ExportError: paddle2onnx cannot convert the model called ``name``, or ``target`` cannot be written.
    """
    command = [sys.executable, "-c", _SCRIPT, str(program), str(parameters), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0 or not target.is_file():
        raise ExportError(
            f"paddle2onnx cannot convert {name} ({_reason(result.stdout + result.stderr)}); "
            "change that part of the model, or use formats=('paddle',)"
        )


def count_batch_norms(file: Path) -> int:
    """How many BatchNormalization nodes an ONNX file holds."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    return sum(node.op_type == "BatchNormalization" for node in graph.node)


def _reason(log: str) -> str:
    """What paddle2onnx complained of, else the last thing that was said."""
    complaints = re.findall(r"\[ERROR\]\s*(?:\[Paddle2ONNX\])?\s*(.+)", log)
    lines = complaints or [line for line in log.splitlines() if line.strip()] or ["it said nothing"]
    return lines[0 if complaints else -1].strip().rstrip(".")
