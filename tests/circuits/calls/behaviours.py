"""Behaviours of more than one next token by hand, from the runs of plain_runs.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import eap_circuits as eap
from tests.circuits.conftest import prompts, random_pairs
from tests.circuits.decoders import Decoder
from tests.circuits.models import VOCABULARY
from tests.circuits.plain_runs import differences, gradients, of_circuit, plain_run

SEQUENCES = ("sequence_logprob", "sequence_logprob_diff", "token_logprob", "token_logprob_diff")


def margin(logits: Tensor, batch: Any) -> Tensor:
    """Of one's own: how far the first token's logit is from the mean, squared, summed over scored positions."""
    return ((logits[..., 0] - logits.mean(-1)).square() * batch.mask).sum(1)


def scored_pairs(seed: int = 0, n: int = 4) -> eap.PairedDataset:
    """Any positions are scored, also before the first difference, with weights, one of which is 0."""
    data, generator = random_pairs(seed, n), torch.Generator().manual_seed(seed)
    scored = torch.full((n, 4), -1)
    for row, length in enumerate(data.lengths.tolist()):
        some = torch.randperm(length - 1, generator=generator)[: 1 + row % 4].sort().values
        scored[row, : len(some)] = some
    weights = torch.rand(n, 4, generator=generator, dtype=torch.float64) + 0.1
    weights[-1, 0] = 0
    tensors = data.clean, data.corrupted, data.lengths, data.answers
    return eap.PairedDataset.from_tokens(*tensors, scored=scored, scored_weights=weights)


def answered_pairs(seed: int = 0, n: int = 3) -> eap.PairedDataset:
    """Sets of one to three answers of one to three tokens."""
    data, generator = random_pairs(seed, n), torch.Generator().manual_seed(seed)
    answers = torch.full((n, 2, 2, 3), -1)
    for place in range(n * 4):
        pair, side, which = place // 4, place // 2 % 2, place % 2
        if which == 0 or (pair + side) % 2:
            size = 1 + int(torch.randint(3, (), generator=generator))
            answers[pair, side, which, :size] = torch.randperm(VOCABULARY, generator=generator)[:size]
    return eap.PairedDataset.from_tokens(data.clean, data.corrupted, data.lengths, answers)


DATA: dict[Any, Any] = dict.fromkeys(("kl_divergence", "next_token_loss", "prob_diff", margin), scored_pairs)
DATA |= dict.fromkeys((*SEQUENCES, "js_divergence"), answered_pairs)
CASES = list(DATA)


def case(metric: Any, n: int = 3) -> eap.PairedDataset:
    return DATA.get(metric, scored_pairs)(n=n)


def rows_of(data: eap.PairedDataset, e: int) -> list[tuple[Tensor, Tensor, list[int], Tensor]]:
    """Of each row of a pair its clean and corrupted tokens, its scored positions, and what should follow these."""
    clean, corrupted = prompts(data, e)
    if data.answers.dim() < 4:
        scored = [p for p in data.scored[e].tolist() if p >= 0]
        return [(clean, corrupted, scored, clean[[p + 1 for p in scored]])]
    rows = []
    for answer in data.answers[e].flatten(0, 1):
        own = answer[answer >= 0]
        if len(own):
            scored = list(range(len(clean) - 1, len(clean) + len(own) - 1))
            rows.append((torch.cat([clean, own[:-1]]), torch.cat([corrupted, own[:-1]]), scored, own))
    return rows


def value(metric: Any, data: eap.PairedDataset, e: int, logits: list[Tensor], clean: list[Tensor]) -> Tensor:
    """The metric of a pair, from the logits [P, V] of its rows in a run and in the clean run, written out."""
    logs = [x.log_softmax(-1) for x in logits]
    if metric == "js_divergence":  # over all positions of all answers
        sides_of = [torch.cat(logs), torch.cat([x.detach().log_softmax(-1) for x in clean])]
        middle = ((sides_of[0].exp() + sides_of[1].exp()) / 2).log()
        return -sum((x.exp() * (x - middle)).sum(1).mean() for x in sides_of) / 2
    if data.answers.dim() == 4:
        sides: dict[int, list[Tensor]] = {0: [], 1: []}
        kept = [(i, answer[answer >= 0]) for i, answer in enumerate(data.answers[e].flatten(0, 1)) if answer[0] >= 0]
        for (place, tokens), log in zip(kept, logs, strict=True):
            total = sum(log[p, token] for p, token in enumerate(tokens.tolist()))
            sides[place // data.answers.shape[2]].append(total / len(tokens) if "token" in metric else total)
        good, bad = (torch.stack(sides[side]).exp().sum().log() for side in (0, 1))
        return good - bad if metric.endswith("diff") else good
    (log,), (x,), (right,) = logs, logits, [each.detach().log_softmax(-1) for each in clean]
    if metric is margin:
        return (x[:, 0] - x.mean(1)).square().sum()
    good, bad = data.answers[e]
    each = {
        "kl_divergence": -(right.exp() * (right - log)).sum(1),
        "next_token_loss": log[torch.arange(len(log)), rows_of(data, e)[0][3]],
        "prob_diff": log[:, good].exp() - log[:, bad].exp(),
    }[metric]
    weights = data.scored_weights[e, : len(log)]
    return (weights * each).sum() / weights.sum()


def runs(decoder: Decoder, data: eap.PairedDataset, e: int) -> list[tuple[Any, Any, Any, Any, list[int]]]:
    """Of each row of a pair: both prompts' embeddings, both runs, scored positions."""
    found = []
    for clean, corrupted, scored, _ in rows_of(data, e):
        x, y = decoder.embed(clean), decoder.embed(corrupted)
        found.append((x, y, plain_run(decoder, x, scored=scored), plain_run(decoder, y, scored=scored), scored))
    return found


def scores_by_hand(model: Any, data: eap.PairedDataset, metric: Any, alphas: list[float]) -> Tensor:
    """Σ_rows Σ_t ⟨Δ_u, mean over points of −∂metric/∂x_v⟩, the mean over pairs; the metric is of all rows of a pair."""
    decoder, total = Decoder(model, "kv"), 0
    for e in range(len(data)):
        rows = runs(decoder, data, e)
        clean = [row[2].logits for row in rows]
        for alpha in alphas:
            points = [plain_run(decoder, torch.lerp(y, x, alpha), scored=scored) for x, y, _, _, scored in rows]
            loss = -value(metric, data, e, [point.logits for point in points], clean)
            for point, (_, _, own, other, _) in zip(points, rows, strict=True):
                slopes = gradients(loss, point.x)
                total += torch.einsum("utd,vtd->uv", differences(own, other), slopes) / len(alphas) / len(data)
    return total


def circuit_values(model: Any, data: eap.PairedDataset, metric: Any, mask: Tensor, heads: str = "kv") -> list[float]:
    decoder, found = Decoder(model, heads), []
    for e in range(len(data)):
        rows = runs(decoder, data, e)
        logits = [plain_run(decoder, x, of_circuit(mask, other.c), scored).logits for x, _, _, other, scored in rows]
        found.append(float(value(metric, data, e, logits, [row[2].logits for row in rows])))
    return found


def alone(data: eap.PairedDataset) -> eap.PairedDataset:
    where = {"scored": data.scored, "scored_weights": data.scored_weights}
    return eap.PairedDataset.from_tokens(data.clean, None, data.lengths, data.answers, **where)
