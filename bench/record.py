"""Turn a pytest-benchmark JSON into the machine's committed result, the tables of the docs, and the table of what
`auto` takes on a GPU. Benches may be measured in parts; each part is merged into the others.

python -m bench.record RUN.json ...          # bench/results/, then the tables
python -m bench.record GPU.json ...          # the same with results that were recorded on another machine
python -m bench.record --compare RUN.json    # fails on a ratio under its share of the machine's stored one
python -m bench.record                       # all documents, from the committed results
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from bench import choices, measure, regressions, tables
from bench.processes import ROOT, commit, has_results
from docs import documents
from eap_kernels import _auto

CHOICES = _auto.TABLE


def condense(run: dict) -> dict:
    """What is kept of a run: machine, versions, commit, and each bench's own figures.

    A bench that was interrupted has no figures. A result that was recorded elsewhere is kept as it is.
    """
    if "benchmarks" not in run:
        return run
    figures = {bench["name"]: bench["extra_info"] for bench in run["benchmarks"]}
    result = {
        "machine": measure.machine(),
        "versions": measure.versions(),
        "date": run["datetime"][:10],
        "commit": commit(),
        "benches": {name: info for name, info in figures.items() if "ratios" in info},
    }
    return result | ({"states": [run["gpu_state"]]} if "gpu_state" in run else {})


def merged(old: dict | None, new: dict) -> dict:
    """The new benches and the old ones. Results of other versions or another driver do not stay.

    A bench that stays carries its own commit and date.
    """
    if old is None or any(old[key] != new[key] for key in ("machine", "versions")):
        return new
    stays = {
        name: {"commit": old["commit"], "date": old["date"], **info}
        for name, info in old["benches"].items()
        if name not in new["benches"]
    }
    return {**new, "benches": {**stays, **new["benches"]}, "states": old.get("states", []) + new.get("states", [])}


def write_choices() -> None:
    CHOICES.write_text(choices.text(tables.committed(ROOT)))


def record(run: dict) -> None:
    result = condense(run)
    target = regressions.path(measure.slug(result["machine"]))
    result = merged(json.loads(target.read_text()) if target.exists() else None, result)
    target.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    write_choices()
    if "OUT" in os.environ:  # only this folder comes back from a machine whose checkout is thrown away
        for file in (target, CHOICES):
            shutil.copy(file, os.environ["OUT"])
    documents.write(ROOT)


def fail_on_regressions(run: dict) -> None:
    result = condense(run)
    stored = regressions.load(measure.slug(result["machine"]))
    problems = regressions.of_run(regressions.ratios(result), stored) if stored is not None else []
    if problems:
        sys.exit("\n".join(["regressions against the stored ratios:", *problems]))


def main() -> None:
    if len(sys.argv) == 1:
        write_choices()
        documents.write(ROOT, documents.ALL)
        return
    named = [Path(name) for name in sys.argv[1:] if name != "--compare"]
    runs = [json.loads(path.read_text()) for path in named if has_results(path)]
    if not runs:
        sys.exit(f"record: expected the JSON of a run of the benches, got none at {', '.join(map(str, named))}")
    measured_here = [run for run in runs if "benchmarks" in run]
    if measured_here:
        joined = {**measured_here[0], "benchmarks": [bench for run in measured_here for bench in run["benchmarks"]]}
        fail_on_regressions(joined) if sys.argv[1] == "--compare" else record(joined)
    for result in (run for run in runs if "benchmarks" not in run):
        record(result)


if __name__ == "__main__":
    main()
