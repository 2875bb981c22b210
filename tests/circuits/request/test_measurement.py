"""Metric values stay on the device until a batch ends; what is wrong with them is said then, before any is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import eap_circuits as eap
from bench.pretended import counting, pretending
from eap_circuits.errors import InputError, InputWarning
from eap_circuits.forward import download, make_batches, upload
from eap_circuits.request import Measurement, fetch, prepare
from tests.circuits.conftest import random_circuit


def on_the_way() -> list[torch.Tensor]:
    x = torch.arange(6.0).view(2, 3)
    whole = [x.T, x.double(), x.bfloat16()[:1], x.long(), x > 2, torch.tensor(7.0), torch.zeros(0, 3)]
    return [*(each.clone() if i else each for i, each in enumerate(whole)), torch.arange(6.0).view(1, 6)[:, 1]]


def test_tensors_go_and_come_back_in_one_piece() -> None:
    given = on_the_way()
    with pretending():
        with counting() as counts:
            there = upload(torch.device("cuda"), *given)
        assert not counts.waits
        with counting() as counts:
            found = download(*there)
        assert counts.waits.total() == 1
    for x, y in zip(given, found, strict=True):
        assert y.dtype == x.dtype and y.device.type == "cpu" and torch.equal(x, y)


def test_what_is_on_the_cpu_stays_as_it_is() -> None:
    given = on_the_way()
    assert all(x is y for x, y in zip(given, download(*given), strict=True))


@pytest.fixture
def circuits(make_model):
    graph = eap.attribute(make_model("llama"), one_pair(), method="eap").graph
    return [random_circuit(graph, seed, 0.5) for seed in range(3)]


def one_pair() -> eap.PairedDataset:
    return eap.PairedDataset.from_tokens([[1, 2, 3]], [[4, 2, 3]], [3], [[5, 6]])


def test_the_first_value_that_is_not_finite_is_named(circuits, make_model, make_pairs) -> None:
    """In the order of runs."""
    model, data = make_model("llama"), make_pairs(seed=2)
    runs = 0

    def metric(logits, batch):
        nonlocal runs
        runs += 1
        values = logits[:, 3].clone()
        for run, example, value in ((9, 1, torch.inf), (8, 4, torch.nan)):
            if run == runs:
                values[batch.index == example] = value
        return values

    with pytest.raises(InputError, match=r"^metric value of example 4: expected a finite number, found nan\.$"):
        eap.evaluate(model, circuits, data, metric, reuse_prefix=False)
    assert runs == 9  # three of each end, and one of each circuit


@pytest.mark.parametrize("call", ["attribute", "evaluate"])
def test_nothing_of_a_batch_that_is_not_finite_is_stored(call, circuits, make_model, make_pairs, tmp_path) -> None:
    model, data, path = make_model("llama"), make_pairs(seed=2), tmp_path / "kept.safetensors"
    wrong = list(make_batches(data, 2, True, torch.device("cpu")))[-1].index

    def metric(logits, batch):
        return torch.where(torch.isin(batch.index, wrong), torch.nan, logits[:, 3] - logits[:, 4])

    given = {"metric": metric, "batch_size": 2, "checkpoint": path}
    with pytest.raises(InputError, match=rf"^metric value of example {int(wrong[0])}: expected a finite number"):
        eap.attribute(model, data, **given) if call == "attribute" else eap.evaluate(model, circuits, data, **given)
    kept = load_file(path)
    assert not kept["finished"][wrong].any() and kept["finished"].sum() == len(data) - len(wrong)
    assert all(x.isfinite().all() for x in kept.values())


def test_a_metric_may_use_its_result_again(circuits, make_model, make_pairs) -> None:
    model, data = make_model("llama"), make_pairs()
    held = torch.empty(len(data), dtype=torch.float64)

    def again(logits, batch):
        return held.copy_(logits[:, 3])

    def once(logits, batch):
        return logits[:, 3].clone()

    pairs = [eap.evaluate(model, circuits, data, metric, reuse_prefix=False) for metric in (again, once)]
    for found, right in zip(*pairs, strict=True):
        assert torch.equal(found.values, right.values) and found.rounding == right.rounding > 0


def test_a_metric_may_change_what_it_is_given(circuits, make_model, make_pairs) -> None:
    """Its logits and all of its batch, which other runs are still to see, and the grad mode."""
    model, data = make_model("llama"), make_pairs(n=4)

    def in_place(logits, batch):
        logits *= 2
        batch.clean_logits.mul_(3)
        batch.corrupted_logits.add_(1)
        batch.answers.add_(1).remainder_(59)
        right = (logits - batch.clean_logits + batch.corrupted_logits).gather(1, batch.answers.clone())[:, 0]
        right = right * batch.index.clone()
        batch.index.zero_()
        batch.lengths.zero_()
        torch.set_grad_enabled(False)
        return right

    def plain(logits, batch):
        whole = 2 * logits - 3 * batch.clean_logits + batch.corrupted_logits + 1
        return whole.gather(1, (batch.answers + 1) % 59)[:, 0] * batch.index

    for call in (
        lambda metric: eap.attribute(model, data, metric, steps=2).values,
        lambda metric: eap.attribute(model, data, metric, method="exact", edges=circuits[0]).values,
        lambda metric: torch.stack([each.values for each in eap.evaluate(model, circuits, data, metric)]),
        lambda metric: eap.attribute_circuit(model, circuits[0], data, metric).values,
    ):
        torch.testing.assert_close(call(in_place), call(plain))


def test_spelling_is_said_once_and_by_a_run_that_ends(make_model, make_pairs) -> None:
    """Where memory runs out a batch is measured again; only what was fetched counts as looked at."""
    model, data = make_model("llama"), make_pairs(n=3)
    logits = torch.zeros(3, 59, dtype=torch.float64)
    logits[1, 40] = 10
    variants = data.answers.new_tensor([[-1, -1], [40, -1], [-1, -1]])
    request = prepare(model, replace(data, variants=variants), "prob_diff")
    (batch,) = make_batches(request.data, 3, False, request.arch.device)
    Measurement(request, batch, logits, logits).values(logits)
    measured = Measurement(request, batch, logits, logits)
    measured.values(logits)
    with pytest.warns(InputWarning, match=r"^example 1: the model finds the good answer 22,026 times likelier"):
        fetch([measured])
    assert not Measurement(request, batch, logits, logits).misspelled
