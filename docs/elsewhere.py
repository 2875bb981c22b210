"""Ask a learned circuit, and one of EAP-IG, what a faithfulness card asks.

python -m docs.elsewhere [SEED ...]     # a few minutes each; adds to docs/results/elsewhere.json
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docs import files
from docs.learning import FEW_STEPS, LEARNED_FROM, PAIRS, spread

if TYPE_CHECKING:
    from bench.tables import Results

RESULT = Path(__file__).with_name("results") / "elsewhere.json"
SEEDS = (0, 1)
EDGES, LEFT_OUT, NO_LOSS = 185, 40, 0.01  # of a circuit; of those, left out alone; of faithfulness
RANKINGS = {"eap-ig": "EAP-IG", "learned": f"pruned, then learned in {FEW_STEPS} steps"}
WHERE = ("other pairs", "other templates", "another corruption")
BESIDE = {"random": "random circuits", "complement": "all other edges"}


def ask(seed: int) -> dict[str, Any]:
    """Circuits of IOI, ranked by pairs of half of the templates: what their cards say."""
    import eap_circuits as eap
    from eap_circuits.adapters.pretrained import load_model
    from eap_circuits.generated import ioi

    model, tokenizer = load_model("smollm2")
    records = ioi.generate(tokenizer, 4 * PAIRS, random.Random(seed))
    starts = tuple(template.split("{")[0] for template in ioi.TEMPLATES[: len(ioi.TEMPLATES) // 2])
    known = [record for record in records if record["clean"].startswith(starts)]
    unknown = [record for record in records if not record["clean"].startswith(starts)]
    held_out = known[LEARNED_FROM:PAIRS]
    parts = (known[:LEARNED_FROM], held_out, unknown[: len(held_out)], [_given_by_the_other(each) for each in held_out])
    few, pairs, *others = (eap.PairedDataset.from_records(part, tokenizer) for part in parts)
    scores = eap.attribute(model, few)
    pruned = eap.prune_gradually(model, few, start=scores)
    learned = eap.learn_mask(model, few, start=pruned, steps=FEW_STEPS, seed=seed)
    found: dict[str, Any] = {}
    usual = scores.select(EDGES, how="greedy", exactly=True)
    for name, ranking in {"eap-ig": scores, "learned": learned}.items():
        circuit, asked = ranking.select(EDGES, how="greedy", exactly=True), dict(zip(WHERE[1:], others, strict=True))
        card = eap.faithfulness_card(model, circuit, pairs, others=asked, seeds=[seed], most_edges=LEFT_OUT)
        found[name] = {
            WHERE[0]: card.faithfulness,
            **{where: result.faithfulness for where, result in card.others.items()},
            **{beside: baseline.faithfulness[0] for beside, baseline in card.beside.items()},
            "shared": int((circuit.mask & usual.mask).sum()),
            "cost": list(card.cost.values()),
        }
    return found


def _given_by_the_other(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose corrupted prompt swaps the roles: who receives in the clean prompt gives."""
    clean, spans = record["clean"], record["spans"]
    first, second, giver = (clean[slice(*spans[name])] for name in ("first", "second", "giver"))
    start, end = spans["giver"]
    return {**record, "corrupted": clean[:start] + (second if first == giver else first) + clean[end:]}


def table(_: Results) -> str:
    """Mean and range over seeds of faithfulness; counts of edges, of all seeds."""
    runs = list(files.committed(RESULT).values())
    lines = [f"| | {' | '.join(RANKINGS.values())} |", "|" + "---|" * (1 + len(RANKINGS))]
    for key in (*WHERE, *BESIDE):
        cells = [spread([run[name][key] for run in runs]) for name in RANKINGS]
        lines.append(f"| faithfulness, {f'on {key}' if key in WHERE else f'of {BESIDE[key]}'} | {' | '.join(cells)} |")
    costs = [[cost for run in runs for cost in run[name]["cost"]] for name in RANKINGS]
    rows = {
        f"of {EDGES} edges, EAP-IG has": [", ".join(str(run[name]["shared"]) for run in runs) for name in RANKINGS],
        f"edges without which less than {NO_LOSS} is lost": [
            f"{sum(cost < NO_LOSS for cost in each)} of {len(each)}" for each in costs
        ],
        "the most that is lost without one": [f"{max(each):.2f}" for each in costs],
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for seed in sys.argv[1:] or map(str, SEEDS):
        files.add(RESULT, seed, ask, int(seed))
