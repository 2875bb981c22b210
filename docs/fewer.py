"""How few pairs suffice: circuits ranked on fewer and on more pairs, run on others.

python -m docs.fewer ["ioi 0 16" ...]     # task, seed, pairs, a minute or two each; by default all that
                                          # docs/results/fewer.json lacks; goes on from build/fewer
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docs import files
from docs.learning import FEW_STEPS, spread

if TYPE_CHECKING:
    import eap_circuits as eap
    from bench.tables import Results

DOCS = Path(__file__).parent
RESULT, CHECKPOINTS = DOCS / "results" / "fewer.json", DOCS.parent / "build" / "fewer"
TASKS, SEEDS = ("ioi", "subject-verb-agreement"), (0, 1)
PAIRS, OTHERS = (4, 8, 16, 32, 64), 64
SIZES = (185, 710)
RANKINGS = {"eap-ig": "EAP-IG", "learned": f"pruned, then learned in {FEW_STEPS} steps"}


def load(task: str, seed: int) -> tuple[Any, eap.PairedDataset, eap.PairedDataset]:
    """The model, on one thread; pairs that rank edges; and others, on which circuits run."""
    import torch

    import eap_circuits as eap
    from eap_circuits.adapters.pretrained import load_model

    torch.set_num_threads(1)
    model, tokenizer = load_model("smollm2")
    data = eap.load_task(task, tokenizer, n=PAIRS[-1] + OTHERS, seed=seed)
    return model, data[: PAIRS[-1]], data[PAIRS[-1] :]


def ranked(model: Any, few: eap.PairedDataset) -> dict[str, eap.EdgeScores]:
    """EAP-IG's scores of these pairs, and what is pruned and then learned from there."""
    import eap_circuits as eap

    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    start, pruned, learned = (
        CHECKPOINTS / f"{few.name}-{few.seed}-{len(few)}-{name}.safetensors" for name in ("start", "pruned", "learned")
    )
    scores = eap.attribute(model, few, checkpoint=start)
    first = eap.prune_gradually(model, few, start=scores, checkpoint=pruned)
    seed = few.seed or 0
    return {
        "eap-ig": scores,
        "learned": eap.learn_mask(model, few, start=first, steps=FEW_STEPS, seed=seed, checkpoint=learned),
    }


def measure(task: str, seed: int, n: int) -> dict[str, Any]:
    import eap_circuits as eap

    model, pairs, others = load(task, seed)
    rankings = ranked(model, pairs[:n])
    circuits = [each.select(size, how="greedy", exactly=True) for each in rankings.values() for size in SIZES]
    found = iter(result.faithfulness for result in eap.evaluate(model, circuits, others))
    return {name: [next(found) for _ in SIZES] for name in rankings}


def table(_: Results) -> str:
    """Mean and range over seeds of faithfulness, by the pairs that ranked; one value where one seed was measured."""
    found = files.committed(RESULT)
    lines = [
        f"| task | edges | ranked by | {' | '.join(f'{n} pairs' for n in PAIRS)} |",
        "|" + "---|" * (3 + len(PAIRS)),
    ]
    for task, (at, size), (name, shown) in product(TASKS, enumerate(SIZES), RANKINGS.items()):
        cells = []
        for n in PAIRS:
            runs = [run for seed in SEEDS if (run := found.get(f"{task} {seed} {n}"))]
            values = [run[name][at] for run in runs]
            cells.append(spread(values) if len(values) > 1 else f"{values[0]:.2f}" if values else "–")
        lines.append(f"| {task} | {size} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    every = [f"{task} {seed} {n}" for seed, n, task in product(SEEDS, PAIRS, TASKS)]
    for name in sys.argv[1:] or [each for each in every if each not in files.committed(RESULT)]:
        task, seed, n = name.split(" ")
        files.add(RESULT, name, measure, task, int(seed), int(n))
