"""Tokens before the first difference run once: what is scored and what circuits give is as if they ran every time."""

import warnings
from functools import partial

import pytest
import torch

import eap_circuits as eap
from eap_circuits.forward.prefixes import prefix
from eap_circuits.forward.replays import known
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import watch


def pairs(beginning: int, prefixes: int) -> eap.PairedDataset:
    """Six pairs of 3 to 5 own tokens behind so many distinct prefixes, which begin alike."""
    generator = torch.Generator().manual_seed(beginning + prefixes)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(53, shape, generator=generator)

    clean = tokens(6, 24)
    clean[:, :beginning] = clean[0, :beginning]
    lengths = []
    for example in range(6):
        start = beginning + 1 + example % prefixes
        clean[example, :start] = clean[example % prefixes, :start]
        lengths.append(start + 3 + example % 3)
    corrupted = clean.clone()
    for example in range(6):
        start = beginning + 1 + example % prefixes
        corrupted[example, start] = (clean[example, start] + 1) % 53
        corrupted[example, start + 2] = tokens(1)
    answers = torch.stack([clean[:, 0], (clean[:, 0] + 1) % 53], 1)
    return eap.PairedDataset.from_tokens(clean, corrupted, torch.tensor(lengths), answers)


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "bloom", "gpt-neox", "opt"])
@pytest.mark.parametrize(("beginning", "prefixes"), [(0, 6), (9, 6), (9, 3), (9, 1), (12, 3)])
def test_nothing_changes(beginning, prefixes, kind, heads, make_model, relative, monkeypatch):
    monkeypatch.setattr(known, "_WORTH_A_PASS", 20)
    model, data = make_model(kind), pairs(beginning, prefixes)
    settings = {"heads": heads, "steps": 2, "metric": "kl_divergence"}
    with StayDouble():
        alone, plain = (eap.attribute(model, data, reuse_prefix=reuse, **settings) for reuse in (True, False))
        circuit = plain.select(n_edges=plain.graph.n_edges // 3)
        found, right = (eap.evaluate(model, circuit, data, reuse_prefix=reuse) for reuse in (True, False))
    # Scores are kept in float32.
    assert relative(alone.values, plain.values) < 1e-6
    for name in ("values", "clean_values", "corrupted_values"):
        assert relative(getattr(found, name), getattr(right, name)) < 1e-10


def test_distinct_prefixes_run_with_the_corrupted_prompts(make_model):
    """Two passes: whole corrupted prompts, and the path points side by side; before them those of one or two pairs."""
    model, data, shapes = make_model("llama"), pairs(0, 6), []
    watch(
        model.model,
        lambda _, **given: shapes.append(
            tuple(next(given[x] for x in ("inputs_embeds", "input_ids") if given.get(x) is not None).shape[:2])
        ),
    )
    eap.attribute(model, data, steps=2, batch_size=6)
    assert shapes[-2:] == [(6, int(data.lengths.max())), (12, 5)]
    assert all(rows <= 4 for rows, _ in shapes[:-2])


@pytest.mark.parametrize(("beginning", "prefixes"), [(0, 6), (12, 6), (12, 3), (12, 1)])
def test_no_pass_gives_logits_of_more_than_one_position(beginning, prefixes, make_model, monkeypatch):
    monkeypatch.setattr(known, "_WORTH_A_PASS", 20)
    model, shapes = make_model("llama"), []
    call = partial(eap.attribute, model, pairs(beginning, prefixes), steps=2, metric="kl_divergence")
    watch(model.lm_head, lambda logits, _: shapes.append(logits.shape[1]))
    call()  # a first call looks at two positions of one prompt
    shapes.clear()
    call()
    assert shapes and set(shapes) == {1}


class Renamed:
    """Forwards as models of several versions have them, and one that only passes on what it is given."""

    class Old(torch.nn.Module):
        def forward(self, inputs_embeds=None, position_ids=None, past_key_values=None):
            return past_key_values

    class New(torch.nn.Module):
        def forward(self, inputs_embeds=None, cache=None):
            return cache

    class Both(torch.nn.Module):
        def forward(self, inputs_embeds=None, cache=None, past_key_values=None):
            return cache

    class Passing(New):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", ["Old", "New", "Both", "Passing"])
def test_the_cache_goes_by_the_name_that_the_forward_has(kind):
    model, cache = getattr(Renamed, kind)(), object()
    given = prefix.behind(model, cache)
    assert given.pop("use_cache") is True
    assert model(**given) is cache
    assert ("position_ids" in prefix.parameters(model)) == (kind == "Old")


def test_a_model_that_passes_its_arguments_on_runs_behind_its_cache(make_model, make_pairs, relative):
    model, data = make_model("llama"), make_pairs()
    right = eap.attribute(model, data, method="eap").values

    class Passing(type(model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.__class__ = Passing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(eap.attribute(model, data, method="eap").values, right) < 1e-6
