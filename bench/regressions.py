"""The results stored for each machine, bench/results/<machine>.json, and what counts as a regression."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
# Ratios of minima taken in turns spread by 10 % between runs on two busy cores, and a stored and a new one each
# have that spread. A bench that falls below is tried again before it fails.
TOLERANCE = 0.8

Ratios = Mapping[str, Mapping[str, float]]  # bench -> ratio -> value; higher is better


def path(machine: str) -> Path:
    return FOLDER / f"{machine}.json"


def load(machine: str) -> dict[str, dict[str, float]] | None:
    """The ratios stored for a machine, or None if it has none."""
    file = path(machine)
    return ratios(json.loads(file.read_text())) if file.exists() else None


def ratios(result: Mapping) -> dict[str, dict[str, float]]:
    """The ratios of a condensed result."""
    return {name: info["ratios"] for name, info in result["benches"].items() if "ratios" in info}


def below(found: Mapping[str, float], stored: Mapping[str, float], share: float = TOLERANCE) -> list[str]:
    """One line for each ratio that is missing or below its share of the stored one."""
    problems = []
    for name, value in stored.items():
        of = f", {share} of the stored {value:.3g}" if share < 1 else ""
        if name not in found:
            problems.append(f"{name} was not measured")
        elif not found[name] >= share * value:
            problems.append(f"{name} {found[name]:.3g} is below {share * value:.3g}{of}")
    return problems


def held(
    measured: Callable[[], tuple[dict[str, float], dict]],
    bars: Mapping[str, float],
    stored: Mapping[str, float],
    tries: int,
) -> tuple[dict[str, float], dict, list[str]]:
    """(ratios, other facts, problems) of the first try without problems, or of the last one."""
    for _ in range(tries):
        found, facts = measured()
        problems = below(found, bars, 1.0) + below(found, stored)
        if not problems:
            break
    return found, facts, problems


def of_run(found: Ratios, stored: Ratios) -> list[str]:
    """The regressions of a whole run, including stored benches that did not run."""
    problems = []
    for bench, values in stored.items():
        if bench in found:
            problems += [f"{bench}: {problem}" for problem in below(found[bench], values)]
        else:
            problems.append(f"{bench}: has a stored ratio and did not run")
    return problems
