"""Command lines with words left out, repeated, added and replaced: a result in whole files, or one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

import eap_circuits as eap
from eap_circuits.cli import app, session

from .common import Tally, circuit, model, pairs, scores, tokenizer

VALUES = (
    "", " ", "x", "-", "--", "-1", "0", "1", "3", "1e9", "0.5", "nan", "inf", "1GiB", "é", "a,b", "random", ",",
    "none", "eap", "eap-ig-inputs", "top", "greedy", "kv", "relp", "zero", "mean", "ioi", "logit_diff", "variance",
    "cpu", "cuda:9", "float32", "{}", "../x.json", "/", ".", "nowhere/x.json", "out.json", "out.pt", "out.safetensors",
    "out.html", "out.txt", "pairs.csv", "pairs.jsonl", "pairs.safetensors", "scores.safetensors", "circuit.json",
    "broken.json", "--help", "9" * 30,
)  # fmt: skip
LINES = (
    "attribute tiny --data pairs.safetensors --method eap -o out.safetensors",
    "attribute tiny --data pairs.csv --steps 2 --edges 20 --circuit out.json",
    "attribute tiny --data pairs.jsonl --method exact --edges 5",
    "attribute tiny --data pairs.jsonl --dry-run",
    "evaluate tiny circuit.json --data pairs.safetensors --json",
    "evaluate tiny circuit.json --data pairs.csv --ablation mean",
    "curve tiny scores.safetensors --data pairs.safetensors --fractions 0.1,0.5 --baselines none -o out.json",
    "curve tiny scores.safetensors --data pairs.jsonl --fractions 0.5 --draws 1 --json",
    "report scores.safetensors --edges 10 -o out.html",
    "tasks",
    "info --json",
)
RECORDS = [
    {"clean": "Ann met Bob", "corrupted": "Cy met Bob", "answers": ["Ann", "Cy"]},
    {"clean": "Bob met Cy and", "corrupted": "Ann met Cy and", "answers": ["Bob", "Ann"]},
]
# Slow or not about their arguments: a demo, a self-check and a whole comparison.
NOT_RUN = {"demo", "check", "reproduce"}


@contextlib.contextmanager
def tiny(folder: Path) -> Iterator[dict[str, bytes]]:
    """In a folder with files of each kind, with the tiny model in place of every other; what is in the files."""
    pairs().save(folder / "pairs.safetensors")
    rows = ["clean,corrupted,good,bad", *(",".join((r["clean"], r["corrupted"], *r["answers"])) for r in RECORDS)]
    (folder / "pairs.csv").write_text("\n".join(rows))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    scores().save(folder / "scores.safetensors")
    circuit().save(folder / "circuit.json")
    (folder / "broken.json").write_text("{")
    load, before = session.load_model, os.getcwd()
    session.load_model = lambda *_, **__: (model(), tokenizer())  # type: ignore[assignment]
    os.chdir(folder)
    try:
        yield {path.name: path.read_bytes() for path in folder.iterdir()}
    finally:
        os.chdir(before)
        session.load_model = load  # type: ignore[assignment]


def options() -> dict[str, list[str]]:
    """The options of each command, as typer knows them."""
    commands: Any = typer.main.get_command(app)
    return {name: [o for p in each.params for o in p.opts if o[0] == "-"] for name, each in commands.commands.items()}


def mutated(rng: random.Random, words: list[str], known: dict[str, list[str]]) -> list[str]:
    """One to three words changed; the command's own name stays."""
    words = list(words)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(1, max(2, len(words))), rng.randrange(5)
        if kind == 0 and at < len(words):
            words[at] = rng.choice(VALUES)
        elif kind == 1:
            words[at:at] = [rng.choice(known[words[0]] or ["--x"]), rng.choice(VALUES)]
        elif kind == 2 and at < len(words):
            del words[at]
        elif kind == 3 and at < len(words):
            words.insert(at, words[at])
        else:
            words += [rng.choice(known[words[0]] or ["--x"])]
    return words


def judged(folder: Path, words: list[str], before: dict[str, bytes]) -> str | None:
    """Run a command; what is wrong with what it said and wrote. A refusal raises InputError."""
    result = CliRunner().invoke(app, words)
    after = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    new = [name for name in after if name not in before]
    changed = [name for name in before if after.get(name) != before[name]]
    for name in [*new, *changed]:
        (folder / name).unlink(missing_ok=True)
        if name in before:
            (folder / name).write_bytes(before[name])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{type(result.exception).__name__}: {str(result.exception)[:120]}"
    if "Traceback" in result.output:
        return "a traceback"
    if result.exit_code not in (0, 2):
        return f"exit status {result.exit_code}"
    if result.exit_code:
        if not result.output.strip():
            return "fails without a word"
        if new or changed:
            return f"fails and leaves {new + changed}"
        raise eap.InputError(result.output)
    # A file of the user's is written over only where an option names it.
    unasked = [name for name in changed if words.count(name) == 0]
    if unasked or any(name.startswith(".") for name in new):
        return f"wrote {unasked or new} without being asked"
    if "--json" in words and "--help" not in words and "-h" not in words:
        try:
            json.loads(result.stdout)
        except ValueError:
            return "prints what is no JSON with --json"
    for name in new:
        if (name.endswith(".safetensors") or name == "out.pt") and "-o" in words:
            path = folder / name
            path.write_bytes(after[name])
            try:
                eap.EdgeScores.load(path)
            except eap.InputError as error:
                return f"wrote {name}, which cannot be read: {error}"
            finally:
                path.unlink()
    return None


def fuzz(tally: Tally, rng: random.Random, count: int) -> None:
    known = {name: opts for name, opts in options().items() if name not in NOT_RUN}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        with tiny(folder) as before:
            judged(folder, LINES[0].split(), before)  # imports what commands import, once
            for line in LINES:
                tally.run(line, lambda line=line: judged(folder, line.split(), before), lambda problem: problem)
            for _ in range(count - len(LINES)):
                words = mutated(rng, rng.choice(LINES).split(), known)
                tally.run(repr(words), lambda words=words: judged(folder, words, before), lambda problem: problem)
