"""The norms in a Paddle inference program: what its two formats have in common, and the newer one, which is JSON.

Nothing is executed, and Paddle is not needed: it reads these files in C++, where a damaged one may end the process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flatwater.errors import CheckpointError
from flatwater.inspection.graph import Graph, Linear, Norm, Operation, Part, Shift
from flatwater.inspection.report import Inspection
from flatwater.inspection.ways import inspect_graph

__all__ = ["Call", "batch_statistics_in_eval", "graph_of_calls", "inspect_pir", "is_pir", "pir_graph", "read_pir"]

_Record = dict[str, Any]


class Call(NamedTuple):
    """An operator of a Paddle program, as both formats tell of it.

    Attributes:
        operator: its name without dialect and without the ``_`` of operators that work in place.
        name: the layer that it came from, or what it writes.
        data: the tensor that it works on, then other tensors that are not its parameters.
        parameters: weight, or γ, β and statistics.
        writes: tensors.
        attributes: by name.
    """

    operator: str
    name: str
    data: tuple[str, ...]
    parameters: tuple[str, ...]
    writes: tuple[str, ...]
    attributes: Mapping[str, Any]


_KINDS = {
    "batch_norm": "batch_norm",
    "sync_batch_norm": "batch_norm",
    "instance_norm": "instance_norm",
    "group_norm": "group_norm",
    "layer_norm": "layer_norm",
    "rms_norm": "rms_norm",
}
_CONVOLUTIONS = ("conv2d", "conv3d", "depthwise_conv2d")
_TRANSPOSED = ("conv2d_transpose", "conv3d_transpose", "depthwise_conv2d_transpose")
_PRODUCTS = ("matmul", "matmul_v2", "mul")
_SUMS = ("add", "elementwise_add")
_RETURNS = ("fetch", "shadow_output")


def graph_of_calls(calls: Sequence[Call], parameters: Mapping[str, Sequence[int]], shapes: Mapping[str, Any]) -> Graph:
    """The graph of a program.

    Args:
        calls: in the order of the program.
        parameters: the shapes of what is stored with the program.
        shapes: of all other tensors, as far as they are known; -1 for sizes that are not.
    """
    constants, results = set(parameters), set()
    known = {**shapes, **parameters}
    operations = []
    for call in calls:
        if call.operator in _RETURNS:
            results |= set(call.data)
            continue
        reads = (*call.data, *call.parameters)
        if (reads and constants.issuperset(reads)) or call.operator in ("full", "full_int_array", "assign_value"):
            constants |= set(call.writes)
        operations.append(Operation(call.name, call.operator, reads, call.writes, _part(call, known, constants)))
    return Graph(operations, constants, results)


def _part(call: Call, shapes: Mapping[str, Sequence[int]], constants: set[str]) -> Part | None:
    if not call.data:
        return None
    data = call.data[0]
    rank = len(shapes[data]) if data in shapes else None
    last = None if rank is None else rank - 1
    layout = call.attributes.get("data_format") or call.attributes.get("data_layout") or "NCHW"
    axis = last if layout in ("NHWC", "NLC", "NDHWC", "NC") else 1
    if call.operator in _KINDS:
        channels = [shapes[name][0] for name in call.parameters if len(shapes.get(name, ())) == 1]
        kind = _KINDS[call.operator]
        statistics = _batch_statistics(call.attributes) if kind == "batch_norm" else None
        return Norm(kind, data, call.parameters, channels[0] if channels else None, axis, statistics)
    if call.operator in _CONVOLUTIONS + _TRANSPOSED and call.parameters:
        padded = any(call.attributes.get("paddings") or ()) or call.attributes.get("padding_algorithm") == "SAME"
        return Linear(data, call.parameters[0], axis, even=call.operator in _CONVOLUTIONS and not padded)
    if call.operator in _PRODUCTS and len(call.data) == 2 and len(shapes.get(call.data[1], ())) == 2:
        turned = any(call.attributes.get(name) for name in ("transpose_x", "transpose_y", "trans_x", "trans_y"))
        return None if turned else Linear(data, call.data[1], last, even=True)
    if call.operator in _SUMS and len(call.data) == 2:
        constant = shapes.get(call.data[1])
        if call.data[1] in constants and constant is not None and rank is not None and len(constant) <= rank:
            wide = [place for place, size in enumerate(constant) if size != 1]
            if len(wide) <= 1:
                # The older operator aligns shapes at its attribute `axis`, -1 meaning at the end.
                start = call.attributes.get("axis", -1)
                start = rank - len(constant) if start is None or start < 0 else start
                return Shift(data, call.data[1], start + wide[0] if wide else None)
    return None


def _batch_statistics(attributes: Mapping[str, Any]) -> str | None:
    """Why a batch norm does not use its running statistics; None if it does."""
    if attributes.get("use_global_stats"):
        return None
    if attributes.get("trainable_statistics"):
        return batch_statistics_in_eval("use_global_stats=False")
    if attributes.get("is_test"):
        return None
    return "is_test=False: it was captured in training mode; call eval() and export again"


def batch_statistics_in_eval(setting: str) -> str:
    """What is wrong with a batch norm that this setting makes use the batch in ``eval()``, and what to do."""
    return (
        f"{setting}: it normalizes with the statistics of the batch in eval() too, for which Paddle Inference with "
        "oneDNN, its default, uses the running ones; set use_global_stats=None and export again"
    )


def is_pir(path: Path) -> bool:
    """Whether the file is such a program, and not some other JSON."""
    try:
        with path.open(encoding="utf-8") as file:
            return '"pir"' in file.read(256)
    except (OSError, ValueError):
        return False


def read_pir(path: Path) -> _Record:
    """The whole file.

    Raises:
        CheckpointError: there is no such file, or it is not such a program.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; give an exported program")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("base_code", {}).get("magic") != "pir":
            raise ValueError("it holds no program")
        return content
    except (ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: is not a Paddle program ({reason}); export it again") from error


def inspect_pir(path: str | Path) -> Inspection:
    """The norms of a program in ``path``, the ``.json`` file that ``paddle.jit.save`` writes.

    Raises:
        CheckpointError: see :func:`read_pir`.
    """
    content = read_pir(Path(path))
    form = f"Paddle program (PIR {content['base_code'].get('version', '?')})"
    return inspect_graph(str(path), form, pir_graph(content, path))


def pir_graph(content: _Record, path: str | Path) -> Graph:
    """The graph in what :func:`read_pir` read from ``path``. Tensors are called ``%`` and their number.

    Raises:
        CheckpointError: it is not put together as such files are.
    """
    try:
        return _graph(content["program"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is a Paddle program of a form that is not known here ({type(error).__name__}: {error}); "
            "export it with Paddle 3"
        ) from error


def _graph(program: _Record) -> Graph:
    names: dict[int, str] = {}
    parameters: dict[str, list[int]] = {}
    shapes: dict[str, list[int]] = {}
    calls = []
    for record in _records(program["regions"]):
        if record["#"] == "p":
            output = record["O"]
            names[output["%"]] = record["A"][3]
            parameters[record["A"][3]] = output["TT"]["D"][1]
        else:
            calls.append(_call(record, names, shapes))
    return graph_of_calls(calls, parameters, shapes)


def _records(regions: list[_Record]) -> Iterator[_Record]:
    for region in regions:
        for block in region["blocks"]:
            for record in block["ops"]:
                yield record
                yield from _records(record.get("regions", []))


def _call(record: _Record, names: Mapping[int, str], shapes: dict[str, list[int]]) -> Call:
    def name_of(value: _Record) -> str:
        return names.get(value["%"], f"%{value['%']}")

    operator = record["#"].split(".", 1)[-1].rstrip("_")
    attributes = {entry["N"]: _value(entry["AT"]) for entry in record["A"]}
    reads = [name_of(value) for value in record["I"] if value["%"] > 0]
    outputs = record["O"]
    for value in outputs:
        if value.get("TT", {}).get("#", "").endswith("t_dtensor"):
            shapes[name_of(value)] = value["TT"]["D"][1]
    writes = tuple(name_of(value) for value in outputs)
    # A norm reads its tensor and its parameters; a convolution its tensor, its weight, and perhaps a size.
    own = len(reads) if operator in _KINDS else 2 if operator in _CONVOLUTIONS + _TRANSPOSED else 1
    parameters = tuple(reads[1:own])
    name = str(attributes.get("struct_name", "")).strip("/") or (writes[0] if writes else operator)
    if operator in _KINDS and parameters:
        name = f"{name} ({parameters[-1].rsplit('.', 1)[0]})"
    return Call(operator, name, (*reads[:1], *reads[own:]), parameters, writes, attributes)


_UNWRAP: dict[str, Callable[[Any], Any]] = {"a_array": lambda items: [_value(item) for item in items]}


def _value(attribute: _Record) -> Any:
    content = attribute.get("D")
    return _UNWRAP.get(attribute["#"].split(".", 1)[-1], lambda plain: plain)(content)
