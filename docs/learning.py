"""Measure how faithful circuits of learned rankings are, beside those of EAP-IG, on prompts that neither has seen.

python -m docs.learning [TASK SEED ...]     # adds to docs/results/learning.json; about five minutes each on 2 cores
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.tables import Results

RESULT = Path(__file__).with_name("results") / "learning.json"
TASKS, SEEDS = ("ioi", "subject-verb-agreement"), (0, 1, 2)
SIZES = (45, 95, 185, 380, 710, 1550)
LEARNED_FROM, PAIRS = 16, 40


def faithfulness(model: Any, scores: Any, data: Any) -> list[float]:
    import eap_circuits as eap

    circuits = [scores.select(n_edges=size, how="greedy", exactly=True) for size in SIZES]
    return [result.faithfulness for result in eap.evaluate(model, circuits, data)]


def run(task: str, seed: int) -> dict[str, Any]:
    """One seed: of the prompts, and of what learning draws."""
    import torch

    import eap_circuits as eap
    from bench import measure
    from bench.processes import commit
    from eap_circuits.adapters.pretrained import load_model

    model, tokenizer = load_model("smollm2")
    data = eap.load_task(task, tokenizer, n=PAIRS, seed=seed)
    few, others = data[:LEARNED_FROM], data[LEARNED_FROM:]
    scores = eap.attribute(model, few)
    steps: list[float] = []
    learned = eap.learn_mask(model, scores, few, seed=seed, progress=lambda *_: steps.append(time.perf_counter()))
    settings = learned.info["learning"]
    # What a step's circuits take without a gradient; one size stands for all that steps draw.
    share = (settings["smallest"] * settings["largest"]) ** 0.5
    circuit = learned.select(n_edges=round(share), how="top", prune=False)
    group = few[: settings["examples"]]

    def forwards() -> None:
        eap.evaluate(model, [circuit] * settings["circuits"], group, "kl_divergence")

    return {
        "eap-ig": faithfulness(model, scores, others),
        "learned": faithfulness(model, learned, others),
        "learned, on the prompts it was learned from": faithfulness(model, learned, few),
        "seconds": steps[-1] - steps[0],
        "seconds of a step": (steps[-1] - steps[0]) / (len(steps) - 1),
        "seconds of evaluating its circuits": measure.seconds(forwards, 1, "cpu"),
        "settings": settings,
        "threads": torch.get_num_threads(),
        "machine": measure.machine(),
        "versions": measure.versions(),
        "commit": commit(),
    }


def committed() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    return found


def table(_: Results) -> str:
    """Mean and range over seeds of the faithfulness at each size."""
    found = committed()
    lines = [f"| task | scores | {' | '.join(map(str, SIZES))} |", "|" + "---|" * (2 + len(SIZES))]
    for task in TASKS:
        runs = [one for name, one in sorted(found.items()) if name.startswith(f"{task} ")]
        for scores in ("eap-ig", "learned", "learned, on the prompts it was learned from"):
            columns = zip(*(one[scores] for one in runs), strict=True)
            cells = [f"{sum(x) / len(x):.2f} ({min(x):.2f}–{max(x):.2f})" for x in columns]
            lines.append(f"| {task} | {scores} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    asked = list(zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True))
    for task, seed in asked or [(task, seed) for task in TASKS for seed in SEEDS]:
        result = run(task, seed)
        RESULT.write_text(json.dumps({**committed(), f"{task} {seed}": result}, indent=1) + "\n")
