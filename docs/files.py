"""Files of results, to which a script adds one measurement after another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def committed(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def add(path: Path, name: str, measure: Callable[..., dict[str, Any]], *given: Any) -> None:
    """Measure what is given; keep it under this name, with the machine, the versions and the commit that ran."""
    from bench import measure as bench
    from bench.processes import commit

    origin = {"machine": bench.machine(), "versions": bench.versions(), "commit": commit()}
    found = measure(*given)
    path.write_text(json.dumps({**committed(path), name: {**found, **origin}}, indent=1) + "\n", encoding="utf-8")
