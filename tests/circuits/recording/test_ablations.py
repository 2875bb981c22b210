"""Ablations other than patching, against models written out head by head, without a hook, a cache or a batch."""

from __future__ import annotations

import importlib

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.evaluation.check import StayDouble
from eap_circuits.graph import Graph, prune

# Absolute positions and biases; grouped heads; norms after blocks; attention and MLP in parallel; experts.
KINDS = ("gpt2", "llama", "gemma2", "gpt-neox", "qwen3-moe")
NAMES = ("zero", "mean", "mean-positional")


class ByHand:
    """A tiny model's forward pass as a sum of contributions; `read` decides what every receiver is given."""

    def __init__(self, model, graph):
        self.model, self.graph, self.kind = model, graph, model.config.model_type
        self.heads, self.kv = graph.n_heads[0], graph.n_kv_heads[0]
        body = {"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(self.kind, "model")
        self.body = getattr(model, body)
        self.layers = self.body.h if self.kind == "gpt2" else self.body.layers

    def run(self, embeddings, read):
        """Contributions of every sender, [S] of [1, T, D], and the last token's logits, [1, V].

        `read(v, contributions)` is the sum that receiver v is given of the senders before it.
        """
        tokens = embeddings.shape[1]
        self.positions = torch.arange(tokens)[None]
        constant = self.body.wpe(self.positions) if self.kind == "gpt2" else 0
        contributions = [embeddings]
        for index, layer in enumerate(self.layers):
            attention, first, second, out = self._parts(layer)
            sites = {site: self.graph.receivers_at(index, site).start for site in ("q", "k", "v", "mlp")}
            spread = 1 if self.graph.heads == "query" else self.heads // self.kv
            given = list(contributions)
            values = []
            for h in range(self.heads):
                q, k, v = (
                    self._project(attention, site, h, first(constant + read(sites[site] + slot, given)))
                    for site, slot in (("q", h), ("k", h // spread), ("v", h // spread))
                )
                z = self._attend(index, attention, q, k) @ v
                weight = out.weight.T if self.kind == "gpt2" else out.weight
                width = z.shape[-1]
                values.append(z @ weight[:, h * width : (h + 1) * width].T)
            if self.kind == "gemma2":
                # The norm after attention divides every head by the scale of them all together.
                norm = layer.post_attention_layernorm
                scale = (sum(values).square().mean(-1, keepdim=True) + norm.eps).rsqrt()
                values = [value * scale * (1 + norm.weight) for value in values]
            contributions += values
            before = constant
            if out.bias is not None:
                constant = constant + out.bias
            parallel = self.kind == "gpt_neox"
            x = second(read(sites["mlp"], given) + before if parallel else read(sites["mlp"], contributions) + constant)
            y = layer.mlp(x)
            y = y[0] if isinstance(y, tuple) else y
            contributions.append(layer.post_feedforward_layernorm(y) if self.kind == "gemma2" else y)
        last = getattr(self.body, {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(self.kind, "norm"))
        head = self.model.get_output_embeddings()
        logits = head(last(constant + read(self.graph.n_receivers - 1, contributions)))[:, -1]
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return contributions, logits if cap is None else cap * torch.tanh(logits / cap)

    def _parts(self, layer):
        if self.kind == "gpt2":
            return layer.attn, layer.ln_1, layer.ln_2, layer.attn.c_proj
        if self.kind == "gpt_neox":
            return layer.attention, layer.input_layernorm, layer.post_attention_layernorm, layer.attention.dense
        second = layer.pre_feedforward_layernorm if self.kind == "gemma2" else layer.post_attention_layernorm
        return layer.self_attn, layer.input_layernorm, second, layer.self_attn.o_proj

    def _project(self, attention, site, h, x):
        """One head's query, key or value of the normalised input, [1, T, K]."""
        if self.kind == "gpt2":
            y = attention.c_attn(x).chunk(3, -1)["qkv".index(site)]
            return y.chunk(self.heads, -1)[h]
        if self.kind == "gpt_neox":
            return attention.query_key_value(x).chunk(self.heads, -1)[h].chunk(3, -1)["qkv".index(site)]
        module = getattr(attention, f"{site}_proj")
        y = module(x).chunk(self.heads if site == "q" else self.kv, -1)
        y = y[h if site == "q" else h * self.kv // self.heads]
        norm = getattr(attention, f"{site}_norm", None)
        return y if norm is None else norm(y)

    def _attend(self, index, attention, q, k):
        """A head's attention pattern, [1, T, T]."""
        config = self.model.config
        if self.kind != "gpt2":
            home = importlib.import_module(type(attention).__module__)
            x = torch.zeros(1, 1, 1, dtype=q.dtype)
            q, k = (
                y[:, 0]
                for y in home.apply_rotary_pos_emb(q[:, None], k[:, None], *self.body.rotary_emb(x, self.positions))
            )
        scores = q @ k.mT * getattr(attention, "scaling", q.shape[-1] ** -0.5)
        cap = getattr(config, "attn_logit_softcapping", None)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        distance = self.positions[0][:, None] - self.positions[0]
        seen = distance >= 0
        if self.kind == "gemma2" and config.layer_types[index] == "sliding_attention":
            seen = seen & (distance < config.sliding_window)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)

    def plain(self, tokens):
        """The model itself on [1, T] tokens."""
        return self.run(bind(self.model).embed(tokens), lambda v, given: sum(given))

    def circuit(self, tokens, mask, ablated):
        """Receivers are given a sender's own contribution where mask[u, v], else the ablated one."""

        kept = mask.T.tolist()

        def read(v, given):
            return sum(own if kept[v][u] else ablated[u] for u, own in enumerate(given))

        return self.run(bind(self.model).embed(tokens), read)[1]


def prompts(data, corrupted=False):
    """Each prompt alone, without padding: [1, T]."""
    tokens = data.corrupted if corrupted else data.clean
    return [tokens[e : e + 1, : int(data.lengths[e])] for e in range(len(data))]


def ablated(every, name, length):
    """c' of every sender at so many tokens, [S] of [1, T, D], from its contributions to every ablation prompt."""
    width, found = every[0][0].shape[-1], []
    for u in range(len(every[0])):
        if name == "zero":
            found.append(torch.zeros(1, length, width, dtype=torch.float64))
        elif name == "mean":
            mean = torch.cat([contributions[u][0] for contributions in every]).mean(0)
            found.append(mean.expand(1, length, -1))
        else:
            rows = [[c[u][0, t] for c in every if c[u].shape[1] > t] for t in range(length)]
            found.append(torch.stack([torch.stack(row).mean(0) for row in rows])[None])
    return found


def difference(logits, data, e):
    return float(logits[0, data.answers[e, 0]] - logits[0, data.answers[e, 1]])


def random_mask(graph: Graph, seed: int, share: float):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(graph.n_senders, graph.n_receivers, generator=generator) < share) & graph.edge_mask
    return prune(graph, mask)


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_circuits_scores_and_single_edges_are_their_definitions(kind, heads, make_model, make_pairs):
    model, data, other = make_model(kind), make_pairs(seed=11, n=2), make_pairs(seed=12, n=3)
    other = eap.PairedDataset.from_tokens(other.clean, other.corrupted, torch.tensor([11, 9, 6]), other.answers)
    graph = bind(model).graph(heads)
    hand = ByHand(model, graph)
    generator = torch.Generator().manual_seed(1)
    with StayDouble():
        for tokens in prompts(data):  # the model by hand is the model
            torch.testing.assert_close(hand.plain(tokens)[1], model(input_ids=tokens).logits[:, -1])
        every = [hand.plain(tokens)[0] for tokens in prompts(other)]
        clean = [difference(hand.plain(tokens)[1], data, e) for e, tokens in enumerate(prompts(data))]
        for name in NAMES:
            settings = {"ablation": name, "ablation_data": None if name == "zero" else other}
            gone = [ablated(every, name, tokens.shape[1]) for tokens in prompts(data)]
            masks = [random_mask(graph, 3, 0.3), random_mask(graph, 4, 0.9), torch.zeros_like(graph.edge_mask)]
            assert all(mask.any() for mask in masks[:2])
            circuits = [eap.Circuit.from_mask(graph, mask) for mask in masks]
            for mask, result in zip(masks, eap.evaluate(model, circuits, data, **settings)):
                right = [
                    difference(hand.circuit(tokens, mask, gone[e]), data, e) for e, tokens in enumerate(prompts(data))
                ]
                assert result.values.tolist() == pytest.approx(right, abs=1e-8)
                assert result.clean_values.tolist() == pytest.approx(clean, abs=1e-8)
            assert result.corrupted_values.tolist() == pytest.approx(right, abs=1e-8)  # those of no edge

            edges = graph.edge_mask.nonzero()
            edges = edges[torch.randperm(len(edges), generator=generator)[:3]].tolist()
            chosen = torch.zeros_like(graph.edge_mask)
            chosen[tuple(zip(*edges))] = True
            exact = eap.attribute(model, data, method="exact", heads=heads, edges=chosen, **settings)
            scores = eap.attribute(model, data, heads=heads, steps=2, **settings)
            scale = float(scores.values.abs().max())
            for u, v in edges:
                alone = graph.edge_mask.clone()
                alone[u, v] = False
                ones = [
                    clean[e] - difference(hand.circuit(tokens, alone, gone[e]), data, e)
                    for e, tokens in enumerate(prompts(data))
                ]
                assert float(exact.values[u, v]) == pytest.approx(sum(ones) / len(ones), abs=2e-6 * scale)
                slope = path_slope(hand, data, gone, u, v, steps=2)
                assert float(scores.values[u, v]) == pytest.approx(slope, abs=2e-6 * scale)


def path_slope(hand, data, gone, u, v, steps, size=1e-4):
    """d loss / dε as v reads x_v + ε Δ_u, mean over the path's points and the examples, by central differences."""
    embed, total = bind(hand.model).embed, 0.0
    for e, (clean, corrupted) in enumerate(zip(prompts(data), prompts(data, corrupted=True))):
        delta = gone[e][u] - hand.plain(clean)[0][u]
        for k in range(1, steps + 1):
            point = torch.lerp(embed(corrupted), embed(clean), k / steps)
            for sign in (1, -1):

                def read(receiver, given, push=sign * size * delta):
                    return sum(given) + (push if receiver == v else 0)

                total -= sign * difference(hand.run(point, read)[1], data, e)
    return total / (2 * size * steps * len(data))


@pytest.mark.parametrize(("name", "heads"), [("zero", "kv"), ("mean", "query"), ("mean-positional", "kv")])
def test_all_edges_are_the_model_and_results_do_not_depend_on_batching(
    name, heads, kind, make_model, make_pairs, relative
):
    model, data = make_model(kind), make_pairs(seed=3)
    graph = bind(model).graph(heads)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    with StayDouble():
        # All edges kept is the model's plain run and takes no other way; one receiver less does.
        mask = graph.edge_mask.clone()
        mask[:, 0] = False
        circuits = [eap.Circuit.from_mask(graph, m) for m in (graph.edge_mask, mask, random_mask(graph, 1, 0.5))]
        right = eap.evaluate(model, circuits, data, ablation=name)
        assert right[0].faithfulness == pytest.approx(1)
        assert right[0].values.tolist() == right[0].clean_values.tolist()
        scores = eap.attribute(model, data, heads=heads, ablation=name, steps=2)
        for size, reuse in ((1, True), (3, False)):
            found = eap.evaluate(model, circuits, data[order], ablation=name, batch_size=size, reuse_prefix=reuse)
            for one, two in zip(right, found):
                torch.testing.assert_close(one.values[order], two.values)
                torch.testing.assert_close(one.corrupted_values[order], two.corrupted_values)
            again = eap.attribute(
                model, data[order], heads=heads, ablation=name, steps=2, batch_size=size, reuse_prefix=reuse
            )
            assert relative(again.values, scores.values) < 1e-6


def test_means_are_of_the_clean_prompts_real_tokens_alone(make_model, make_pairs, relative):
    """What stands on the corrupted side or in the padding of the ablation data does not matter; the prompts do."""
    model, data, other = make_model("llama"), make_pairs(seed=3), make_pairs(seed=4)
    lengths = torch.tensor([11, 6, 9, 7, 8, 5, 10])
    first = eap.PairedDataset.from_tokens(other.clean, other.corrupted, lengths, other.answers)
    wide = torch.nn.functional.pad(other.clean, (0, 4), value=7)
    wide = torch.where(torch.arange(wide.shape[1]) < lengths[:, None], wide, 9)
    second = eap.PairedDataset.from_tokens(wide, wide.flip(0), lengths, other.answers)
    for name in ("mean", "mean-positional"):
        right = eap.attribute(model, data, steps=2, ablation=name, ablation_data=first)
        assert right.info["ablation"] == name
        again = eap.attribute(model, data, steps=2, ablation=name, ablation_data=second)
        assert relative(again.values, right.values) < 1e-6
        assert relative(eap.attribute(model, data, steps=2, ablation=name).values, right.values) > 1e-3
        own = eap.attribute(model, data, steps=2, ablation=name, ablation_data=data)
        assert relative(eap.attribute(model, data, steps=2, ablation=name).values, own.values) < 1e-6


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_prompts_ablated_to_their_own_contributions_stay_what_they_are(family, heads, make_model, make_pairs):
    """Of one prompt alone the mean at each position is what it gives there: no circuit differs from the model."""
    model, data = make_model(family), make_pairs(seed=5, n=1)
    graph = bind(model).graph(heads)
    with StayDouble():
        masks = [torch.zeros_like(graph.edge_mask), random_mask(graph, 1, 0.5)]
        circuits = [eap.Circuit.from_mask(graph, mask) for mask in masks]
        for result in eap.evaluate(model, circuits, data, ablation="mean-positional"):
            torch.testing.assert_close(result.values, result.clean_values, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(result.corrupted_values, result.clean_values, atol=1e-9, rtol=1e-9)
        scores = eap.attribute(model, data, heads=heads, ablation="mean-positional", method="eap")
        right = eap.attribute(model, data, heads=heads, ablation="mean", method="eap")
    assert float(scores.values.abs().max()) < 1e-9 * float(right.values.abs().max())


def test_metrics_are_given_the_corrupted_runs_logits_whatever_the_ablation(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(seed=6, n=3)
    seen = []

    def metric(logits, batch):
        seen.append((batch.index, batch.corrupted_logits))
        return logits[:, 0]

    circuit = eap.Circuit.from_mask(graph := bind(model).graph("kv"), random_mask(graph, 1, 0.5))
    eap.evaluate(model, circuit, data, metric, ablation="zero")
    eap.attribute(model, data, metric, method="eap", ablation="zero")
    eap.attribute(model, data, metric, method="exact", edges=circuit, ablation="zero")
    for index, corrupted in seen:
        for e, logits in zip(index.tolist(), corrupted):
            with torch.no_grad():
                right = model(input_ids=prompts(data, corrupted=True)[e]).logits[0, -1]
            torch.testing.assert_close(logits, right, atol=1e-5, rtol=1e-5)


def test_a_curve_and_a_checkpoint_know_their_ablation(tmp_path, make_model, make_pairs):
    model, data, other = make_model("llama"), make_pairs(seed=6), make_pairs(seed=7)
    other = eap.PairedDataset.from_tokens(other.clean, other.corrupted, torch.full((7,), 11), other.answers)
    scores = eap.attribute(model, data, method="eap")
    given = {"ablation": "mean-positional", "ablation_data": other}
    curve = eap.faithfulness_curve(model, scores, data, (0.1, 0.5), **given)
    for circuit, value in zip(curve.circuits, curve.faithfulness):
        assert eap.evaluate(model, circuit, data, **given).faithfulness == pytest.approx(value)
    assert curve.results[0].corrupted != eap.evaluate(model, curve.circuits[0], data).corrupted

    file, edges = tmp_path / "exact.safetensors", scores.select(5)
    exact = {"method": "exact", "edges": edges, "checkpoint": file}
    first = eap.attribute(model, data, **exact, **given)
    assert torch.equal(eap.attribute(model, data, **exact, **given).values, first.values)
    for change in ({"ablation": "zero"}, {"ablation": "mean-positional"}, {}):
        with pytest.raises(eap.InputError, match="a checkpoint of this model, data and request"):
            eap.attribute(model, data, **exact, **change)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ablation": "noise"}, "ablation: expected one of 'mean', 'mean-positional'"),
        ({"ablation_data": 0}, "ablation_data: expected none, except for .* found some for 'patching'"),
        ({"ablation": "zero", "ablation_data": 0}, "ablation_data: expected none, except for .* found some for 'zero'"),
        ({"ablation": "mean", "ablation_data": "prompts"}, "ablation_data: expected a PairedDataset, found str"),
        ({"ablation": "mean-positional", "ablation_data": 6}, "ablation_data: expected prompts of 11 .* at most 6"),
    ],
)
def test_bad_requests_are_one_sentence(given, words, make_model, make_pairs):
    model, data, other = make_model("gpt2"), make_pairs(seed=3), make_pairs(seed=4)
    data = eap.PairedDataset.from_tokens(data.clean, data.corrupted, torch.full((7,), 11), data.answers)
    if isinstance(given.get("ablation_data"), int):
        short = torch.full((7,), given["ablation_data"] or 11)
        other = eap.PairedDataset.from_tokens(other.clean, other.corrupted, short, other.answers)
        given = {**given, "ablation_data": other}
    graph = bind(model).graph("kv")
    with pytest.raises(eap.InputError, match=words) as error:
        eap.attribute(model, data, **given)
    assert "\n" not in str(error.value)
    with pytest.raises(eap.InputError, match=words):
        eap.evaluate(model, eap.Circuit.from_mask(graph, graph.edge_mask), data, **given)


def test_ablation_tokens_beyond_the_vocabulary_are_named(make_model, make_pairs):
    data = make_pairs()
    clean = data.clean.clone()
    clean[2, 1] = 1000
    bad = eap.PairedDataset.from_tokens(clean, data.corrupted, data.lengths, data.answers)
    with pytest.raises(eap.InputError, match=r"ablation_data.*clean of example 2.*59.*1000"):
        eap.attribute(make_model("gpt2"), data, ablation="mean", ablation_data=bad)
