"""The commands for exported models, of any origin: ``inspect``, ``fold`` and ``verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from flatwater.files import write_whole
from flatwater.models import inspect_models, verify_models
from flatwater.quiet import quiet
from flatwater.verify import verify_page

__all__ = ["FOUND", "fold_command", "inspect_command", "verify_command"]

FOUND = 3
"""The exit code of a check that ran and found what it looked for; 1 is an error and 2 a wrong command line."""


@click.command("inspect", short_help="Which norms an exported model holds, which could be folded.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@click.option(
    "--fail-on",
    type=click.Choice(["foldable", "training", "norms"]),
    multiple=True,
    help="Exit with 3 if there is a norm that could be folded, one in training mode, or any. May be given again.",
)
def inspect_command(path: Path, as_json: bool, fail_on: tuple[str, ...]) -> int:
    """Print which norms the exported model at PATH holds, whether each could be folded, and which are in training mode.

    PATH is an .onnx file, a Paddle program (.json or .pdmodel), the prefix of such files, or a folder with some.
    Nothing is executed.

    Exit code: 0, or 3 if something was found that --fail-on names; 1 for an error, as a file that is not a model.
    """
    with quiet():
        found = inspect_models(path)
    if as_json:
        print(json.dumps({"models": [one.as_dict() for one in found]}, ensure_ascii=False))
    else:
        for one in found:
            Console().print(one)
    listed = {name: any(getattr(one, name) for one in found) for name in ("foldable", "training", "norms")}
    return FOUND if any(listed[name] for name in fail_on) else 0


_inputs = click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="An .npy file for each input in order (give the option again), or one .npz. Default: random numbers.",
)
_batch = click.option(
    "--batch",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 2, 17),
    show_default=True,
    help="A batch size to compare at; may be given again.",
)
_tolerance = click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="How far an output may be off, relative to its scale. Default: 1e-4 for float32, see docs/verify.md.",
)


@click.command("fold", short_help="Fold the batch norms of an ONNX file, and prove the result.")
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.onnx")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to write.")
@_inputs
@_batch
@_tolerance
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def fold_command(
    model: Path,
    output: Path,
    inputs: tuple[Path, ...],
    batch: tuple[int, ...],
    tolerance: float | None,
    as_json: bool,
) -> None:
    """Fold the batch norms of MODEL.onnx into what stands beside them.

    The result is compared with MODEL.onnx in ONNX Runtime, and only written if they agree.
    """
    from flatwater.onnx import fold_onnx

    report = fold_onnx(model, output, inputs=inputs, batch_sizes=batch, tolerance=tolerance)
    print(json.dumps(report.as_dict(), ensure_ascii=False) if as_json else report)


@click.command("verify", short_help="Compare every form of an exported model on the same inputs.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The model that is right. Default: the Paddle program of PATH itself, else its ONNX file unoptimised.",
)
@_inputs
@_batch
@_tolerance
@click.option(
    "--without",
    multiple=True,
    metavar="FORM",
    help="A form that is not compared, by its name in the table; may be given again.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Also write the table as a page.")
def verify_command(
    path: Path,
    against: Path | None,
    inputs: tuple[Path, ...],
    batch: tuple[int, ...],
    tolerance: float | None,
    without: tuple[str, ...],
    as_json: bool,
    html: Path | None,
) -> int:
    """Run the same inputs through every form of the exported model at PATH, and compare.

    PATH is the prefix that fw.export was given, a folder with one model, or a file. Forms: the reloaded Paddle program,
    Paddle Inference with its IR passes off, on, and on with oneDNN, ONNX Runtime at each optimisation level.

    Exit code: 0 if all agree, 3 if not, 1 for an error, as a file that is not a model.
    """
    with quiet():
        report = verify_models(path, inputs, against=against, batch_sizes=batch, tolerance=tolerance, without=without)
    if html is not None:
        write_whole(html, verify_page(report, str(path)))
    if as_json:
        print(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        Console().print(report)
    return 0 if report.passed else FOUND
