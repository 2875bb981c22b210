"""Try what nobody means to do, by thousands and from a seed: `make fuzz`, within two minutes on two cores.

python -m tests.fuzz [--seed N] [--share 0.1] [--only NAME ...] [--record]

Every case must give the right result or a refusal in one sentence, within five seconds, and leave the model, the
process and the files as they were. --record writes docs/results/fuzz.json and the table of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

from .common import ROOT, Tally, run

# Interrupts last: what one leaves behind would fail what follows in its process.
CASES = {"arguments": 2000, "command_lines": 500, "files": 2000, "allocations": 200, "interrupts": 200}
RESULT = ROOT / "docs" / "results" / "fuzz.json"


def record(seed: int, tallies: list[Tally]) -> None:
    from bench import measure
    from bench.processes import commit
    from docs import documents

    rows = {
        each.name: {
            "what": (import_module(f".{each.name}", __package__).__doc__ or "").split(":")[0],
            "cases": each.cases,
            "right": each.right,
            "refused": each.refused,
            "failed": len(each.failures),
        }
        for each in tallies
    }
    facts = {"seed": seed, "machine": measure.machine(), "versions": measure.versions(), "commit": commit()}
    RESULT.write_text(json.dumps({"fuzzers": rows, **facts}, indent=1) + "\n")
    documents.write(ROOT, ["docs/reliability.md"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(run, name, asked.seed, max(1, int(CASES[name] * asked.share))) for name in asked.only]
        tallies = [each.result() for each in runs]
    for each in tallies:
        for failure in each.failures:
            print(f"{each.name}, seed {asked.seed}: {failure}")
    for each in tallies:
        counts = f"{each.right} right, {each.refused} refused, {len(each.failures)} failed"
        print(f"{each.name:<14} {each.cases:>5} cases: {counts}, {each.seconds:.0f} s")
    if asked.record:
        record(asked.seed, tallies)
    return int(any(each.failures for each in tallies))


if __name__ == "__main__":
    sys.exit(main())
