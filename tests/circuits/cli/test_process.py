"""The command in a process of its own: help, exit codes, streams, and what it imports."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

COMMANDS = ("demo", "data", "attribute", "learn", "evaluate", "curve", "report", "tasks", "check", "info")
SOURCES = [str(folder) for folder in (Path(__file__).parents[3] / "python", Path(__file__).parents[3])]


def eap(*args: str, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "100", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "eap_circuits.cli", *args],
        text=True,
        env=environment,
        check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )
    assert result.returncode == code, (result.stdout, result.stderr)
    return result


def test_help_lists_the_commands() -> None:
    shown = eap("--help").stdout
    assert all(re.search(rf"\b{command}\b", shown) for command in COMMANDS)
    bare = eap(code=2)
    assert bare.stderr + bare.stdout != ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_teaches(command: str) -> None:
    result = eap(command, "--help")
    assert result.stderr == ""
    assert result.stdout.count(f"eap {command}") >= 2, "two examples"
    from eap_circuits.cli import app

    (found,) = [c.callback for c in app.registered_commands if c.callback and c.callback.__name__ == command]
    for name, parameter in inspect.signature(found).parameters.items():
        option = {"as_json": "--json", "n": "-n"}.get(name, f"--{name}".replace("_", "-"))
        if parameter.default is not inspect.Parameter.empty and name != "name":
            assert option in result.stdout
        if isinstance(parameter.default, (int, str)) and parameter.default not in (False, None):
            assert f"default: {parameter.default}" in re.sub(r"[\s│]+", " ", result.stdout)


def test_help_names_what_the_registries_hold() -> None:
    from eap_circuits.cli.choices import described, registries
    from eap_circuits.methods.spec import KEEP

    words = re.sub(r"[\s│]+", " ", "".join(eap(call, "--help").stdout for call in ("attribute", "curve", "learn")))
    for kind in registries().keys() - {"tasks"}:  # `eap tasks` lists them
        for name, description in described(kind).items():
            assert f"{name}: {description}" in words
    for name in KEEP:
        assert re.search(rf" {name}[,.]| {name} or ", words), name


@pytest.mark.parametrize(
    ("typed", "exit_code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("attribute --help", 0),
        ("tasks", 0),
        ("tasks iou", 2),
        ("atribute", 2),
        ("attribute x --hlp", 2),
        ("attribute x --task iou", 2),
        ("evaluate x y --task ioi --ablation zro", 2),
        ("curve x y --task ioi --baselines random,chance", 2),
    ],
)
def test_what_needs_no_model_imports_nothing_heavy(typed: str, exit_code: int) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from eap_circuits.cli import app\n"
        f"assert CliRunner().invoke(app, {typed.split()}).exit_code == {exit_code}\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'jinja2', 'numpy') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"


def test_results_on_stdout_and_errors_on_stderr(tmp_path: Path) -> None:
    good = eap("tasks", "--json")
    assert json.loads(good.stdout)
    assert good.stderr == ""
    bad = eap("attribute", str(tmp_path / "no-model"), "--task", "ioi", code=2)
    assert bad.stdout == ""
    assert bad.stderr.startswith("eap: error: model ")
    assert bad.stderr.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    debug = eap("report", str(tmp_path / "none.safetensors"), "-o", str(tmp_path / "r.html"), "--debug", code=1).stderr
    assert "Traceback" in debug
    assert "InputError" in debug


def test_a_terminal_that_knows_ascii_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = eap("attribute", "--help")  # whose formulas are no ASCII
    assert result.stdout.isascii() and "?" in result.stdout and result.stderr == ""


@pytest.mark.parametrize("typed", ["--help", "tasks", "tasks --json"])
def test_output_that_cannot_be_written_is_one_sentence(typed: str) -> None:
    with open("/dev/full", "w") as full:
        ended = eap(*typed.split(), code=2, stdout=full)
    assert ended.stderr.startswith("eap: error: ") and "No space left on device" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_errors_do_not_go_to_stdout_where_stderr_is_closed() -> None:
    assert eap("tasks", "iou", code=2, preexec_fn=lambda: os.close(2)).stdout == ""


def test_unknown_options_and_numbers_out_of_range_are_refused() -> None:
    assert "--nonsense" in eap("attribute", "x", "--nonsense", code=2).stderr
    assert "-n" in eap("attribute", "x", "--task", "ioi", "-n", "0", code=2).stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("attribute x --method clean", ["clean-corrupted"]),
        ("attribute x --task gr", ["greater-than"]),
        ("learn x --metric rank", ["rank"]),
        ("curve x y --baselines random,comp", ["random,complement"]),
        ("attribute x --how th", []),  # a selection in Python only
    ],
)
def test_shells_complete_values(typed: str, offered: list[str]) -> None:
    from typer.testing import CliRunner

    from eap_circuits.cli import app

    words = {"COMP_WORDS": f"eap {typed}", "COMP_CWORD": str(len(typed.split())), "_EAP_COMPLETE": "complete_bash"}
    assert CliRunner().invoke(app, [], prog_name="eap", env=words).stdout.split() == offered


def test_version() -> None:
    import eap_circuits

    assert eap_circuits.__version__ in eap("--version").stdout
