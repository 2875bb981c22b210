"""A circuit as a module: against `evaluate`, padded on either side, cached and not, beside hooks, and what is refused."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import logit_difference, random_circuit
from tests.circuits.models import VOCABULARY
from tests.circuits.untouched import differences, snapshot

SOME = ["gpt2", "llama", "gemma2", "qwen3-moe", "mamba", "opt", "mistral-window"]
ABLATIONS = ["patching", "zero", "mean", "mean-positional"]


def left(ids, lengths):
    """Right padded ids [E, T], padded on the left, and their mask."""
    mask = torch.arange(ids.shape[1]) >= (ids.shape[1] - lengths)[:, None]
    moved = torch.stack([row.roll(ids.shape[1] - int(n)) for row, n in zip(ids, lengths)])
    return moved, mask.long()


def values_of(logits, data, last):
    return torch.stack([logit_difference(logits[e, last[e]], data, e) for e in range(len(data))])


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", SOME)
def test_metrics_are_those_of_evaluate(name, ablation, make_model, make_pairs):
    model, data = make_model(name), make_pairs(seed=3, n=5)
    circuit = random_circuit(bind(model).graph("kv"), 1, 0.5)
    given = {} if ablation in ("patching", "zero") else {"ablation_data": data}
    runs = eap.circuit_model(model, circuit, ablation, **given)
    other = {"corrupted_ids": data.corrupted} if ablation == "patching" else {}
    with StayDouble():
        right = eap.evaluate(model, circuit, data, ablation=ablation).values
        mask = (torch.arange(data.clean.shape[1]) < data.lengths[:, None]).long()
        logits = runs(data.clean, mask, **other).logits
        torch.testing.assert_close(values_of(logits, data, data.lengths - 1), right)
        ids, mask = left(data.clean, data.lengths)
        other = {"corrupted_ids": left(data.corrupted, data.lengths)[0]} if other else {}
        logits = runs(ids, mask, **other).logits
    torch.testing.assert_close(values_of(logits, data, [-1] * len(data)), right)


def by_hand(runs, ids, mask, other, new):
    """(Tokens, logits [E, new, V]) of a greedy run, each token from a run of all tokens before it."""
    found = []
    for _ in range(new):
        found.append(runs(ids, mask, other).logits[:, -1])
        token = found[-1].argmax(1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        other = None if other is None else torch.cat([other, token], 1)
    return ids, torch.stack(found, 1)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("name", [*SOME, "bloom", "bart", "marian"])
def test_generated_tokens_are_those_of_whole_runs(name, heads, ablation, make_model, make_pairs):
    model, data = make_model(name), make_pairs(seed=3, n=3)
    graph = bind(model).graph(heads)
    if heads == "query" and graph == bind(model).graph("kv"):
        return
    longer = make_pairs(seed=4, n=3, longest=16)
    given = {} if ablation in ("patching", "zero") else {"ablation_data": longer}
    (ids, mask), other = left(data.clean, data.lengths), None
    if ablation == "patching":
        other = left(data.corrupted, data.lengths)[0]
    with StayDouble():
        runs = eap.circuit_model(model, random_circuit(graph, 1, 0.6), ablation, **given)
        right, logits = by_hand(runs, ids, mask, other, 4)
        said = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
        found = runs.generate(ids, mask, other, **said)
    torch.testing.assert_close(torch.stack(found.logits, 1), logits)
    assert found.sequences.tolist() == right.tolist()
