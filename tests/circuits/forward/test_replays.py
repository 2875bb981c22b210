"""Passes that are captured once and replayed: on a pretended GPU, whose graphs run nothing while they are captured."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import eap_circuits as eap
from bench.pretended import graphs, pretending
from bench.pretended.tensors import state
from eap_circuits.adapters import bind
from eap_circuits.budget import memory, replays
from eap_circuits.errors import InputWarning
from eap_circuits.evaluation import circuit_values
from eap_circuits.forward import upload
from eap_circuits.forward.replays import captured
from eap_circuits.methods.gradient import method

EXAMPLES, TOKENS, VOCABULARY = 5, 7, 59
REPLAYED = f"{EXAMPLES - 3} of {EXAMPLES} batches"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batches of one example are enough to be captured, and no graph is left behind."""
    monkeypatch.setattr(replays, "FEWEST", 1)
    yield
    assert not graphs.alive and not captured._capturing and state["stream"] is None


def alike(shared: int = 2, n: int = EXAMPLES) -> eap.PairedDataset:
    """Pairs of one shape, that differ from the same token on."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, VOCABULARY, (n, TOKENS), generator=generator)
    corrupted = clean.clone()
    corrupted[:, shared] = (clean[:, shared] + 1) % VOCABULARY
    answers = torch.tensor([[5, 6]]) + torch.arange(n)[:, None]
    return eap.PairedDataset.from_tokens(clean, corrupted, torch.full((n,), TOKENS), answers)


def attributed(model: Any, data: eap.PairedDataset, gpu: bool = True, **settings: Any) -> eap.EdgeScores:
    settings = {"steps": 2, "batch_size": 1, **settings}
    return eap.attribute(model.cuda() if gpu else model, data, **settings)


def both(make: Callable[[], Any], data: eap.PairedDataset, **settings: Any) -> tuple[eap.EdgeScores, eap.EdgeScores]:
    """Scores on the GPU and on the CPU."""
    right = attributed(make(), data, gpu=False, **settings)
    with pretending():
        return attributed(make(), data, **settings), right


def agree(found: eap.EdgeScores, right: eap.EdgeScores) -> None:
    torch.testing.assert_close(found.values, right.values, rtol=1e-5, atol=1e-5 * float(right.values.abs().max()))


@pytest.mark.parametrize(
    ("name", "shared", "settings"),
    [
        ("llama", 2, {}),
        ("llama", 0, {"heads": "query", "metric": "kl_divergence"}),
        ("gpt2", 2, {"method": "eap", "keep": ("examples", "positions")}),
        ("gpt2", 3, {"reuse_prefix": False, "quadrature": "midpoint"}),
        ("gpt2", 1, {"quadrature": "gauss-legendre", "keep": "neurons"}),
        ("gpt-neox", 1, {"method": "clean-corrupted", "ablation": "mean"}),
        ("gpt2", 2, {"method": "eap-ig-activations", "keep": "examples"}),
        ("gpt2", 2, {"method": "eap-gp"}),
    ],
)
def test_replayed_batches_get_the_scores_of_others(make_model, name, shared, settings) -> None:
    found, right = both(lambda: make_model(name), alike(shared), **settings)
    assert found.info["replayed"] == REPLAYED
    agree(found, right)
    if right.per_example is not None:
        torch.testing.assert_close(found.per_example, right.per_example, rtol=1e-4, atol=1e-5)


CIRCUITS = (0.05, 0.3, 0.9)


def evaluated(model: Any, data: eap.PairedDataset, **settings: Any) -> list[eap.EvaluationResult]:
    """Of three circuits, of which the last two have parts in common."""
    graph = bind(model).graph(settings.pop("heads", "kv"))
    values = torch.randn(graph.edge_mask.shape, generator=torch.Generator().manual_seed(1)) * graph.edge_mask
    scores = eap.EdgeScores(graph, values, {})
    circuits = [scores.select(int(share * graph.n_edges)) for share in CIRCUITS]
    return eap.evaluate(model, circuits, data, **{"batch_size": 1, **settings})


@pytest.mark.parametrize(
    ("name", "shared", "settings"),
    [
        ("llama", 2, {}),
        ("gpt2", 3, {"ablation": "mean", "reuse_prefix": False}),
        ("llama", 0, {"heads": "query", "metric": "kl_divergence", "apart": True}),
    ],
)
def test_replayed_batches_of_circuits_get_the_values_of_others(make_model, monkeypatch, name, shared, settings) -> None:
    """Also where circuits run one after another."""
    data, settings = alike(shared), dict(settings)
    if settings.pop("apart", False):
        monkeypatch.setattr(circuit_values, "TOKENS_TOGETHER", 1)
        monkeypatch.setattr(circuit_values, "most_tokens", lambda _: 1)
    right = evaluated(make_model(name), data, **settings)
    with pretending():
        found = evaluated(make_model(name).cuda(), data, **settings)
    for one, other in zip(found, right, strict=True):
        assert one.info["replayed"] == REPLAYED
        for side in ("values", "clean_values", "corrupted_values"):
            torch.testing.assert_close(getattr(one, side), getattr(other, side), rtol=1e-4, atol=1e-5)


def test_a_curve_says_what_was_replayed(make_model) -> None:
    with pretending():
        model, data = make_model("gpt2").cuda(), alike()
        scores = attributed(model, data, method="eap")
        curve = eap.faithfulness_curve(model, scores, data, (0.1, 0.5, 1), batch_size=1)
    assert curve.info["replayed"] == REPLAYED


def test_circuits_with_spans_are_not_captured(make_model) -> None:
    """Which tokens each mask reads is what the host knows of a batch."""
    data = replace(alike(), spans=torch.tensor([[0, 0, 1, 1, 1, -1, -1]] * EXAMPLES), span_names=("a", "b"))
    with pretending():
        model = make_model("gpt2").cuda()
        scores = attributed(model, data, keep="spans", method="eap")
        result = eap.evaluate(model, scores.by_span().select(30), data, batch_size=1)
    assert result.info["replayed"].endswith("the passes depend on what the host knows of 'spans'")


def test_weights_of_pairs_and_spelling_are_those_of_the_batch_that_is_replayed(make_model) -> None:
    data = replace(alike(), weights=torch.arange(1.0, EXAMPLES + 1))
    variants = data.answers + 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        found, right = both(lambda: make_model("llama"), replace(data, variants=variants))
    assert found.info["replayed"] == REPLAYED
    agree(found, right)


def test_batches_of_many_shapes(make_model, make_pairs) -> None:
    """What the host knows of a batch differs too: prefixes of several lengths, padding, scored positions."""
    found, right = both(lambda: make_model("llama"), make_pairs(n=16), batch_size=2, method="eap")
    agree(found, right)


def test_other_answers_and_prefixes_are_no_other_shape(make_model) -> None:
    """Batches of two pairs, of which some share their prefix or answers."""
    data = alike(n=2 * EXAMPLES)
    answers, clean, corrupted = data.answers.clone(), data.clean.clone(), data.corrupted.clone()
    answers[::3] = answers[0]
    for x in (clean, corrupted):
        x[5:7, :2] = x[5:6, :2]
    data = eap.PairedDataset.from_tokens(clean, corrupted, data.lengths, answers)
    found, right = both(lambda: make_model("gpt2"), data, batch_size=2, method="eap")
    assert found.info["replayed"] == REPLAYED
    agree(found, right)


def test_nothing_is_said_on_a_cpu(make_model) -> None:
    assert "replayed" not in attributed(make_model("gpt2"), alike(n=1), gpu=False).info


class Other:
    """In place of a module's forward: what it gives, and something else on the way."""

    def __init__(self, module: Any, besides: Callable[[Tensor], object]) -> None:
        self.forward, self.besides, module.forward = module.forward, besides, self

    def __call__(self, x: Tensor) -> Tensor:
        self.besides(x)
        return self.forward(x)


def with_other(make_model: Any, besides: Callable[[Tensor], object]) -> Callable[[], Any]:
    def make() -> Any:
        model = make_model("gpt2")
        Other(model.transformer.h[0].mlp, besides)
        return model

    return make


def test_a_model_that_waits_is_not_captured(make_model) -> None:
    """It is found in a rehearsal: a capture in which the host waits may leave torch's random numbers unusable."""
    begun = graphs.CUDAGraph.begun
    found, right = both(with_other(make_model, lambda x: bool(x.isnan().any())), alike(n=3))
    assert re.fullmatch(r"0 of 3 batches: the host waits for the device in \w+\.py:\d+", found.info["replayed"])
    assert graphs.CUDAGraph.begun == begun
    agree(found, right)


def test_a_model_that_sends_something_is_not_captured(make_model) -> None:
    def send(x: Tensor) -> None:
        if x.is_cuda:
            upload(x.device, torch.ones(3))

    found, right = both(with_other(make_model, send), alike(n=3))
    assert found.info["replayed"].endswith("something is sent to the device in the midst of the passes")
    agree(found, right)


@pytest.mark.parametrize("lost", [False, True])
def test_a_capture_that_fails_ends(make_model, monkeypatch, lost) -> None:
    """By an error of the model's own, or by a wait that the rehearsal did not see."""

    def fail(x: Tensor) -> None:
        if state["tape"] is not None:
            if lost:
                x.sum().item()
            raise ValueError("not while this is captured")

    found, right = both(with_other(make_model, fail), alike(n=3))
    assert found.info["replayed"].startswith("0 of 3 batches: ")
    assert state["tape"] is None
    agree(found, right)


@pytest.mark.parametrize("fault", ["another batch", "nothing"])
def test_replays_that_differ_are_left_out(make_model, monkeypatch, fault) -> None:
    """The first is compared with a batch that is not replayed."""

    def replay(self: Any, batch: Any) -> Any:
        if fault == "another batch":  # whose values are not brought
            self._graph.replay()
        return self.found

    monkeypatch.setattr(captured.Captured, "replay", replay)
    with pytest.warns(InputWarning, match=r"^GPT2LMHeadModel: passes are not replayed, as results differ"):
        found, right = both(lambda: make_model("gpt2"), alike(n=4))
    assert found.info["replayed"] == "0 of 4 batches: results differ then"
    agree(found, right)


def test_memory_is_given_back_before_a_batch_runs_again(make_model, monkeypatch) -> None:
    held, replays = [], graphs.CUDAGraph.replay

    def replay(self: Any) -> None:
        monkeypatch.setattr(graphs.CUDAGraph, "replay", replays)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs.CUDAGraph, "replay", replay)
    monkeypatch.setattr(memory, "give_back_memory", lambda: held.append(len(graphs.alive)))
    found, right = both(lambda: make_model("gpt2"), alike(n=4))
    assert held == [0] and found.info["replayed"].endswith("memory ran out")
    agree(found, right)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"method": "eap-conductance"}, "eap-conductance contracts between its passes"),
        ({"metric": lambda logits, batch: logits[:, 0]}, "the metric is one's own, and may compute on the host"),
        ({"ablation": "mean-positional"}, "the passes depend on what the host knows of 'start'"),
        ({"batch_size": 2}, "no two batches in a row are of one shape"),
        ({"memory": "100KB"}, "there is no memory for passes and a graph of them"),
    ],
    ids=["method", "metric", "host", "shapes", "memory"],
)
def test_what_is_not_captured_is_said(make_model, settings, why) -> None:
    data = alike(n=3)
    with pretending():
        found = attributed(make_model("gpt2"), data, **settings)
    assert found.info["replayed"].endswith(f" batches: {why}")


def test_a_model_with_hooks_is_not_captured(make_model) -> None:
    called: list[int] = []
    with pretending():
        model = make_model("gpt2").cuda()
        model.transformer.h[0].register_forward_hook(lambda *_: called.append(1))
        assert attributed(model, alike(n=3)).info["replayed"].endswith("the model has hooks, which would not be called")


def test_large_passes_and_few_batches_are_not_captured(make_model, monkeypatch) -> None:
    with pretending():
        model = make_model("gpt2").cuda()
        monkeypatch.setattr(method, "LAUNCHES", 0)
        assert attributed(model, alike(n=3)).info["replayed"].endswith("passes are bound by work, not by launches")
        monkeypatch.setattr(replays, "FEWEST", 8)
        assert attributed(model, alike(n=3)).info["replayed"].endswith("the data make fewer than 8 such batches")


def test_the_pretended_device_runs_nothing_while_it_captures() -> None:
    with pretending():
        x = torch.ones(3, device="cuda")
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            y = (x + 1).expand(2, 3)
            x.mul_(3)
        assert x.tolist() == [1, 1, 1] and y.isnan().all()
        for first in (1, 3):
            graph.replay()
            assert y.tolist() == [[first + 1] * 3] * 2 and x.tolist() == [3 * first] * 3
        graph.reset()
        for wait in (lambda: x.sum().item(), lambda: x.cpu(), lambda: torch.ones(2).to("cuda"), x.nonzero):
            lost = torch.cuda.CUDAGraph()
            ended = pytest.raises(RuntimeError, match="previous error during capture")
            refused = pytest.raises(RuntimeError, match="not permitted when stream is capturing")
            with ended, torch.cuda.graph(lost, stream=aside), refused:
                wait()
            torch.cuda.set_stream(torch.cuda.default_stream())
            lost.reset()
