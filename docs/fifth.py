"""Whether a fifth of EAP-IG's edges can do where the leaderboard misses it: masks learned for that size alone.

python -m docs.fifth TASK ...     # five minutes each; adds to docs/results/fifth.json, goes on from build/fifth
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docs import files

if TYPE_CHECKING:
    from bench.tables import Results

DOCS = Path(__file__).parent
RESULT, BOARD, CHECKPOINTS = DOCS / "results" / "fifth.json", DOCS / "leaderboard", DOCS.parent / "build" / "fifth"
SEED, STEPS = 0, 150


def smallest(task: str) -> dict[str, Any]:
    """Circuits of a fifth of the edges that EAP-IG needs, ranked and run on the leaderboard's pairs."""
    import eap_circuits as eap
    from eap_circuits.adapters.pretrained import load_model
    from eap_circuits.leaderboard.measure import FAITHFUL, HOW, START
    from eap_circuits.leaderboard.page import edges_at

    board = json.loads((BOARD / "leaderboard.json").read_text(encoding="utf-8"))
    scored, pairs = (board["request"]["settings"][name] for name in ("scored", "pairs"))
    size = edges_at(board["tasks"][task][str(SEED)][START], FAITHFUL[0]) // 5
    model, tokenizer = load_model("smollm2")
    data = eap.load_task(task, tokenizer, n=scored + pairs, seed=SEED)
    few, others = data[:scored], data[scored:]
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)

    def kept(name: str) -> Path:
        return CHECKPOINTS / f"{task}-{name}.safetensors"

    start = eap.attribute(model, few, checkpoint=kept("start"))
    pruned = eap.prune_gradually(model, few, start=start, checkpoint=kept("pruned"))
    learned = eap.learn_mask(model, few, start=pruned, steps=STEPS, n_edges=size, seed=SEED, checkpoint=kept("learned"))
    rankings = {"eap-ig": start, "pruned": pruned, "learned for this size": learned}
    circuits = [each.select(size, how=HOW, exactly=True) for each in rankings.values()]
    found = [result.faithfulness for result in eap.evaluate(model, circuits, others)]
    return {"n_edges": size, "faithfulness": dict(zip(rankings, found, strict=True))}


def table(_: Results) -> str:
    found = files.committed(RESULT)
    names = next(iter(found.values()))["faithfulness"]
    lines = [f"| task | edges | {' | '.join(names)} |", "|" + "---|" * (2 + len(names))]
    for task, run in found.items():
        cells = [f"{run['faithfulness'][name]:.2f}" for name in names]
        lines.append(f"| {task} | {run['n_edges']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for task in sys.argv[1:]:
        files.add(RESULT, task, smallest, task)
