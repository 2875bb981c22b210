"""Which edges a learned circuit shares with those of exact patching, EAP and EAP-IG.

python -m docs.shared [TASK ...]     # four minutes each; adds to docs/results/shared.json, goes on from build/fewer

Exact patching of all edges would take hours. So it measures the edges that any of the others ranks highest, and says
how deep in EAP's or EAP-IG's ranking the strongest of them stand: if not deep, few strong edges can have been left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docs import files
from docs.fewer import CHECKPOINTS, RANKINGS, SEEDS, TASKS, load, ranked

if TYPE_CHECKING:
    from torch import Tensor

    import eap_circuits as eap
    from bench.tables import Results

RESULT = Path(__file__).with_name("results") / "shared.json"
PAIRS = 16
EDGES, STRONGEST = 185, 20  # of a circuit; of these by exact patching
MEASURED = 800  # edges of each ranking that are patched
NAMES = {"exact": "exact patching", "eap": "EAP", **RANKINGS}


def rank(task: str, seed: int) -> tuple[dict[str, eap.EdgeScores], Any, eap.PairedDataset, eap.PairedDataset]:
    """Rankings by some pairs; the model, these pairs, and others."""
    import eap_circuits as eap

    model, pairs, others = load(task, seed)
    few = pairs[:PAIRS]
    return {"eap": eap.attribute(model, few, method="eap"), **ranked(model, few)}, model, few, others


def circuits_of(rankings: dict[str, eap.EdgeScores]) -> dict[str, eap.Circuit]:
    return {name: scores.select(EDGES, how="greedy", exactly=True) for name, scores in rankings.items()}


def compare(task: str) -> dict[str, Any]:
    import torch

    import eap_circuits as eap
    from eap_circuits.graph.agreement import agreement_of

    again = circuits_of(rank(task, SEEDS[1])[0])
    rankings, model, few, others = rank(task, SEEDS[0])
    graph = rankings["eap"].graph
    strong = torch.zeros_like(graph.edge_mask)
    for scores in rankings.values():
        strong |= scores.select(MEASURED, how="greedy", exactly=True).mask
    where = CHECKPOINTS / f"{task}-exact.safetensors"
    exact = eap.attribute(model, few, method="exact", edges=strong, checkpoint=where)
    rankings = {"exact": exact, **rankings}
    circuits = circuits_of(rankings)
    strongest = {n: exact.select(n, prune=False).mask for n in (STRONGEST, EDGES)}
    # Edges are numbered from the strongest by EAP and by EAP-IG; the lower number counts.
    depths = torch.stack([_places(rankings[name]) for name in ("eap", "eap-ig")]).amin(0)
    ran = eap.evaluate(model, list(circuits.values()), others)
    among = {name: scores.values[strong].double().abs() for name, scores in rankings.items()}
    return {
        "measured": int(strong.sum()),
        "deepest": int(depths[strongest[EDGES]].max()),
        "faithfulness": dict(zip(circuits, (result.faithfulness for result in ran), strict=True)),
        "shared": {a: {b: _shared(circuits[a], circuits[b]) for b in circuits} for a in circuits},
        "again": {name: _shared(circuits[name], again[name]) for name in again},
        "of the strongest": {name: int((each.mask & strongest[STRONGEST]).sum()) for name, each in circuits.items()},
        "spearman": {
            name: agreement_of(each, among["exact"]).spearman for name, each in among.items() if name != "exact"
        },
    }


def _places(scores: eap.EdgeScores) -> Tensor:
    """int64 [S, R]: 1 for the strongest edge, 2 for the next."""
    order = scores.values.abs().flatten().argsort(descending=True)
    return order.argsort().view_as(scores.values) + 1


def _shared(first: eap.Circuit, second: eap.Circuit) -> int:
    import eap_circuits as eap

    return eap.edge_overlap(first, second).n_shared


def table(_: Results) -> str:
    head = ["task", "ranked by", "faithfulness", *(f"shared with {name}" for name in NAMES.values())]
    head += [f"of the {STRONGEST} strongest", "shared with itself from other pairs", "Spearman"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task, found in files.committed(RESULT).items():
        for name, shown in NAMES.items():
            cells = [task, shown, f"{found['faithfulness'][name]:.2f}"]
            cells += ["–" if name == other else str(found["shared"][name][other]) for other in NAMES]
            cells += [str(found["of the strongest"][name]), str(found["again"].get(name, "–"))]
            cells.append("–" if name == "exact" else f"{found['spearman'][name]:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for task in sys.argv[1:] or TASKS:
        files.add(RESULT, task, compare, task)
