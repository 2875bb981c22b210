"""The commands in this process, on a tiny model in place of every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from eap_circuits.cli import app, session


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, make_model: Any) -> list[str]:
    """The tiny model in place of every other; the names that were asked for."""
    asked: list[str] = []

    def load(name: str, *_: Any, **__: Any) -> tuple[Any, None]:
        asked.append(name)
        return make_model("llama", torch.float32), None

    monkeypatch.setattr(session, "load_model", load)
    return asked


@pytest.fixture
def pairs(tmp_path: Path, make_pairs: Any) -> Path:
    path = tmp_path / "pairs.safetensors"
    make_pairs().save(path)
    return path


@pytest.fixture
def saved(tmp_path: Path, loads: list[str], pairs: Path) -> Path:
    path = tmp_path / "scores.safetensors"
    run("attribute", "tiny", "--data", pairs, "-o", path, "--steps", 2)
    loads.clear()
    return path


def run(*args: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result
