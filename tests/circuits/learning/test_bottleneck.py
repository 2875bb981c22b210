"""IBCircuit: the whole of it in plain PyTorch, its noise and its information, and what it finds."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.budget import PeakBytes
from eap_circuits.forward import Constants, batch_of, borrowed
from eap_circuits.learning.descent import bottleneck
from eap_circuits.learning.lessons import prepare_lesson, tokens_together
from eap_circuits.request import prepare
from tests.circuits.conftest import prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import of_circuit, plain_run


@pytest.fixture
def noises(monkeypatch):
    """What is drawn, and what of: (noise, (means, deviations))."""
    real, seen = bottleneck.draw_noise, []

    def draw(means, spread, generator):
        seen.append((real(means, spread, generator), (means, spread)))
        return seen[-1][0]

    monkeypatch.setattr(bottleneck, "draw_noise", draw)
    return seen


def information(weights):
    """Of weights [n], nats for each feature: of a contribution that is −1 on one prompt and 1 on another."""
    contribution = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    carried = Normal(weights[:, None] * contribution, (1 - weights)[:, None])
    return kl_divergence(carried, Normal(torch.zeros(2).double(), 1.0)).mean(1)


def written(decoder, noise, length):
    """What senders contribute that write this noise, [S] of [length, D]."""
    embedding, *others = (x[:length] for x in noise.tensors)
    found = [embedding]
    for layer, z, mlp in zip(decoder.layers, others[::2], others[1::2], strict=True):
        found += [*decoder.heads(layer, z.chunk(decoder.n_heads, -1)), mlp]
    return found


def divergence(own, found):
    """Of logits [V] from the model's own, in nats."""
    own, found = own.log_softmax(-1).detach(), found.log_softmax(-1)
    return (own.exp() * (own - found)).sum()


def plain(decoder, graph, data, noises, beta, rate):
    """The weights after a step with each of these noises, [n]."""
    log_odds = torch.full((graph.n_edges,), 5.0, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([log_odds], lr=rate)
    for noise, _ in noises:
        weights = log_odds.sigmoid()
        mask = torch.zeros(graph.edge_mask.shape, dtype=torch.float64).masked_scatter(graph.edge_mask, weights)
        lost = 0.0
        for e in range(len(data)):
            embeddings = decoder.embed(prompts(data, e)[0])
            read = of_circuit(mask, written(decoder, noise, len(embeddings)))
            own, found = (plain_run(decoder, embeddings, *each).logits for each in ((), (read,)))
            lost = lost + divergence(own, found) / len(data)
        (log_odds.grad,) = torch.autograd.grad(lost + beta * information(weights).mean(), log_odds)
        adam.step()
    return log_odds.detach().sigmoid()


@pytest.mark.parametrize(("kind", "heads"), [("llama", "kv"), ("llama", "query"), ("gpt2", "kv")])
def test_it_is_what_the_paper_says_in_plain_pytorch(kind, heads, make_model, make_pairs, noises, relative):
    model, data = make_model(kind), make_pairs(seed=3, n=4)
    found = eap.ibcircuit(model, data, "kl_divergence", beta=0.02, steps=4, rate=1.0, examples=4, heads=heads)
    assert len(noises) == 4
    right = plain(Decoder(model, heads), found.graph, data, noises, beta=0.02, rate=1.0)
    assert relative(found.values[found.graph.edge_mask].double(), right) < 1e-5
    assert not found.values[~found.graph.edge_mask].any()
    assert right.std() > 0.01, "edges differ"


def test_noise_has_the_mean_and_variance_of_what_senders_write(make_model, make_pairs, noises):
    """At each position, over the prompts that have it."""
    model, data = make_model("llama"), make_pairs(seed=3, n=5)
    eap.ibcircuit(model, data, steps=1)
    seen = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
        layer.mlp.register_forward_hook(lambda *given: seen.append(given[2][0]))
    runs = []
    for e in range(len(data)):
        clean = prompts(data, e)[0]
        with torch.no_grad():
            model(clean[None])
        runs.append([model.get_input_embeddings().weight[clean].detach(), *seen])
        seen.clear()
    ((_, (means, spread)),) = noises
    for site, (mean, deviation) in enumerate(zip(means.tensors, spread.tensors, strict=True)):
        for position in range(int(data.lengths.max())):
            there = torch.stack([run[site][position] for run in runs if len(run[site]) > position])
            torch.testing.assert_close(mean[position], there.mean(0), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(deviation[position], there.std(0, correction=0), rtol=1e-10, atol=1e-12)


def test_noise_is_normal():
    n = 20_000
    means, spread = (Constants.of_tensors([torch.full((2, n), x), torch.full((2, 3), x)]) for x in (3.0, 2.0))
    noise = bottleneck.draw_noise(means, spread, torch.Generator().manual_seed(0))
    drawn = (noise.embedding - 3) / 2
    # Five standard errors of the mean, of the variance and of the correlation of 20,000 normal numbers.
    assert (drawn.mean(1).abs() < 5 / n**0.5).all() and ((drawn.var(1) - 1).abs() < 5 * (2 / n) ** 0.5).all()
    assert (drawn[0] * drawn[1]).mean().abs() < 5 / n**0.5
    still = bottleneck.draw_noise(means, spread.map(torch.zeros_like), torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(still.tensors, means.tensors, strict=True))


def test_information_is_the_divergence_from_the_noise_over_prompts():
    contributions = torch.randn(6, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean, deviation = contributions.mean(0), contributions.std(0, correction=0)
    for log_odds in torch.tensor([-20.0, -3.0, 0.0, 2.0, 5.0], dtype=torch.float64):
        weight = log_odds.sigmoid()
        carried = Normal(weight * contributions + (1 - weight) * mean, (1 - weight) * deviation)
        right = kl_divergence(carried, Normal(mean, deviation)).mean()
        torch.testing.assert_close(bottleneck.information(log_odds), right, rtol=1e-9, atol=1e-12)


def test_without_noise_it_is_the_model_and_of_noise_alone_the_ablated_run(make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs(seed=3, n=3)
    with borrowed(model):
        request = prepare(model, data, "kl_divergence", "mean-positional", reuse_prefix=False).with_constants()
        graph = request.arch.graph("kv")
        means = request.constants
        noise = bottleneck.draw_noise(means, means.map(torch.ones_like), torch.Generator().manual_seed(1))
        batch = batch_of(request.data, torch.arange(3), False, request.arch.device)
        lesson = prepare_lesson(request, graph, batch).ablated_to(noise)
        masks = [graph.edge_mask, torch.zeros_like(graph.edge_mask)]
        with_all, with_none = lesson.values(request, graph, masks, 10**6)
    decoder = Decoder(model, "kv")
    for e, (whole, nothing) in enumerate(zip(with_all, with_none, strict=True)):
        embeddings = decoder.embed(prompts(data, e)[0])
        read = of_circuit(masks[1], written(decoder, noise, len(embeddings)))
        own, found = (plain_run(decoder, embeddings, *each).logits for each in ((), (read,)))
        assert abs(whole) < 1e-12
        assert float(nothing) == pytest.approx(-float(divergence(own, found.detach())), rel=1e-9)


def test_edges_that_do_nothing_close_and_beta_says_how_far(make_model, make_pairs):
    """A layer that writes nothing: whatever its edges let through, the metric stays."""
    model, data = make_model("llama"), make_pairs(seed=3, n=4)
    with torch.no_grad():
        for dead in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            dead.weight.zero_()
    graph = bind(model).graph("kv")
    mute = torch.tensor([name.startswith(("a1.", "m1")) for name in graph.senders])[:, None] & graph.edge_mask
    free, cheap, dear = (
        eap.ibcircuit(model, data, "kl_divergence", beta=beta, steps=40, rate=0.3).values for beta in (0, 0.1, 10)
    )
    torch.testing.assert_close(free[mute], torch.full_like(free[mute], 5.0).sigmoid())
    for found in (cheap, dear):
        assert found[mute].max() < 0.2 < found[graph.edge_mask & ~mute].max()
    assert dear.sum() < cheap.sum() < free.sum()


def test_its_circuits_are_better_than_random_ones(make_model, make_pairs):
    model, data = make_model("llama", torch.float32), make_pairs(seed=3, n=6)
    weights = eap.ibcircuit(model, data, "kl_divergence", beta=1, steps=60, rate=0.2)
    circuits = [eap.random_circuit(weights.graph, 60, seed=seed) for seed in range(8)]
    lost = [-x.mean for x in eap.evaluate(model, [weights.select(60), *circuits], data, "kl_divergence")]
    assert lost[0] < min(lost[1:])


def test_corrupted_prompts_are_not_used(make_model, make_pairs):
    model, data = make_model("llama", torch.float32), make_pairs(seed=3, n=4)
    alone = eap.PairedDataset.from_tokens(data.clean, None, data.lengths, data.answers)
    found = [eap.ibcircuit(model, each, "kl_divergence", steps=2) for each in (data, alone)]
    assert torch.equal(found[0].values, found[1].values)


def test_a_seed_gives_the_same_bits_and_another_one_others(make_model, make_pairs):
    model, data = make_model("llama", torch.float32), make_pairs(seed=3, n=4)
    found = [eap.ibcircuit(model, data, steps=3, seed=seed).values for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_cut_into_passes_changes_only_rounding(make_model, make_pairs, relative):
    model, data = make_model("llama"), make_pairs(seed=3, n=6)
    whole, cut = (eap.ibcircuit(model, data, steps=2, examples=6, memory=memory).values for memory in (None, 0))
    assert relative(cut.double(), whole.double()) < 1e-6


def test_passes_keep_to_the_budget(make_model, make_pairs):
    model, data = make_model("llama", torch.float32), make_pairs(seed=3, n=6)
    with borrowed(model):
        request = prepare(model, data, "kl_divergence", "mean-positional", reuse_prefix=False).with_constants()
        graph = request.arch.graph("kv")
        mask = 0.5 * graph.edge_mask.float()[None]
        for allowed in (4_000_000, 16_000_000):
            tokens = tokens_together(replace(request, memory=allowed), graph, mask)
            fitting = torch.arange(max(1, min(6, tokens // int(data.lengths.max()))))
            batch = batch_of(request.data, fitting, False, request.arch.device)
            with PeakBytes() as count:
                lesson = prepare_lesson(request, graph, batch).ablated_to(request.constants)
                lesson.gradient(request, graph, mask, tokens)
            assert batch.clean.numel() > tokens or count.peak <= 1.1 * allowed, tokens


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metric": "rank"}, "metric: .*kl_divergence"),
        ({"beta": -1}, "beta: expected a number of at least 0, found -1"),
        ({"beta": float("nan")}, "beta: expected"),
        ({"steps": 0}, "steps"),
        ({"rate": 0}, "rate: expected a positive number"),
        ({"examples": 0}, "examples"),
        ({"seed": -1}, "seed"),
        ({"heads": "all"}, "heads: expected one of"),
        ({"n": 1}, "data: expected at least 2 prompts, as noise has their mean and variance, found 1"),
    ],
)
def test_what_cannot_be_learned_is_refused(given, said, make_model, make_pairs):
    data = make_pairs(n=given.pop("n", 3))
    with pytest.raises(eap.InputError, match=said):
        eap.ibcircuit(make_model("gpt2"), data, **given)
