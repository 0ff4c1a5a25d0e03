"""Fold the norms of every model in the zoo, each in a process of its own, and tabulate what became of them.

    python benchmarks/surgery.py                        # every model whose package is installed
    python benchmarks/surgery.py resnet18 PPLCNet_x1_0  # these
    python benchmarks/surgery.py --deploy --docs docs/folding.md --json folding.json

γ and β are drawn at random; the statistics are those of a batch, off by a fifth: as training leaves them, so that
activations keep their size, and as far from 0 and 1 as it takes for a wrong fold to show. Trained models keep theirs.

``--deploy`` exports each as well, unfolded and folded, and times both in turns in Paddle Inference and ONNX Runtime.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # as a script, the folder above is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.zoo import ZOO

__all__ = ["fold_one", "markdown", "prepare"]

Row = dict[str, Any]

TIME_LIMIT = 900
MEMORY_LIMIT = 16 << 30
"""Of addresses, of which Paddle reserves more than it uses."""

TIMED = ("Paddle Inference, IR on", "Paddle Inference, oneDNN", "ONNX Runtime, all")
_ONEDNN = ("Paddle Inference, oneDNN",)
ATTEMPTS = [(formats, without) for formats in (("paddle", "onnx"), ("paddle",)) for without in ((), _ONEDNN)]
"""What to export, and what not to compare: the first that succeeds."""

RUNS = 15
"""Of each form, unfolded and folded in turns."""

MARKERS = ("<!-- table: begin -->", "<!-- table: end -->")


# --- In the child: one model -------------------------------------------------------------------------


def prepare(model: Any, x: Any) -> None:
    """Random γ and β, and statistics near those of the batch ``x``, which a training step leaves behind."""
    import paddle

    generator = np.random.default_rng(0)
    norms = [layer for layer in model.sublayers() if hasattr(layer, "_variance")]
    momenta = [layer._momentum for layer in norms]
    for layer in norms:
        layer._momentum = 0.0
        _set(layer.weight, lambda size: generator.uniform(0.5, 1.5, size))
        _set(layer.bias, lambda size: generator.normal(0.0, 0.3, size))
    model.train()
    with paddle.no_grad():
        model(x)
    model.eval()
    for layer, momentum in zip(norms, momenta, strict=True):
        layer._momentum = momentum
        mean, variance = layer._mean.numpy(), np.maximum(layer._variance.numpy(), 1e-3)
        _set(
            layer._mean,
            lambda size, mean=mean, variance=variance: mean + 0.2 * np.sqrt(variance) * generator.normal(size=size),
        )
        _set(layer._variance, lambda size, variance=variance: variance * generator.uniform(0.8, 1.25, size))


def _set(tensor: Any, draw: Callable[[int], np.ndarray[Any, Any]]) -> None:
    if tensor is not None:
        tensor.set_value(draw(tensor.shape[0]).astype(str(tensor.dtype).removeprefix("paddle.")))


def fold_one(name: str, *, deploy: bool) -> Row:
    """Build, prepare and fold one model; what became of its norms, how exact it is, and how long it took."""
    import paddle

    import flatwater.paddle as fw
    from flatwater.paddle.kinds import BATCH_NORMS, SAMPLE_NORMS

    entry = ZOO[name]
    paddle.seed(0)
    paddle.utils.unique_name.switch()
    model = entry.build()
    x = paddle.to_tensor(np.random.default_rng(1).normal(size=entry.shape).astype(np.float32))
    if not entry.trained:
        prepare(model, x)
    row: Row = {"name": name, "package": entry.package, "shape": list(entry.shape)}
    row["batch_norms"] = sum(isinstance(layer, BATCH_NORMS) for layer in model.sublayers())
    row["sample_norms"] = sum(isinstance(layer, SAMPLE_NORMS) for layer in model.sublayers())

    unfolded = _outputs(model, x)
    row["forward"] = min(_seconds(lambda: _outputs(model, x)) for _ in range(2))
    start = time.perf_counter()
    report = fw.fold(model, x)
    row["fold"] = time.perf_counter() - start
    folded = _outputs(model, x)
    row["folded"] = len(report.norms)
    row["left"] = report.left
    row["moved"], row["tolerance"] = report.max_rel, report.tolerance
    report.undo()
    row["undone"] = all(np.array_equal(one, two) for one, two in zip(unfolded, _outputs(model, x), strict=True))
    if deploy:
        row["deployed"] = _deploy(model, entry.shape)
    exact = _exact(model, x)
    row["errors"] = None if exact is None else [_error(exact, unfolded), _error(exact, folded)]
    return row


def _outputs(model: Any, x: Any) -> list[np.ndarray[Any, Any]]:
    import paddle

    from flatwater.paddle.running import flatten

    with paddle.no_grad():
        return [tensor.numpy() for tensor in flatten(model(x))]


def _exact(model: Any, x: Any) -> list[np.ndarray[Any, Any]] | None:
    """The outputs in float64; None where the model's code is written for float32."""
    try:
        return _outputs(model.to(dtype="float64"), x.astype("float64"))
    except Exception:  # whatever a model raises that makes float32 tensors of its own
        return None


def _error(exact: Sequence[np.ndarray[Any, Any]], outputs: Sequence[np.ndarray[Any, Any]]) -> float:
    return max(float(np.abs(one - two).max() / np.abs(one).max()) for one, two in zip(exact, outputs, strict=True))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _deploy(model: Any, shape: Sequence[int]) -> Row:
    """Export unfolded and folded; ONNX nodes, and the median latency of each in Paddle Inference and ONNX Runtime.

    What cannot be exported is left out, and what was said of it stands under ``refused``.
    """
    import onnx
    import paddle

    import flatwater.paddle as fw
    from flatwater.errors import FlatwaterError
    from flatwater.paddle.shipping.forms import ModelFiles, forms_of

    spec = [paddle.static.InputSpec(list(shape), "float32", "x")]
    arrays = [np.random.default_rng(2).normal(size=shape).astype(np.float32)]
    found: Row = {"nodes": {}, "batch_norms": {}, "seconds": {}, "refused": {}}
    runs: dict[tuple[str, str], Callable[[Any], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for state, fold in (("unfolded", False), ("folded", True)):
            files = ModelFiles(Path(folder) / state)
            for formats, without in ATTEMPTS:
                try:
                    fw.export(model, files.prefix, spec, formats, fold=fold, without=without)
                except FlatwaterError as error:  # noqa: PERF203 # four tries at the most
                    found["refused"].setdefault(_complaint(str(error)), []).append(state)
                else:
                    break
            else:
                continue
            if files.onnx.is_file():
                nodes = Counter(node.op_type for node in onnx.load(str(files.onnx)).graph.node)
                found["nodes"][state] = sum(nodes.values())
                found["batch_norms"][state] = nodes["BatchNormalization"]
            timed = [form for form in forms_of(files, "float32") if form.name in TIMED and form.name not in without]
            runs |= {(form.name, state): form.load() for form in timed}
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(RUNS + 2):
            for key, run in runs.items():
                times.setdefault(key, []).append(_seconds(lambda run=run: run(arrays)))
    for (form, state), seconds in times.items():
        found["seconds"].setdefault(form, {})[state] = statistics.median(seconds[2:])  # after two to warm up
    return found


# --- In the parent: all of them ----------------------------------------------------------------------


def run_child(name: str, *, deploy: bool) -> Row:
    """``fold_one`` in a process that may fail, hang or grow without hurting the others."""
    entry = ZOO[name]
    for package in (entry.package, *entry.beside):
        if util.find_spec(package) is None:
            return {"name": name, "package": entry.package, "error": f"{package} is not installed"}
    command = [sys.executable, __file__, "--child", *(["--deploy"] if deploy else []), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, preexec_fn=_limit_memory)
    except subprocess.TimeoutExpired:
        return {"name": name, "package": entry.package, "error": f"not done after {TIME_LIMIT} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    complaints = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
    return {"name": name, "package": entry.package, "error": complaints[-1][:300]}


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))


def reasons(left: Mapping[str, str]) -> str:
    """Why norms were left, those of one kind together: ``26 × LayerNorm normalizes each sample by itself``."""
    alike = Counter(re.sub(r"'[^']*'( and '[^']*')*", "…", _number.sub("…", reason)) for reason in left.values())
    return "; ".join(f"{count} × {reason}" for reason, count in alike.most_common())


_number = re.compile(r"(?<![\w.])\d[\d.e+-]*")


def cells(row: Row) -> list[str]:
    """One row of the table, as text."""
    size = "×".join(map(str, row["shape"]))
    errors = "–" if row["errors"] is None else " → ".join(f"{error:.1e}" for error in row["errors"])
    found = str(row["batch_norms"]) + (f" + {row['sample_norms']}" if row["sample_norms"] else "")
    return [
        row["name"], row["package"], size, found, str(row["folded"]), str(len(row["left"])), reasons(row["left"]),
        f"{row['moved']:.1e}", errors,
    ]  # fmt: skip


HEADINGS = ("architecture", "package", "input", "norms", "folded", "left", "why", "moved", "error before → after")


def markdown(rows: Sequence[Row]) -> str:
    """The tables as Markdown."""
    done = [row for row in rows if "error" not in row]
    lines = [
        f"{len(done)} models, {sum(row['batch_norms'] for row in done)} batch norms: "
        f"{sum(row['folded'] for row in done)} folded.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
        *(f"| {' | '.join(cells(row))} |" for row in done),
    ]
    deployed = [row for row in done if "deployed" in row]
    if deployed:
        heads = ["architecture", "ONNX nodes", "of them BatchNormalization", *(f"{form}, ms" for form in TIMED)]
        lines += ["", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        lines += [f"| {' | '.join([row['name'], *_deployed_cells(row['deployed'])])} |" for row in deployed]
        refused = [
            f"- {row['name']}, {' and '.join(dict.fromkeys(states))}: {complaint}"
            for row in deployed
            for complaint, states in row["deployed"]["refused"].items()
        ]
        if refused:
            lines += ["", "What `fw.export` refused (–), and why:", "", *refused]
    failed = [row for row in rows if "error" in row]
    if failed:
        lines += ["", "Not measured:", "", *(f"- {row['name']} ({row['package']}): {row['error']}" for row in failed)]
    return "\n".join(lines)


def _deployed_cells(found: Row) -> list[str]:
    def both(values: Mapping[str, Any], form: Callable[[Any], str] = str) -> str:
        return " → ".join(form(values[state]) if state in values else "–" for state in ("unfolded", "folded"))

    times = [both(found["seconds"].get(form, {}), lambda seconds: f"{seconds * 1e3:.2f}") for form in TIMED]
    return [both(found["nodes"]), both(found["batch_norms"]), *times]


def _complaint(text: str) -> str:
    """The first clause of an export's error, without the model's name."""
    return re.sub(r"/\S*/", "", text).partition(": ")[2].partition("; ")[0][:160] or text[:160]


@click.command()
@click.argument("names", nargs=-1, metavar="[NAMES]...")
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write everything there.")
@click.option("--docs", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Renew the table in it.")
@click.option("--deploy", is_flag=True, help="Export and time each as well.")
@click.option("--child", is_flag=True, hidden=True)
def command(names: Sequence[str], target: Path | None, docs: Path | None, *, deploy: bool, child: bool) -> None:
    """Fold NAMES, all models if none is given, and print what became of their norm layers."""
    unknown = [name for name in names if name not in ZOO]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: not among {', '.join(ZOO)}")
    if child:
        click.echo(json.dumps(fold_one(names[0], deploy=deploy)))
        return
    os.environ.setdefault("GLOG_minloglevel", "2")
    rows: list[Row] = []
    console = Console()
    with console.status("") as status:
        for number, name in enumerate(names or ZOO):
            status.update(f"{name} ({number + 1} of {len(names or ZOO)})")
            rows.append(run_child(name, deploy=deploy))
            if target:  # after each: what is measured is kept whatever happens to the next
                target.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    table = Table(*(heading for heading in HEADINGS if heading != "why"), box=box.SIMPLE_HEAD)
    for row in rows:
        if "error" not in row:
            table.add_row(*(cell for heading, cell in zip(HEADINGS, cells(row), strict=True) if heading != "why"))
    console.print(table)
    for row in rows:
        if why := row.get("error") or reasons(row["left"]):
            console.print(f"{row['name']}: {why}", highlight=False, markup=False)
    if docs:
        text = docs.read_text(encoding="utf-8")
        before, _, rest = text.partition(MARKERS[0])
        after = rest.partition(MARKERS[1])[2]
        docs.write_text(f"{before}{MARKERS[0]}\n{markdown(rows)}\n{MARKERS[1]}{after}", encoding="utf-8")
    sys.exit(any("error" in row and "not installed" not in row["error"] for row in rows))


if __name__ == "__main__":
    command()
