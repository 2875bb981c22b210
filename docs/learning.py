"""Measure how faithful circuits of learned rankings are, beside those of EAP-IG, on prompts that neither has seen.

python -m docs.learning [NAME ...]     # cost, divergence, "ioi 0", "control 0" ...; adds to docs/results/learning.json
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from docs import files

if TYPE_CHECKING:
    from bench.tables import Results

RESULT = Path(__file__).with_name("results") / "learning.json"
TASKS, SEEDS = ("ioi", "subject-verb-agreement"), (0, 1, 2)
# What is learned: the task's own metric, or another by name.
METRICS = {"own": "its metric", "kl_divergence": "the divergence"}
LEARNED, LEARNED_ON_OWN = "learned", "learned, on the prompts it was learned from"
SIZES = (45, 95, 185, 380, 710, 1550)
LARGER = (*SIZES, 3200, 7000)
LEARNED_FROM, PAIRS = 16, 40
CIRCUITS, EXAMPLES, ROUNDS = 2, 4, 16  # of the measured step, as by default
FEW_STEPS = 40  # of learning, which take about as long as pruning
REFINED = (95, 185, 380)  # sizes
GATES, ONE_SIZE = ("hard-concrete", "uniform"), 185
THREADS, TIMED_STEPS, CALL_ROUNDS = {"one thread": 1, "two threads": 2}, 20, 3
TOGETHER = "both seeds' steps together"
CONTROLLED, ANSWERS, WEIGHTS = "ioi", ("the pair's own", "another pair's"), ("trained", "shuffled")


def model_and_pairs(task: str, seed: int, few: int = LEARNED_FROM) -> tuple[Any, Any, Any]:
    """SmolLM2, this many prompt pairs to learn from, and others."""
    import eap_circuits as eap
    from eap_circuits.adapters.pretrained import load_model

    model, tokenizer = load_model("smollm2")
    data = eap.load_task(task, tokenizer, n=PAIRS, seed=seed)
    return model, data[:few], data[few:]


def circuits_of(scores: Any, sizes: tuple[int, ...] = SIZES) -> list[Any]:
    return [scores.select(n_edges=size, how="greedy", exactly=True) for size in sizes]


def faithfulness(model: Any, scores: Any, data: Any) -> list[float]:
    import eap_circuits as eap

    return [result.faithfulness for result in eap.evaluate(model, circuits_of(scores), data)]


def run(task: str, seed: int, metric: str) -> dict[str, Any]:
    """One seed, of the prompts and of what learning draws; the metric is "own", the task's, or another's name."""
    import eap_circuits as eap

    model, few, others = model_and_pairs(task, seed)
    scores = eap.attribute(model, few)
    learned = eap.learn_mask(model, few, None if metric == "own" else metric, start=scores, seed=seed)
    return {
        "eap-ig": faithfulness(model, scores, others),
        "learned": faithfulness(model, learned, others),
        "learned, on the prompts it was learned from": faithfulness(model, learned, few),
        "settings": learned.info["learning"],
    }


def divergence() -> dict[str, Any]:
    """Beside faithfulness in the logit difference, what was learned: how far circuits are from the model, in nats."""
    import eap_circuits as eap

    model, few, others = model_and_pairs("ioi", 77)
    scores = eap.attribute(model, few)
    found: dict[str, Any] = {"sizes": LARGER}
    for name, each in {"eap-ig": scores, "learned": eap.learn_mask(model, few, "kl_divergence", start=scores)}.items():
        circuits = circuits_of(each, LARGER)
        found[name] = {
            "faithfulness": [result.faithfulness for result in eap.evaluate(model, circuits, others)],
            "divergence": [-result.mean for result in eap.evaluate(model, circuits, others, "kl_divergence")],
        }
    return found


def divergences(_: Results) -> str:
    found = files.committed(RESULT)["divergence"]
    lines = [f"| scores | | {' | '.join(map(str, found['sizes']))} |", "|" + "---|" * (2 + len(found["sizes"]))]
    for scores in ("eap-ig", "learned"):
        for measured, values in found[scores].items():
            lines.append(f"| {scores} | {measured} | {' | '.join(f'{x:.2f}' for x in values)} |")
    return "\n".join(lines) + "\n"


def control(seed: int) -> dict[str, Any]:
    """What the freedom of a mask alone buys: answers of other pairs, and weights of which only the values are left.

    Every ranking is learned from EAP-IG's scores for the same answers and weights.
    """

    import eap_circuits as eap

    model, *pairs = model_and_pairs(CONTROLLED, seed)
    few, others = (replace(each, variants=None) for each in pairs)
    parts = {"learned": few, "others": others}
    graph = eap.attribute(model, few[:1], method="eap").graph
    whole = eap.Circuit.from_mask(graph, graph.edge_mask)
    ends = {where: eap.evaluate(model, whole, part) for where, part in parts.items()}

    answers: dict[str, Any] = {}
    for shift, name in enumerate(ANSWERS):
        taught = {where: replace(part, answers=part.answers.roll(shift, 0)) for where, part in parts.items()}
        scores = eap.attribute(model, taught["learned"])
        target = ends["learned"].clean_values  # how much the model prefers the pair's own answer
        learned = eap.learn_mask(model, taught["learned"], start=scores, target=target, seed=seed)
        answers[name] = {}
        for where, part in taught.items():
            span = ends[where].clean - ends[where].corrupted
            ran = eap.evaluate(model, circuits_of(learned), part)
            answers[name][where] = [(result.mean - result.corrupted) / span for result in ran]
    weights: dict[str, Any] = {}
    for name in WEIGHTS:
        if name == "shuffled":
            _shuffle(model, seed)
        scores = eap.attribute(model, few)
        rankings = {"eap-ig": scores, "learned": eap.learn_mask(model, few, "kl_divergence", start=scores, seed=seed)}
        weights[name] = {
            ranking: [result.faithfulness for result in eap.evaluate(model, circuits_of(each), others, "kl_divergence")]
            for ranking, each in rankings.items()
        }
    return {"answers": answers, "weights": weights}


def _shuffle(model: Any, seed: int) -> None:
    """Permute the entries of every matrix."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (each for each in model.parameters() if each.dim() > 1):
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))


def controls(_: Results) -> str:
    """Mean and range over seeds, of what the answers and the weights change."""
    found = files.committed(RESULT)
    runs = [found[name] for name in sorted(found) if name.startswith("control ")]
    lines = [f"| learned | measured on | {' | '.join(map(str, SIZES))} |", "|" + "---|" * (2 + len(SIZES))]
    rows = [("answers", f"{answers} answers", where) for answers in ANSWERS for where in ("learned", "others")]
    rows += [("weights", name, ranking) for name in WEIGHTS for ranking in ("eap-ig", "learned")]
    for kind, name, part in rows:
        key = name.removesuffix(" answers")
        cells = " | ".join(spread(column) for column in zip(*(one[kind][key][part] for one in runs), strict=True))
        if kind == "answers":
            lines.append(f"| {name} | {'its own pairs' if part == 'learned' else 'other pairs'} | {cells} |")
        else:
            what = "not learned: eap-ig" if part == "eap-ig" else "the divergence"
            lines.append(f"| {what}, {name} weights | other pairs | {cells} |")
    return "\n".join(lines) + "\n"


def spread(values: Any) -> str:
    mean, low, high = (f"{round(x, 2) + 0.0:.2f}" for x in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low}–{high})"


def pruning(task: str, seed: int) -> dict[str, Any]:
    """Rankings at about equal cost, in processor seconds of one thread, beside the scores that they start from."""
    import torch

    import eap_circuits as eap

    torch.set_num_threads(1)
    model, few, others = model_and_pairs(task, seed)
    start = eap.attribute(model, few)
    rankings = {
        "eap-ig": lambda: eap.attribute(model, few),
        "pruned": lambda: eap.prune_gradually(model, few, start=start),
        "learned": lambda: eap.learn_mask(model, few, start=start, steps=FEW_STEPS, seed=seed),
    }
    found: dict[str, Any] = {}
    for name, rank in rankings.items():
        began = time.process_time()
        scores = rank()
        seconds = time.process_time() - began
        found[name] = {"seconds": seconds, "faithfulness": faithfulness(model, scores, others)}
    return found


def refining(task: str, seed: int) -> dict[str, Any]:
    """Circuits of EAP-IG, refined: their faithfulness, and the processor seconds of one thread for each of them."""
    import torch

    import eap_circuits as eap

    torch.set_num_threads(1)
    model, few, others = model_and_pairs(task, seed)
    circuits = circuits_of(eap.attribute(model, few), REFINED)
    began = time.process_time()
    refined = [eap.refine(model, circuit, few) for circuit in circuits]
    seconds = (time.process_time() - began) / len(circuits)
    return {
        "seconds": seconds,
        "faithfulness": [result.faithfulness for result in eap.evaluate(model, refined, others)],
        "n_edges": [circuit.n_edges for circuit in refined],
    }


def prunings(_: Results) -> str:
    """Rankings and refined circuits: mean and range over the seeds that a task has."""
    found = files.committed(RESULT)
    lines = [f"| task | seeds | circuits | seconds | {' | '.join(map(str, SIZES))} |", "|" + "---|" * (4 + len(SIZES))]
    for task in TASKS:
        ranked, refined = (
            [run for seed in SEEDS if (run := found.get(f"{kind} {task} {seed}"))] for kind in ("pruning", "refining")
        )
        rows = {name: ([run[name] for run in ranked], SIZES) for name in ("eap-ig", "learned", "pruned") if ranked}
        rows |= {"eap-ig, refined": (refined, REFINED)} if refined else {}
        for name, (runs, sizes) in rows.items():
            shown = f"learned in {FEW_STEPS} steps" if name == "learned" else name
            seconds = sum(run["seconds"] for run in runs) / len(runs)
            columns = dict(zip(sizes, zip(*(run["faithfulness"] for run in runs), strict=True), strict=True))
            cells = [spread(columns[size]) if size in columns else "–" for size in SIZES]
            lines.append(f"| {task} | {len(runs)} | {shown} | {seconds:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gates(task: str, seed: int, name: str) -> dict[str, Any]:
    """What is learned in few steps with one distribution of gates, for all sizes and for one."""
    import eap_circuits as eap

    model, few, others = model_and_pairs(task, seed)
    start = eap.attribute(model, few)
    found: dict[str, Any] = {}
    for size in (None, ONE_SIZE):
        learned = eap.learn_mask(model, few, start=start, steps=FEW_STEPS, n_edges=size, gates=name, seed=seed)
        found["all sizes" if size is None else "one size"] = faithfulness(model, learned, others)
    return found


def gate_table(_: Results) -> str:
    """Mean and range over seeds, by the distribution of gates."""
    found = files.committed(RESULT)
    lines = [f"| task | gates | learned for | {' | '.join(map(str, SIZES))} |", "|" + "---|" * (3 + len(SIZES))]
    for task, name in product(TASKS, GATES):
        runs = [run for seed in SEEDS if (run := found.get(f"gates {task} {seed} {name}"))]
        for what in ("all sizes", "one size") if runs else ():
            columns = zip(SIZES, zip(*(run[what] for run in runs), strict=True), strict=True)
            cells = [spread(column) if what == "all sizes" or size == ONE_SIZE else "–" for size, column in columns]
            lines.append(f"| {task} | {name} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def calls() -> dict[str, Any]:
    """Seconds by the clock of whole calls and of their steps, once all prompts have run: medians, in alternation."""
    import torch

    import eap_circuits as eap

    model, data, _ = model_and_pairs("ioi", 0)
    scores = eap.attribute(model, data)
    whole: dict[str, list[float]] = {name: [] for name in THREADS}
    steps: dict[str, list[float]] = {name: [] for name in THREADS}
    for _ in range(CALL_ROUNDS):
        for name, threads in THREADS.items():
            torch.set_num_threads(threads)
            times = [time.perf_counter()]

            def note(*_: int) -> None:
                times.append(time.perf_counter())  # noqa: B023

            eap.learn_mask(model, data, start=scores, steps=TIMED_STEPS, progress=note)
            whole[name].append(time.perf_counter() - times[0])
            steps[name] += [after - before for before, after in pairwise(times[LEARNED_FROM // EXAMPLES :])]
    return {name: {"call": median(whole[name]), "step": median(steps[name])} for name in THREADS}


def cost() -> dict[str, Any]:
    """The processor seconds of a step, of its circuits' forward passes, of the model's on as many prompts, and of
    another seed's step on these prompts, alone and in the same pass: on one thread, in alternation, means over the
    sizes that steps draw, with the gates that they begin with."""
    import torch

    import eap_circuits as eap
    from eap_circuits.forward import batch_of, borrowed
    from eap_circuits.intervention import run_circuits
    from eap_circuits.learning.descent.gates import draw_sizes, open_gates, starting_places
    from eap_circuits.learning.lessons import prepare_lesson
    from eap_circuits.request import prepare

    torch.set_num_threads(1)
    model, data, _ = model_and_pairs("ioi", 0, EXAMPLES)
    scores = eap.attribute(model, data, method="eap")
    graph, edges = scores.graph, scores.graph.edge_mask
    places = starting_places(scores.values[edges])
    request = prepare(model, data, "kl_divergence")

    def draw(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        sizes = draw_sizes(CIRCUITS, graph.n_edges // 1000, graph.n_edges // 5, generator)
        masks = torch.zeros(CIRCUITS, *edges.shape)
        masks[:, edges] = open_gates(places, sizes, generator)
        return masks

    times: dict[str, list[float]] = {}
    with borrowed(model):
        lesson = prepare_lesson(request, graph, batch_of(data, torch.arange(EXAMPLES), True, request.arch.device))
        embeddings = lesson.runner.embed(lesson.runner.batch.clean).repeat(CIRCUITS, 1, 1)

        def step(masks: Any) -> None:
            lesson.gradient(request, graph, masks, 10**6)

        def forward(masks: Any) -> None:
            list(run_circuits(lesson.runner, graph, lesson.ablated, list(masks)))

        def plain(_: Any) -> None:
            with torch.no_grad():
                lesson.runner.logits(embeddings)

        for number in range(ROUNDS):
            own, other = draw(number), draw(number + ROUNDS)
            both = torch.cat([own, other])
            runs = {"step": (step, own), "its circuits": (forward, own), "the model": (plain, own)}
            runs |= {"another seed's step": (step, other), TOGETHER: (step, both)}
            for name, (call, masks) in runs.items():
                began = time.process_time()
                call(masks)
                times.setdefault(name, []).append(time.process_time() - began)
    means = {name: sum(found[1:]) / (ROUNDS - 1) for name, found in times.items()}  # the first round warms up
    return means


def costs(_: Results) -> str:
    """A step in forward passes and beside another seed's, and all steps by the clock."""
    found, calls = (files.committed(RESULT)[name] for name in ("cost", "calls"))
    step = found["step"]
    apart = step + found["another seed's step"]
    clock = {name: calls[name]["call"] + (200 - TIMED_STEPS) * calls[name]["step"] for name in THREADS}
    return (
        f"| a step | {step:.2f} s |\n|---|---|\n"
        f"| in forward passes of its circuits | {step / found['its circuits']:.1f} |\n"
        f"| in forward passes of the model on as many prompts | {step / found['the model']:.1f} |\n"
        f"| steps of two seeds side by side, beside one after the other | {found[TOGETHER] / apart:.2f} |\n"
        + "".join(f"| a call of 200 steps on {name}, by the clock | {clock[name]:.0f} s |\n" for name in THREADS)
    )


def table(_: Results) -> str:
    """Mean and range over seeds of the faithfulness at each size."""
    found = files.committed(RESULT)
    lines = [f"| task | seeds | scores | {' | '.join(map(str, SIZES))} |", "|" + "---|" * (3 + len(SIZES))]
    # EAP-IG's scores are the same whatever is learned from them.
    rows = [("eap-ig", "eap-ig", list(METRICS))]
    for part in (LEARNED, LEARNED_ON_OWN):
        rows += [(part.replace(LEARNED, f"learned by {what}", 1), part, [metric]) for metric, what in METRICS.items()]
    for task, (name, part, metrics) in product(TASKS, rows):
        every = [[found.get(f"{task} {seed} {metric}") for metric in metrics] for seed in SEEDS]
        runs = [next(filter(None, each)) for each in every if any(each)]
        if runs:
            cells = [spread(column) for column in zip(*(one[part] for one in runs), strict=True)]
            lines.append(f"| {task} | {len(runs)} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    every = ["cost", "divergence", "control 0", "control 1", *map(" ".join, product(TASKS, map(str, SEEDS), METRICS))]
    every += [f"{kind} {task} {seed}" for kind, task, seed in product(("pruning", "refining"), TASKS, SEEDS)]
    every += ["calls", *(f"gates {' '.join(each)}" for each in product(TASKS, map(str, SEEDS), GATES))]
    measures: dict[Any, Any] = {"cost": cost, "calls": calls, "divergence": divergence, "control": control}
    measures |= {"pruning": pruning, "refining": refining, "gates": gates}
    for name in sys.argv[1:] or every:
        call, *given = (int(word) if word.isdigit() else word for word in name.split(" "))
        if call in TASKS:
            files.add(RESULT, name, run, call, *given)
        else:
            files.add(RESULT, name, measures[call], *given)
