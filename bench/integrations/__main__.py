"""Other circuit codebases as published against the same with our operators: scores, time and peak memory.

git clone https://github.com/hannamw/EAP-IG eap-main && git -C eap-main checkout 795f560
git clone https://github.com/hannamw/EAP-IG eap-mib && git -C eap-mib checkout 7af394a
pip install "transformer-lens>=2.15,<3" matplotlib auto-circuit==1.0.1    # not beside eap_circuits: older transformers
python -m bench.integrations --eap-ig 795f560=eap-main/src --eap-ig 7af394a=eap-mib/src --auto-circuit

On models with random weights: the scores of every run at a tiny shape and of some at GPT-2 small's; there the time and
memory too, of the first revision alone. Times are taken in turns in one process, memory in fresh ones. Writes
bench/results/integrations.json, or with the GPU's name, and the table of docs/integrations.md. A difference above
ALLOWED is an error.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from bench import measure, record
from bench.integrations.inputs import SHAPES
from bench.integrations.measurements import in_fresh_process, worker
from bench.processes import commit

# Published and patched scores may differ by this share of the largest one.
ALLOWED = 1e-5


def compared(kind: str, label: str, path: str) -> dict[str, dict]:
    """A package's scores at both shapes."""
    benches = {}
    for shape in SHAPES:
        found = in_fresh_process("scores", kind, path, shape)
        benches[f"integrations_scores[{label}, {shape}]"] = {
            **{"package": label, "model": shape, "differences": found, "ratios": {}},
        }
        print(label, shape, found, flush=True)
        for name, each in found.items():
            if not each <= ALLOWED:
                raise RuntimeError(f"{label}, {shape}, {name}: scores differ by {each:.1e}")
    return benches


def measured(kind: str, label: str, path: str, rounds: int) -> dict[str, dict]:
    """The cost of each run of a package at the larger shape."""
    benches = {}
    for name, row in in_fresh_process("times", kind, path, str(rounds)).items():
        row["bytes"] = {how: in_fresh_process("memory", kind, path, name, how) for how in ("published", "patched")}
        row["ratios"]["memory"] = row["bytes"]["published"] / row["bytes"]["patched"]
        benches[f"integrations_cost[{label}, {name}]"] = {"package": label, "run": name, **row}
        print(label, name, row, flush=True)
    return benches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eap-ig", action="append", default=[], metavar="REVISION=PATH")
    parser.add_argument("--auto-circuit", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(*options.worker)))
        return
    benches = {}
    revisions = [revision.split("=", 1) for revision in options.eap_ig]
    packages = [("EAP-IG", f"EAP-IG {label}", str(Path(path).resolve())) for label, path in revisions]
    timed = packages[:1]
    if options.auto_circuit:
        timed.append(("auto-circuit", f"auto-circuit {version('auto-circuit')}", ""))
    for package in [*timed, *packages[1:]]:
        benches |= compared(*package)
    for package in timed:
        benches |= measured(*package, options.rounds)
    result = {"machine": measure.machine(), "commit": commit(), "date": date.today().isoformat()}
    result["versions"] = measure.versions() | {"transformer-lens": version("transformer-lens")}
    result |= {"threads": torch.get_num_threads(), "rounds": options.rounds, "benches": benches}
    name = f"integrations-{measure.slug(result['machine'])}" if "gpu" in result["machine"] else "integrations"
    (record.RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    record.write_tables()


if __name__ == "__main__":
    main()
