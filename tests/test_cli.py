"""The command line as a user meets it: exit codes, one-line errors, no traceback unless asked."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flatwater
from flatwater import host


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flatwater", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"flatwater {flatwater.__version__}\n")


def test_help_imports_no_framework() -> None:
    code = (
        "import sys\nfrom flatwater import cli\nsys.argv = ['flatwater', 'ocr', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'paddle', 'onnxruntime', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_host_names_every_setting() -> None:
    result = run("host", COLUMNS="80")
    assert result.returncode == 0
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    for decision in host.decisions():
        assert decision.variable in result.stdout


def test_host_says_the_same_to_a_machine() -> None:
    result = run("host", "--json", OMP_NUM_THREADS="7")
    assert result.returncode == 0
    found = json.loads(result.stdout)
    assert found["host"] == dataclasses.asdict(host.Host.look())
    settings = {setting["variable"]: setting for setting in found["settings"]}
    assert list(settings) == [decision.variable for decision in host.decisions()]
    assert (settings["OMP_NUM_THREADS"]["present"], settings["OMP_NUM_THREADS"]["state"]) == ("7", "yours")


def test_run_says_what_it_found_and_set_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GLIBC_TUNABLES", *(decision.variable for decision in host.decisions())):
        monkeypatch.delenv(variable, raising=False)
    result = run("run", "--", sys.executable, "-c", "print('output')", OMP_NUM_THREADS="7", COLUMNS="160")
    assert result.stdout == "output\n"
    found, *settings = result.stderr.splitlines()
    assert "CPU" in found
    for line, decision in zip(settings, host.decisions(), strict=True):
        setting, state, *_ = line.split()
        if decision.variable == "OMP_NUM_THREADS":
            assert (setting, state) == ("OMP_NUM_THREADS=7", "yours")
        elif decision.value is not None:
            assert setting == f"{decision.variable}={decision.value}"
            assert state in ("set", "already")


def test_run_passes_the_commands_own_options_and_exit_code_through() -> None:
    result = run("run", "--", sys.executable, "-c", "import sys; sys.exit(len(sys.argv) + 40)", "--debug", "-x")
    assert result.returncode == 43


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import sys; print(sys.argv[1:])", "--debug", "--", "--help"], ["--help"], ["-h", "--debug"]],
    ids=" ".join,
)
def test_options_after_a_command_are_its_own_without_dashes_before_it_too(arguments: list[str]) -> None:
    program = [sys.executable, *arguments]
    alone = subprocess.run(program, capture_output=True, text=True, timeout=120)
    result = run("run", *program)
    assert (result.stdout, result.returncode) == (alone.stdout, alone.returncode)


def test_options_before_a_command_are_flatwaters() -> None:
    for option in ("-h", "--help"):
        assert run("run", option, sys.executable, "-V").stdout.startswith("Usage: flatwater run")
    result = run("run", "--verbose", sys.executable, "-V")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--verbose" in result.stderr
    assert "Traceback" in run("run", "--debug", "no-such-program").stderr


def test_a_command_that_cannot_be_started_ends_as_in_a_shell(tmp_path: Path) -> None:
    plain, script, orphan = tmp_path / "plain", tmp_path / "script", tmp_path / "orphan"
    plain.write_text("#!/bin/sh\n", encoding="utf-8")
    script.write_text("no interpreter\n", encoding="utf-8")
    orphan.write_text("#!/no/such/interpreter\n", encoding="utf-8")
    script.chmod(0o755)
    orphan.chmod(0o755)
    programs = ("no-such-program", "", plain, tmp_path, script, orphan)
    for program, status in zip(programs, (127, 127, 126, 126, 126, 127), strict=True):
        result = run("run", "--", str(program))
        assert result.returncode == status, program
        assert result.stderr.splitlines()[-1].startswith(f"flatwater: cannot run '{program}'")


def test_a_number_of_ranks_that_is_none_is_named() -> None:
    for arguments in (["host"], ["run", "--", sys.executable, "-V"]):
        result = run(*arguments, PADDLE_LOCAL_SIZE="abc")
        assert (result.returncode, result.stdout) == (1, "")
        assert "PADDLE_LOCAL_SIZE='abc'" in result.stderr
        assert "fault" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["ocr", "train", "--outptu", "x"], "--outptu"),
        (["ocr", "read", "--model", "x"], "IMAGE"),
        (["ocr", "train", "--config", "{missing}.yaml"], "{missing}.yaml"),
        (["ocr", "train", "--output", "{missing}", "norm.momentun=0.9"], "momentun"),
        (["ocr", "train", "--output", "{missing}", "seed"], "seed"),
        (["ocr", "train", "--output", "{missing}", "--resume"], "{missing}"),
        (["ocr", "read", "{missing}.png", "--model", "{missing}"], "{missing}"),
        (["run", "--", "{missing}"], "{missing}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_names_it(arguments: list[str], named: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    settings = {setting.variable: setting.value for setting in host.settings()}
    result = run(*[argument.format(missing=missing) for argument in arguments], **settings)
    assert result.returncode not in (0, 130)
    assert "Traceback" not in result.stderr
    assert named.format(missing=missing) in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    result = run("ocr", "read", str(tmp_path / "x.png"), "--model", str(tmp_path / "nowhere"), "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
