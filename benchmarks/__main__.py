"""``python -m benchmarks``: run the parts, print their tables, and write everything to one JSON file."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType

from benchmarks import accuracy, kernels, layers, machine, memory, report, shapes
from benchmarks import host as host_steps
from benchmarks import sync as sync_steps
from benchmarks.small_batches_data import FOLDER
from benchmarks.small_batches_report import small_batches as small_batch_tables
from benchmarks.sync_model import Network
from benchmarks.sync_report import sync as sync_tables
from flatwater import host

__all__: list[str] = []

ACTIVATIONS = ("none", "relu", "hardswish")
NORMS = (*ACTIVATIONS, *(f"{activation}+residual" for activation in ACTIVATIONS), "group", "instance")


@dataclass(frozen=True)
class Options:
    """What to measure, and how often."""

    cases: list[shapes.Case]
    layouts: tuple[str, ...]
    norms: tuple[str, ...]
    environments: tuple[str, ...]
    torch: bool
    quick: bool
    rounds: int
    network: Network | None
    data: Path
    store: Path
    trainings: int | None
    progress: Callable[[str], object]

    @property
    def activations(self) -> tuple[Any, ...]:
        """Those of the norms that are batch norm, with or without a residual."""
        return tuple(name for name in ACTIVATIONS if {name, f"{name}+residual"} & {*self.norms})


def run_kernels(options: Options) -> dict[str, Any]:
    """The kernels alone, beside the floor."""
    return kernels.measure(
        options.cases,
        layouts=options.layouts,
        activations=options.activations,
        others=tuple(norm for norm in options.norms if norm in kernels.GROUPED),
        count=options.rounds,
        progress=options.progress,
    )


def run_layers(options: Options) -> dict[str, Any]:
    """The layers in a model, beside Paddle's and PyTorch's."""
    return layers.measure(
        options.cases,
        layouts=options.layouts,
        norms=options.norms,
        environments=options.environments,
        torch=options.torch,
        count=options.rounds,
        progress=options.progress,
    )


def run_memory(options: Options) -> dict[str, Any]:
    """Peaks, page faults, and the pool, on one shape of each kind: in tensors, their size makes no difference."""
    return memory.measure(
        [case for case in options.cases if case.shape in shapes.QUICK],
        layouts=options.layouts,
        environments=options.environments,
        count=1 if options.quick else 3,
        progress=options.progress,
    )


def run_accuracy(options: Options) -> dict[str, Any]:
    """Errors against float64."""
    options.progress("accuracy")
    return accuracy.measure(torch=options.torch, quick=options.quick)


def run_host(options: Options) -> dict[str, Any]:
    """Whole training steps, untuned and tuned."""
    return host_steps.measure(count=3 if options.quick else 7, progress=options.progress)


def run_sync(options: Options) -> dict[str, Any]:
    """SyncBatchNorm in training steps on two and four ranks, its sums alone, and a model of more ranks."""
    return sync_steps.measure(network=options.network, count=options.rounds, progress=options.progress)


def run_small_batches(options: Options) -> dict[str, Any]:
    """Whole trainings with statistics over shares of the batch: the accuracy that comes of it."""
    from benchmarks import small_batches  # with Paddle, whose idle threads would hurt the other parts

    return small_batches.measure(
        options.data,
        options.store,
        epochs=1 if options.quick else small_batches.EPOCHS,
        trainings=options.trainings,
        progress=options.progress,
    )


MEASURES: dict[str, tuple[Callable[[Options], dict[str, Any]], Callable[[Any], list[RenderableType]]]] = {
    "kernels": (run_kernels, report.kernels),
    "layers": (run_layers, report.layers),
    "memory": (run_memory, report.memory),
    "accuracy": (run_accuracy, report.accuracy),
    "host": (run_host, report.host),
    "sync": (run_sync, sync_tables),
    "small-batches": (run_small_batches, small_batch_tables),
}
ALL = [part for part in MEASURES if part != "small-batches"]
"""What runs unless parts are named."""


@click.command("benchmarks", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("parts", nargs=-1, type=click.Choice([*MEASURES, "all"]), metavar=f"[{'|'.join(MEASURES)}|all]...")
@click.option("--quick", is_flag=True, help="Six shapes, fewer rounds and draws: a first look, no result.")
@click.option("--model", "models", multiple=True, type=click.Choice([*shapes.MODELS]), help="Only its shapes.")
@click.option("--layout", "layouts", multiple=True, type=click.Choice(shapes.LAYOUTS), help="Only this layout.")
@click.option("--norm", "norms", multiple=True, type=click.Choice(NORMS), help="Only this activation, or norm.")
@click.option(
    "--environment", "environments", multiple=True, type=click.Choice([*machine.ENVIRONMENTS]), help="Only it."
)
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds behind each median  [default: 9; quick: 3]")
@click.option("--latency", type=click.FloatRange(min=0, min_open=True), help="Your network's, in µs: sync models it.")
@click.option("--bandwidth", type=click.FloatRange(min=0, min_open=True), help="Your network's, in GB/s.")
@click.option("--data", type=click.Path(path_type=Path), default=FOLDER, show_default=True, help="Fashion-MNIST.")
@click.option(
    "--store",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("runs/small-batches.json"),
    show_default=True,
    help="Where small-batches keeps each training, and goes on.",
)
@click.option("--trainings", type=click.IntRange(min=1), help="small-batches: stop after so many.")
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write everything there, too.")
def command(
    parts: tuple[str, ...],
    quick: bool,
    models: tuple[str, ...],
    layouts: tuple[str, ...],
    norms: tuple[str, ...],
    environments: tuple[str, ...],
    rounds: int | None,
    latency: float | None,
    bandwidth: float | None,
    data: Path,
    store: Path,
    trainings: int | None,
    target: Path | None,
) -> None:
    """Measure Flatwater's normalization beside its limits and its alternatives.

    Without a part, all but small-batches, whose trainings take an hour and data from elsewhere.
    """
    network = _network(latency, bandwidth)
    if host.missing(os.environ):  # read when a process starts, so it has to start again
        host.launch([sys.executable, "-m", "benchmarks", *sys.argv[1:]])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that workers are ended

    cases = shapes.cases(models, quick=quick)
    if not cases:
        raise click.UsageError(f"--quick leaves no shape of {', '.join(models)}; name another model, or leave it out")
    console = Console(width=max(100, Console().width) if not sys.stdout.isatty() else None)
    torch = util.find_spec("torch") is not None
    document: dict[str, Any] = {"machine": machine.describe(), "parts": {}}
    console.print(machine.summary(document["machine"]), highlight=False)
    if not torch:
        console.print(
            "PyTorch is not installed: its columns are missing. pip install '.[bench]' brings it.", markup=False
        )
    with console.status("") as status:
        options = Options(
            cases=cases,
            layouts=layouts or shapes.LAYOUTS,
            norms=norms or NORMS,
            environments=environments or tuple(machine.ENVIRONMENTS),
            torch=torch,
            quick=quick,
            rounds=rounds or (3 if quick else 9),
            network=network,
            data=data,
            store=store,
            trainings=trainings,
            progress=status.update,
        )
        for part in dict.fromkeys(name for given in parts or ("all",) for name in (ALL if given == "all" else [given])):
            measure, tables = MEASURES[part]
            document["parts"][part] = result = measure(options)
            for table in tables(result):
                console.print(table)
            if target:  # after each part: what is measured is kept whatever happens to the next
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _network(latency: float | None, bandwidth: float | None) -> Network | None:
    """The user's network, from µs and GB/s."""
    if latency is None and bandwidth is None:
        return None
    if latency is None or bandwidth is None:
        raise click.UsageError("a network has a latency and a bandwidth; give both --latency and --bandwidth")
    return Network(latency * 1e-6, bandwidth * 1e9)


if __name__ == "__main__":
    command()
