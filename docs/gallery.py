"""Circuits of the package's tasks on SmolLM2-135M-Instruct, by EAP-IG and pruned: pictures, sizes, faithfulness.

python -m docs.gallery TASK ...     # a minute or two each; adds to docs/results/gallery and docs/img/gallery
python -m docs.gallery --draw       # pictures alone; `python -m docs.documents` writes the page
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import eap_circuits as eap

DOCS = Path(__file__).parent
RESULTS, PICTURES = DOCS / "results" / "gallery", DOCS / "img" / "gallery"
RESULT = RESULTS / "gallery.json"
ENOUGH, DRAWN, NAMED = 0.85, 50, 4
RANKINGS = {"eap-ig": "EAP-IG", "pruned": "pruned"}


def measure(name: str) -> None:
    """Rank edges on some pairs of a task; keep each ranking's smallest circuit that is faithful enough on others."""
    import eap_circuits as eap
    from eap_circuits.adapters import load_model
    from eap_circuits.leaderboard.measure import HOW, Settings

    model, tokenizer = load_model("smollm2", device="cpu")
    settings = Settings()
    data = eap.load_task(name, tokenizer, n=settings.scored + settings.pairs, seed=0)
    few, others = data[: settings.scored], data[settings.scored :]
    scores = eap.attribute(model, few)
    rankings = {"eap-ig": scores, "pruned": eap.prune_gradually(model, few, start=scores)}
    circuits, found = {}, {}
    for ranking, ranked in rankings.items():
        curve = eap.faithfulness_curve(model, ranked, others, settings.fractions, how=HOW)
        at = next(i for i, faithfulness in enumerate(curve.faithfulness) if faithfulness >= ENOUGH)
        # Edges are drawn by what the circuit would lose without them: of both rankings in units of the metric.
        there = eap.attribute_circuit(model, curve.circuits[at], few)
        circuits[ranking] = eap.Circuit(there.graph, curve.circuits[at].mask, there.values, there.info)
        circuits[ranking].save(RESULTS / f"{name}-{ranking}.safetensors")
        found[ranking] = {"faithfulness": curve.faithfulness[at], **parts(circuits[ranking])}
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"tasks": {}}
    kept |= {"model": scores.info["model"], "scored": settings.scored, "pairs": settings.pairs}
    kept["tasks"][name] = {
        "of_edges": scores.graph.n_edges,
        "of_nodes": scores.graph.n_senders,
        "shared": int((circuits["eap-ig"].mask & circuits["pruned"].mask).sum()),
        "circuits": found,
    }
    RESULT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def parts(circuit: eap.Circuit) -> dict[str, Any]:
    """How large a circuit is, and the nodes whose edges into the logits matter most."""
    from_nodes = (circuit.values * circuit.mask)[:, -1]
    strongest = from_nodes.abs().argsort(descending=True, stable=True)[:NAMED].tolist()
    return {
        "n_edges": circuit.n_edges,
        "n_nodes": len(circuit.nodes),
        "heads": sum(".h" in name for name in circuit.nodes),
        "into_logits": [(circuit.graph.senders[u], float(from_nodes[u])) for u in strongest if from_nodes[u]],
    }


def draw() -> None:
    import eap_circuits as eap
    from docs.pictures import beside

    for name in json.loads(RESULT.read_text(encoding="utf-8"))["tasks"]:
        figures = [eap.Circuit.load(RESULTS / f"{name}-{ranking}.safetensors").plot(DRAWN) for ranking in RANKINGS]
        beside(PICTURES / f"{name}.png", *figures)


def page() -> str:
    """docs/gallery.md, from the committed results."""
    from eap_circuits.tasks import TASKS

    found = json.loads(RESULT.read_text(encoding="utf-8"))
    tasks = {name: found["tasks"][name] for name in TASKS if name in found["tasks"]}
    sections = "".join(_section(name, TASKS[name].description, task) for name, task in tasks.items())
    return f"""# Gallery: circuits of {found["model"]}

Two circuits of each task: one from the scores of EAP-IG (`attribute`), one
[pruned](learning.md#pruning-a-share-at-a-time) from there. Edges are ranked on {found["scored"]} prompt pairs. Circuits
are grown from the logits and run on {found["pairs"]} other pairs, with the corrupted prompt's values outside. Of the
[leaderboard](leaderboard.md)'s sizes the smallest is shown that has a faithfulness of at least {ENOUGH} on these. On
new pairs it may be a little lower.

Pictures have the {DRAWN} edges that matter most where the circuit runs (`attribute_circuit`): without a blue one the
metric falls, without an orange one it rises. So it is with the numbers below, which are approximations in units of the
metric. Each circuit is a file to explore in a notebook:

```python
eap.Circuit.load("docs/results/gallery/ioi-pruned.safetensors")
```

| task | circuit | edges | heads | nodes | faithfulness |
|---|---|---|---|---|---|
{"".join(_row(name, ranking, task) for name, task in tasks.items() for ranking in RANKINGS)}\
{sections}"""


def _row(name: str, ranking: str, task: dict[str, Any]) -> str:
    circuit = task["circuits"][ranking]
    share = 100 * circuit["n_edges"] / task["of_edges"]
    edges = f"{circuit['n_edges']:,} of {task['of_edges']:,} ({share:.2f} %)"
    nodes = f"{circuit['n_nodes']} of {task['of_nodes']}"
    return (
        f"| [{name}](#{name}) | {RANKINGS[ranking]} | {edges} | {circuit['heads']} | {nodes} "
        f"| {circuit['faithfulness']:.3f} |\n"
    )


def _section(name: str, about: str, task: dict[str, Any]) -> str:
    reads = "; ".join(f"{title}, {_listed(task['circuits'][ranking])}" for ranking, title in RANKINGS.items())
    return f"""
## {name}

{about}

The circuits have {task["shared"]:,} edges in common. What the logits read that matters most: in the circuit of {reads}.

![EAP-IG's circuit of {name} on the left, the pruned one on the right](img/gallery/{name}.png)
"""


def _listed(circuit: dict[str, Any]) -> str:
    return ", ".join(f"`{name}` ({value:+.2f})" for name, value in circuit["into_logits"])


if __name__ == "__main__":
    for task in [word for word in sys.argv[1:] if word != "--draw"]:
        measure(task)
    draw()
