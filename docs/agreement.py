"""Measure whether EAP or EAP-IG agrees better with exact patching, also away from the strongest edges.

python -m docs.agreement [TASK ...]     # by default all; adds to docs/results/agreement.json

Exact patching of all edges on this many pairs would take hours. So it measures the edges that either method ranks
highest, and a random sample of all others.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docs import files

if TYPE_CHECKING:
    from torch import Tensor

    from bench.tables import Results

RESULT = Path(__file__).with_name("results") / "agreement.json"
PAIRS, FEWER = 32, 4
STRONG, OTHERS, LEFT_OUT = 200, 300, 10
DRAWS = 1000
METHODS = {"EAP": "eap", "EAP-IG": "eap-ig-inputs"}
PARTS = {
    "strong": f"strong, all but {LEFT_OUT}",
    "others": "the others",
}


def run(task: str) -> dict[str, Any]:
    import torch

    import eap_circuits as eap
    from eap_circuits.adapters.pretrained import load_model

    model, tokenizer = load_model("smollm2")
    data = eap.load_task(task, tokenizer, n=PAIRS, seed=0)
    found = {name: eap.attribute(model, data, method=method, keep="examples") for name, method in METHODS.items()}
    graph = found["EAP"].graph
    strong = torch.zeros_like(graph.edge_mask)
    for scores in found.values():
        strong |= scores.select(STRONG, prune=False).mask
    rest = (graph.edge_mask & ~strong).nonzero()
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[:OTHERS]]
    others = torch.zeros_like(strong)
    others[drawn[:, 0], drawn[:, 1]] = True
    exact = eap.attribute(model, data, method="exact", edges=strong | others, keep="examples")
    strongest = exact.values.abs().where(strong, 0).flatten().topk(LEFT_OUT).indices
    strong.view(-1)[strongest] = False
    parts = {"strong": strong, "others": others}
    result: dict[str, Any] = {"n_edges": {name: int(mask.sum()) for name, mask in parts.items()}}
    for name, mask in parts.items():
        result[name] = _agreement({**found, "exact": exact}, mask)
    return result


def _agreement(found: dict[str, Any], edges: Tensor) -> dict[str, Any]:
    """Correlations with exact scores, for all pairs and for the first few; and how sure it is which are higher."""
    import torch

    from eap_circuits.graph.agreement import agreement_of

    values = {name: scores.per_example[:, edges].double() for name, scores in found.items()}

    def correlations(pairs: Tensor) -> dict[str, dict[str, float]]:
        means = {name: each[pairs].mean(0) for name, each in values.items()}
        return {name: asdict(agreement_of(means[name], means["exact"])) for name in METHODS}

    generator = torch.Generator().manual_seed(0)
    resampled = [correlations(torch.randint(PAIRS, (PAIRS,), generator=generator)) for _ in range(DRAWS)]
    return {
        "all": correlations(torch.arange(PAIRS)),
        "few": correlations(torch.arange(FEWER)),
        "EAP is higher": {
            kind: sum(draw["EAP"][kind] > draw["EAP-IG"][kind] for draw in resampled) / DRAWS
            for kind in ("pearson", "spearman")
        },
    }


def table(_: Results) -> str:
    head = ["task", "edges", "n", *(f"{name} {kind}" for kind in ("Pearson", "Spearman") for name in METHODS)]
    lines = ["| " + " | ".join([*head, "share of draws in which EAP is higher"]) + " |", "|" + "---|" * (len(head) + 1)]
    for task, found in files.committed(RESULT).items():
        for part, words in PARTS.items():
            each, cells = found[part], [task, words, str(found["n_edges"][part])]
            for kind in ("pearson", "spearman"):
                cells += [f"{each['all'][name][kind]:.3f} ({each['few'][name][kind]:.3f})" for name in METHODS]
            sure = each["EAP is higher"]
            lines.append("| " + " | ".join([*cells, f"{sure['pearson']:.2f}, {sure['spearman']:.2f}"]) + " |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    from eap_circuits.tasks.registry import TASKS

    for name in names or list(TASKS):
        files.add(RESULT, name, run, name)


if __name__ == "__main__":
    main(sys.argv[1:])
