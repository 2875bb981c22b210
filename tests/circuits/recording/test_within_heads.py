"""Scores inside heads: finite differences of plain runs, a circuit by hand, sums over the queries' spans, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import loss_of, pairs_for, prompts, random_pairs
from tests.circuits.edges.test_spans import span_of_tokens, with_spans
from tests.circuits.plain_runs import plain_run
from tests.circuits.recording.rules_by_hand import UnderRules
from tests.circuits.recording.unequal_pairs import unequal_pairs

KEEP: dict[str, Any] = {"keep": "within-heads"}


def pair() -> eap.PairedDataset:
    """Of eight tokens, of which all but the first and the last two differ; each span has some of both kinds."""
    data = random_pairs(seed=5, n=1, longest=8)
    clean, other = torch.arange(3, 11)[None], torch.arange(3, 11)[None]
    other[0, 1:6] += 30
    spans = torch.tensor([[0, 1, -1, 0, 1, -1, 0, 1]])
    return replace(eap.PairedDataset.from_tokens(clean, other, [8], data.answers), spans=spans, span_names=("a", "b"))


class Moved(UnderRules):
    """Queries at some tokens attend to another key or value, or are another query, than all others' computation has."""

    def __init__(self, model: Any, rules: str | None) -> None:
        super().__init__(model, rules)
        self.seen: dict[tuple[int, str], Tensor] = {}  # what projections gave, behind the rotation
        # Layer, site, its changes [n, T, K], and at which queries they are read, bool [T].
        self.move: tuple[int, str, Tensor, Tensor] | None = None
        self.head = 0

    def project(self, layer: Any, site: str, x: list[Tensor]) -> Tensor:
        y = self.seen[list(self.layers).index(layer), site] = super().project(layer, site, x)
        return y

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z, head, index = super().attend(layer, q, k, v), self.head % self.n_heads, list(self.layers).index(layer)
        self.head += 1
        if self.move is None or self.move[0] != index:
            return z
        given = {"q": q, "k": k, "v": v}
        given[self.move[1]] = given[self.move[1]] + self.move[2][head]
        return torch.where(self.move[3][:, None], super().attend(layer, *given.values()), z)


CASES = [("gemma2", None), ("gpt2", None), ("llama", None), ("gpt2", "gim"), ("llama", "relp-ah")]


@pytest.mark.parametrize(("family", "rules"), CASES)
def test_they_are_the_slope_of_the_loss_as_one_spans_keys_move_for_one_spans_queries(
    family, rules, make_model, relative
):
    """By finite differences; under rules by plain autograd. Softcaps, windows, rotation and grouped queries occur."""
    model, data = make_model(family), pair()
    decoder, (clean, corrupted), step = Moved(model, rules), prompts(data, 0), 1e-5
    of, loss = one_hot(span_of_tokens(data, 0, len(clean)), 3).bool().T, loss_of(data, 0)
    x, y = decoder.embed(clean), decoder.embed(corrupted)
    with StayDouble():
        scores = eap.attribute(model, data, steps=2, heads="query", rules=rules, **KEEP)
        seen = []
        for embeddings in (x, y):
            plain_run(decoder, embeddings)
            seen.append({place: found.detach() for place, found in decoder.seen.items()})
        for layer, site, head in ((1, "v", 0), (0, "k", 2), (0, "q", 1)):
            delta = torch.zeros_like(seen[0][layer, site])
            delta[head] = (seen[1][layer, site] - seen[0][layer, site])[head]
            right = torch.zeros(3, 3, dtype=torch.float64)
            for q, p in ((q, p) for q in range(3) for p in range(3)):
                change = delta * of[p][:, None]
                for point in (torch.lerp(y, x, 0.5), x):
                    amount = torch.zeros((), requires_grad=True)
                    ends = []
                    for at in (amount + step, amount - step) if rules is None else (amount,):
                        decoder.move = layer, site, change * at, of[q]
                        ends.append(loss(plain_run(decoder, point).logits))
                    decoder.move = None
                    if rules is None:
                        right[q, p] += (ends[0] - ends[1]).item() / (2 * step) / 2
                    else:
                        right[q, p] += torch.autograd.grad(ends[0], amount, materialize_grads=True)[0].item() / 2
            found = scores.within_heads[:, :, scores.graph.receivers_at(layer, site)][..., head].double()
            assert right.count_nonzero() >= (3 if rules != "relp-ah" or site == "v" else 0)
            assert relative(found, right) < 1e-5 if right.any() else not found.any()


def test_a_head_that_attends_to_all_tokens_alike_by_hand(make_model, relative):
    """One head group of one layer; all that it does is to copy the mean of its values to the scored token."""
    model, data = make_model("llama"), pair()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.zero_()
            (layer.self_attn.o_proj if index else layer.self_attn.q_proj).weight.zero_()
    layer, (x, y) = model.model.layers[0], (model.get_input_embeddings()(t).detach() for t in prompts(data, 0))
    H, G, T = 6, 2, len(x)
    with StayDouble():
        scores = eap.attribute(model, data, method="eap", **KEEP)
        values = [layer.self_attn.v_proj(layer.input_layernorm(e)).detach().view(T, G, -1) for e in (x, y)]
        z = values[0].mean(0).repeat_interleave(H // G, 0).requires_grad_()
        last = x[-1] + layer.self_attn.o_proj(z.flatten())
        loss_of(data, 0)(model.lm_head(model.model.norm(last))).backward()
        each = torch.einsum("gk,tgk->tg", z.grad.view(G, H // G, -1).sum(1), values[1] - values[0]) / T
    spans = span_of_tokens(data, 0, T)
    right = torch.zeros_like(scores.within_heads, dtype=torch.float64)
    right[spans[-1], :, scores.graph.receivers_at(0, "v")] = one_hot(spans, 3).double().T @ each
    assert relative(scores.within_heads, right) < 1e-6
    assert not scores.within_heads[right == 0].any()
    read, where, score = scores.top_within_heads(1)[0]
    q, p, v = (right.abs() == right.abs().max()).nonzero()[0].tolist()
    names = scores.info["spans"]["names"]
    assert (read, where) == (f"{scores.graph.receivers[v]}@{names[p]}", names[q])
    assert score == pytest.approx(float(right[q, p, v]), rel=1e-6)


OTHERS = ["bert-masked", "deepseek-v3", "falcon", "gpt-neox", "gpt-oss", "olmo2", "qwen3-next"]


@pytest.mark.parametrize("family", OTHERS)
def test_over_all_queries_they_are_the_inputs_own_score(family, make_model, relative):
    """⟨Δy_v, ∂loss/∂y_v⟩ at each span from two plain runs of the model; of any mixer."""
    model, data = make_model(family), with_spans(pairs_for(family))
    with StayDouble():
        scores = eap.attribute(model, data, method="eap", **KEEP)
    arch = bind(model)
    right = torch.zeros_like(scores.within_heads[0], dtype=torch.float64)

    def run(tokens: Tensor) -> tuple[dict[Any, Tensor], Tensor]:
        given: dict[Any, Tensor] = {}
        modules = {module for layer in arch.layers for module in layer.projection_modules}
        hooks = [module.register_forward_hook(lambda at, _, y: given.update({at: y})) for module in modules]
        logits = model(tokens[None], use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        return given, logits

    for e in range(len(data)):
        (own, logits), (other, _) = map(run, prompts(data, e))
        loss = loss_of(data, e)(logits[-1 if data.scored is None else int(data.scored[e, 0])])
        slopes = dict(zip(own, torch.autograd.grad(loss, [*own.values()], materialize_grads=True), strict=True))
        of = one_hot(span_of_tokens(data, e, len(logits)), 3).double()
        for index, layer in enumerate(arch.layers):
            for name, projection in layer.projections.items():
                at, receivers = projection.module, scores.graph.receivers_at(index, name)
                terms = ((other[at] - own[at]) * slopes[at]).view(len(logits), -1)[:, projection.rows]
                each = terms.unflatten(1, (receivers.stop - receivers.start, -1)).sum(2)
                right[:, receivers] += of.T @ each.detach().double() / len(data)
    assert relative(scores.within_heads.sum(0), right) < 1e-5


SETTINGS = [{"ablation": "mean"}, {"quadrature": "midpoint", "steps": 2}, {"steps": 3}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_else_changes_them_or_is_changed(settings, make_model, relative, tmp_path):
    model, data = make_model("llama"), with_spans(random_pairs(n=4))
    plain = eap.attribute(model, data, **settings)
    scores = eap.attribute(model, data, keep=("spans", "within-heads"), **settings)
    assert relative(scores.values, plain.values) < 1e-6
    for more in ({"batch_size": 1}, {"reuse_prefix": False}, {"memory": "1MiB"}):
        assert relative(eap.attribute(model, data, **KEEP, **settings, **more).within_heads, scores.within_heads) < 1e-5
    of_each = [eap.attribute(model, data[[e]], **KEEP, **settings).within_heads for e in range(len(data))]
    if settings.get("ablation") is None:  # the mean is of all prompts
        assert relative(torch.stack(of_each).mean(0), scores.within_heads) < 1e-5
    by_query = eap.attribute(model, data, heads="query", **KEEP, **settings)
    assert relative(by_query.to_kv().within_heads, scores.within_heads) < 1e-5
    scores.save(tmp_path / "scores.safetensors")
    assert eap.EdgeScores.load(tmp_path / "scores.safetensors") == scores
    assert eap.plan(model, data, **KEEP, **settings).bytes > 0


def test_keys_are_read_where_the_clean_prompt_has_them(make_model, relative):
    """Of prompts of unequal lengths, and of one alone whose senders are ablated."""
    model, data = make_model("gpt2"), with_spans(unequal_pairs(3))
    scores = eap.attribute(model, data, **KEEP)
    assert relative(scores.within_heads, eap.attribute(model, data, batch_size=1, **KEEP).within_heads) < 1e-5
    assert scores.within_heads.any()
    alone = eap.PairedDataset.from_tokens(data.clean, None, data.lengths, data.answers)
    alone = replace(alone, spans=data.spans[:, : alone.clean.shape[1]], span_names=data.span_names)
    assert eap.attribute(model, alone, method="eap", ablation="zero", **KEEP).within_heads.any()


def test_what_has_none_is_refused(make_model, make_pairs):
    spanned = with_spans(make_pairs(n=2))
    cases = [
        ("llama", make_pairs(n=2), {}, "^keep: expected data with spans .* for 'within-heads'"),
        ("llama", spanned, {"method": "exact"}, "^keep: expected 'variance' or 'examples' for method 'exact'"),
        ("llama", spanned, {"method": "eap-gp"}, "^keep: expected 'variance' or .* for method 'eap-gp'"),
        ("gemma4", spanned, {}, "^model: expected one whose heads attend to keys and values of their own layer, for"),
    ]
    for family, data, settings, message in cases:
        with pytest.raises(eap.InputError, match=message):
            eap.attribute(make_model(family), data, **KEEP, **settings)
    with pytest.raises(eap.InputError, match=r"^top_within_heads\(\): expected scores of attribute\(keep="):
        eap.attribute(make_model("llama"), spanned, method="eap").top_within_heads()
