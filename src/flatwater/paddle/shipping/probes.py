"""Looking into the files of Paddle programs: copies that return more tensors than the program does."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from flatwater.inspection import Graph
from flatwater.inspection.pir import pir_graph, read_pir
from flatwater.paddle.shipping.legacy import (
    legacy_graph,
    legacy_outputs,
    legacy_tensors,
    read_legacy,
    return_from_legacy,
)
from flatwater.verify import Arrays, Inside, Run

__all__ = ["Load", "look_into"]

Load: TypeAlias = Callable[[Path, Path], Run]
"""Makes a program, given by its two files, ready to run."""

_PIR_FLOATS = ("0.t_f32", "0.t_f64", "0.t_f16")


class _Probed(NamedTuple):
    """A program that can be written so that it returns more.

    Attributes:
        graph: of the program.
        tensors: what it can be made to return.
        outputs: what it returns.
        write: the file of a program that returns these tensors behind its outputs.
    """

    graph: Graph
    tensors: list[str]
    outputs: list[str]
    write: Callable[[Sequence[str]], bytes]


def look_into(program: Path, parameters: Path, plain: Load, load: Load) -> Inside:
    """The inside of a form that runs the program in these files.

    Raises:
        CheckpointError: the file is not a program.
    """
    probed = _pir(program) if program.suffix == ".json" else _legacy(program)
    tensors = [name for name in probed.tensors if name not in probed.graph.constants]

    def returning(load: Load, names: Sequence[str]) -> Run:
        more = [name for name in names if name not in probed.outputs]
        returned = [*probed.outputs, *more]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"probed{program.suffix}"
            file.write_bytes(probed.write(more))
            beside = file.with_suffix(".pdiparams")
            beside.symlink_to(parameters.absolute())
            run = load(file, beside)

        def call(inputs: Arrays) -> Arrays:
            values = run(inputs)
            return [values[returned.index(name)] for name in names]

        return call

    return Inside(probed.graph, tensors, functools.partial(returning, plain), functools.partial(returning, load))


def _pir(path: Path) -> _Probed:
    content = read_pir(path)
    graph = pir_graph(content, path)
    # Tensors of nested blocks cannot leave them.
    operations = content["program"]["regions"][0]["blocks"][0]["ops"]
    fetches = [one for one in operations if one["#"].endswith(".fetch")]
    # What else an operator writes may not be there in eval(), as the statistics of a batch.
    written = [one["O"][0] for one in operations if one["#"] != "p" and one["I"] and one["O"] and one not in fetches]
    tensors = [f"%{value['%']}" for value in written if _pir_dtype(value) in _PIR_FLOATS]
    outputs = [f"%{one['I'][0]['%']}" for one in sorted(fetches, key=_pir_column)]
    types = {f"%{value['%']}": value["TT"] for value in written if _pir_dtype(value)}
    return _Probed(graph, tensors, outputs, functools.partial(_return_from_pir, content, types))


def _pir_dtype(value: dict[str, Any]) -> str:
    kind = value.get("TT", {})
    return str(kind["D"][0]["#"]) if kind.get("#", "").endswith("t_dtensor") else ""


def _pir_column(fetch: dict[str, Any]) -> int:
    return int(next(entry["AT"]["D"] for entry in fetch["A"] if entry["N"] == "col"))


def _return_from_pir(content: dict[str, Any], types: dict[str, Any], tensors: Sequence[str]) -> bytes:
    changed = copy.deepcopy(content)
    operations = changed["program"]["regions"][0]["blocks"][0]["ops"]
    fetches = [one for one in operations if one["#"].endswith(".fetch")]
    free = 1 + max(value["%"] for one in operations for value in ([one["O"]] if one["#"] == "p" else one["O"]))
    for index, name in enumerate(tensors):
        column = len(fetches) + index
        fetch = copy.deepcopy(fetches[0])
        for entry in fetch["A"]:
            entry["AT"]["D"] = {"name": f"probe_{column}", "col": column}[entry["N"]]
        fetch["I"] = [{"%": int(name[1:])}]
        fetch["O"] = [{"%": free + index, "TT": types[name]}]
        operations.append(fetch)
    return json.dumps(changed).encode()


def _legacy(path: Path) -> _Probed:
    program = read_legacy(path)
    return _Probed(
        legacy_graph(program),
        legacy_tensors(program),
        legacy_outputs(program),
        functools.partial(return_from_legacy, program),
    )
