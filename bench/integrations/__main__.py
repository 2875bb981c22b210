"""Other circuit codebases, as published and with our operators: scores, time and peak memory.

git clone https://github.com/hannamw/EAP-IG eap-main && git -C eap-main checkout 795f560
git clone https://github.com/hannamw/EAP-IG eap-mib && git -C eap-mib checkout 7af394a
pip install "transformer-lens>=2.15,<3" matplotlib auto-circuit==1.0.1    # not beside eap_circuits: older transformers
python -m bench.integrations --eap-ig 795f560=eap-main/src --eap-ig 7af394a=eap-mib/src --auto-circuit

On models with random weights, it compares the scores of every run at a tiny shape and of some runs at GPT-2 small's
shape. There it also measures time and memory, for the first revision only: times in alternation in one process, memory
in fresh ones. It writes bench/results/integrations.json, or a file with the GPU's name, and the tables of
docs/integrations.md. A difference above ALLOWED is an error.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from bench import measure
from bench.integrations.auto_circuit import AutoCircuit
from bench.integrations.eap_ig import EapIg
from bench.integrations.inputs import SHAPES
from bench.integrations.measurements import PATCHED, PUBLISHED, Make, memory, scores, times
from bench.processes import ROOT, commit
from docs import documents

# Published and patched scores may differ by this share of the largest one.
ALLOWED = 1e-5


def compared(label: str, make: Make) -> dict[str, dict]:
    """A package's scores at both shapes."""
    benches = {}
    for shape in SHAPES:
        found = measure.in_fresh_process(scores, make, shape)
        print(label, shape, found, flush=True)
        for name, each in found.items():
            if not each <= ALLOWED:
                raise RuntimeError(f"{label}, {shape}, {name}: scores differ by {each:.1e}")
        facts = {"package": label, "model": shape, "differences": found, "ratios": {}}
        benches[f"integrations_scores[{label}, {shape}]"] = facts
    return benches


def measured(label: str, make: Make, rounds: int) -> dict[str, dict]:
    """The cost of each run of a package at the larger shape."""
    benches = {}
    for name, row in measure.in_fresh_process(times, make, rounds).items():
        row["bytes"] = {how: measure.in_fresh_process(memory, make, name, how) for how in (PUBLISHED, PATCHED)}
        row["ratios"]["memory"] = row["bytes"][PUBLISHED] / row["bytes"][PATCHED]
        benches[f"integrations_cost[{label}, {name}]"] = {"package": label, "run": name, **row}
        print(label, name, row, flush=True)
    return benches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eap-ig", action="append", default=[], metavar="REVISION=PATH")
    parser.add_argument("--auto-circuit", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    revisions = [revision.split("=", 1) for revision in options.eap_ig]
    packages: dict[str, Make] = {f"EAP-IG {name}": partial(EapIg, Path(path).resolve()) for name, path in revisions}
    timed = dict(list(packages.items())[:1])
    if options.auto_circuit:
        timed[f"auto-circuit {version('auto-circuit')}"] = AutoCircuit
    benches = {}
    for label, make in (timed | packages).items():
        benches |= compared(label, make)
    for label, make in timed.items():
        benches |= measured(label, make, options.rounds)
    result = {"machine": measure.machine(), "commit": commit(), "date": date.today().isoformat()}
    result["versions"] = measure.versions() | {"transformer-lens": version("transformer-lens")}
    result |= {"threads": torch.get_num_threads(), "rounds": options.rounds, "benches": benches}
    name = f"integrations-{measure.slug(result['machine'])}" if "gpu" in result["machine"] else "integrations"
    (ROOT / f"bench/results/{name}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    documents.write(ROOT)


if __name__ == "__main__":
    main()
