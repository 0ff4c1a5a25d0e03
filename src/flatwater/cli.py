"""The command ``flatwater``: parse, call, print. What it does stands in the modules it calls.

Whatever Flatwater raises on purpose ends as one line on standard error and an exit code that is
not 0; ``--debug`` shows the traceback instead. Heavy modules are imported by the command that
needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.table import Table

import flatwater
from flatwater import cli_models, host
from flatwater.errors import FlatwaterError, LaunchError
from flatwater.quiet import quiet

__all__ = ["main"]

INTERRUPTED = 130
"""The exit code of a run that Ctrl-C ended, as shells count it: 128 + SIGINT."""


def main() -> NoReturn:
    """Run the command line and exit."""
    arguments = sys.argv[1:]
    # --debug is understood wherever it stands, so that it can simply be added to a command that failed.
    debug = "--debug" in _own(arguments)
    if debug:
        arguments.remove("--debug")
    sys.exit(_run(arguments, debug=debug))


def _own(arguments: list[str]) -> list[str]:
    """Those that are Flatwater's: up to ``--``, and of ``flatwater run`` up to the command that it runs."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    words = [place for place, argument in enumerate(own) if not argument.startswith("-")]
    return own[: words[1]] if len(words) > 1 and own[words[0]] == "run" else own


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        code = flatwater_command.main(arguments, prog_name="flatwater", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted")
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        _complain(_one_line(error))
        return error.status if isinstance(error, LaunchError) else 1
    return code if isinstance(code, int) else 0


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, FlatwaterError):
        return message
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or message}; check the path, its permissions and the free space"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("flatwater"):
        return f"this command needs the package {error.name}; pip install 'flatwater[ocr]' brings all that it needs"
    return f"{type(error).__name__}: {message} (a fault in Flatwater or below it; --debug shows where)"


def _complain(message: str) -> None:
    print(f"flatwater: {message}", file=sys.stderr)


@click.group("flatwater", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(flatwater.__version__, message="flatwater %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks; may stand after a command too.")
def flatwater_command() -> None:
    """Batch normalization you can trust, from the first training step to the deployed model."""


@flatwater_command.command("host", short_help="What this host needs to train fast; changes nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def host_command(as_json: bool) -> None:
    """Print what this host is, what it needs to train fast, and what of that is set; changes nothing."""
    found = host.Host.look()
    if as_json:
        settings = [
            {
                **decision._asdict(),
                "present": host.present(decision.variable, os.environ),
                "state": host.standing(decision, os.environ),
            }
            for decision in host.decisions(found)
        ]
        print(json.dumps({"host": dataclasses.asdict(found), "settings": settings}, ensure_ascii=False))
        return
    console = Console()
    _print_host(console, found, missing="missing")
    console.print("\n[dim]flatwater run -- COMMAND sets what is missing, and keeps what is yours.[/]", highlight=False)


@flatwater_command.command(
    "run", short_help="Run a command in that environment.", context_settings={"allow_interspersed_args": False}
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARGUMENT]...")
def run_command(command: tuple[str, ...]) -> None:
    """Run COMMAND in the environment this host needs: flatwater run -- python train.py.

    What stands after COMMAND is its own, options too. What was found and set goes to standard error. A variable that
    is set already is kept: give OMP_NUM_THREADS yourself where several processes share the machine. The exit code is
    that of COMMAND; 127 where there is none of that name, 126 where it cannot be executed.
    """
    _print_host(Console(stderr=True), host.Host.look(), missing="set")
    host.launch(command)


def _print_host(console: Console, found: host.Host, *, missing: str) -> None:
    """What was found on one line, then one for each setting; ``missing`` is the word for what is not there yet."""
    console.print(f"[bold]flatwater:[/] {_describe(found)}", highlight=False)
    table = Table.grid("setting", "state", "why", padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for decision in host.decisions(found):
        variable, value, reason = decision
        state = host.standing(decision, os.environ)
        if state == "yours":
            needed = f"this host needs {value}" if value else reason
            value, reason = host.present(variable, os.environ), f"kept; {needed}"
        style = {"missing": "bold", "yours": "yellow"}.get(state, "dim")
        shown = missing if state == "missing" else state
        table.add_row(variable if value is None else f"{variable}={value}", shown, reason, style=style)
    console.print(table)


def _describe(found: host.Host) -> str:
    """In one line."""
    limited = f" of {found.bound_to}" if found.processors < found.bound_to else ""
    kind = [
        found.vendor.removeprefix("Authentic").removeprefix("Genuine"),
        {"avx512": "AVX-512", "avx2": "AVX2"}.get(found.isa, ""),
        f"{found.cores} core{'s' * (found.cores > 1)}" if found.cores < found.bound_to else "",
    ]
    parts = [
        f"{found.processors}{limited} CPU{'s' * (found.bound_to > 1)} ({', '.join(filter(None, kind)) or 'unknown'})",
        f"{found.memory / 2**30:.3g} GiB" if found.memory else "memory unknown",
        f"{found.libc or 'unknown C library'} {found.libc_version}".strip(),
        f"malloc of {Path(found.allocator).name}" if found.allocator else "",
        "MKL 2019" if found.mkl else "",
        f"THP {found.huge_pages}" if found.huge_pages else "",
    ]
    return ", ".join(filter(None, parts))


for _command in (cli_models.inspect_command, cli_models.fold_command, cli_models.verify_command):
    flatwater_command.add_command(_command)


@flatwater_command.group("ocr", short_help="Chinese text lines: train and read.")
def ocr_group() -> None:
    """Chinese text lines, from fonts to a deployed recogniser: the worked example."""


@ocr_group.command("train")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", type=click.Path(path_type=Path), help="A YAML file; what it leaves out keeps its default.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("runs/ocr"),
    show_default=True,
    help="The folder for everything the run leaves behind.",
)
@click.option("--resume", is_flag=True, help="Go on from the folder's last checkpoint.")
def train_command(overrides: tuple[str, ...], config: Path | None, output: Path, resume: bool) -> int:
    """Render lines, train, evaluate, fold, export, verify, read samples, and write a report.

    KEY=VALUE settings go over those of the file, for instance norm.momentum=0.95.
    """
    if host.missing(os.environ):
        # The allocator and MKL read their settings when a process starts: so start it again, once.
        host.launch([sys.executable, "-m", "flatwater", *sys.argv[1:]])

    with quiet():
        from flatwater.recipes.ocr.job import run

    return 0 if run(config, overrides, output, resume=resume) else INTERRUPTED


@ocr_group.command("read")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--model", required=True, type=click.Path(path_type=Path), help="A run's folder, or its model folder.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def read_command(images: tuple[Path, ...], model: Path, as_json: bool) -> None:
    """Read pictures of one text line each with an exported model; needs no training code and no framework."""
    from flatwater.recipes.ocr.read import Reader

    for reading in Reader(model).read(images):
        if as_json:
            record = {"path": str(reading.path), "text": reading.text, "confidence": round(reading.confidence, 4)}
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(f"{reading.path}\t{reading.text}\t{reading.confidence:.3f}")
