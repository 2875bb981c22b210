"""Architectures without a table, tables from outside, and the page that teaches both."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import eap_circuits as eap
from eap_circuits.adapters import FAMILIES
from eap_circuits.families import registry
from tests.circuits.conftest import need_transformers, random_model

ROOT = Path(__file__).parents[3]
_WIDE = {
    "vocab_size": 59,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
}
# Architectures of Hugging Face, served without a table.
UNKNOWN = {
    "bert": {**_WIDE, "is_decoder": True},
    "biogpt": _WIDE,
    "glm4": {**_WIDE, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": None},
    "granitemoe": {
        **_WIDE,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "mamba": {"vocab_size": 59, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3},
    "mpt": {"vocab_size": 59, "d_model": 24, "n_heads": 3, "n_layers": 2, "max_seq_len": 48, "initializer_range": 0.3},
    "nemotron": {**_WIDE, "num_key_value_heads": 2},
    "openai-gpt": {
        "vocab_size": 59,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 48,
        "initializer_range": 0.3,
    },
    "persimmon": _WIDE,
    # Layers as nodes, and no norm behind the last one.
    "xmod": {**_WIDE, "is_decoder": True, "pad_token_id": 1, "languages": ["en"], "default_language": "en"},
}


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """Whatever a test registers is forgotten after it."""
    for name, family in list(FAMILIES.items()):
        monkeypatch.setitem(FAMILIES, name, family)
    before = set(FAMILIES)
    yield
    for name in set(FAMILIES) - before:
        del FAMILIES[name]


@pytest.mark.filterwarnings("ignore:.*prefixes are not reused")
@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_architectures_are_refused_discovered_and_served(kind, make_pairs):
    need_transformers(kind)
    model, data = random_model(kind, UNKNOWN[kind]), make_pairs(n=3)
    FAMILIES.pop(kind, None)
    with pytest.raises(eap.InputError, match="discover"):
        eap.attribute(model, data)
    family, checks = eap.discover(model)
    assert all(check.passed for check in checks) and kind not in FAMILIES
    eap.register_family(family)
    scores = eap.attribute(model, data)
    full = eap.Circuit.from_mask(scores.graph, scores.graph.edge_mask)
    assert eap.evaluate(model, full, data).faithfulness == pytest.approx(1)


def test_discovery_finds_what_the_tables_say(kind, make_model, monkeypatch):
    """On known families: the same sites, where the table has one way to name them."""
    model = make_model(kind)
    table = FAMILIES[model.config.model_type]
    monkeypatch.delitem(FAMILIES, model.config.model_type)
    found, _ = eap.discover(model)
    for field in ("layers", "final_norm", "q", "k", "v", "out", "mlp", "attention_post_norm", "mlp_post_norm"):
        assert getattr(found, field) == getattr(table, field), field
    for field in ("attention_norm", "mlp_norm"):
        said = getattr(table, field)
        assert getattr(found, field) in (said if isinstance(said, tuple) else (said,)), field


@pytest.mark.parametrize(
    ("kind", "fields", "out", "reads"),
    [
        # Two softmax maps per value: a query's place among the outputs is not that of its head.
        ("diffllama", {**_WIDE, "num_key_value_heads": 2}, "self_attn.o_proj", ["q_proj", "k_proj", "v_proj"]),
        # Keys and values from a latent vector.
        (
            "deepseek_v3",
            {
                **_WIDE,
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "moe_intermediate_size": 8,
            },
            "self_attn.o_proj",
            ["q_a_proj", "kv_a_proj_with_mqa"],
        ),
    ],
)
def test_mixers_without_queries_keys_and_values_are_discovered(kind, fields, out, reads, monkeypatch, make_pairs):
    monkeypatch.delitem(FAMILIES, kind, raising=False)
    model, data = random_model(kind, fields), make_pairs(n=3)
    family, checks = eap.discover(model)
    assert all(check.passed for check in checks)
    (mixer,) = family.mixers
    assert mixer.out == out and list(mixer.reads) == reads
    eap.register_family(family)
    scores = eap.attribute(model, data)
    assert any(name.endswith(f"<{reads[-1]}>") for name in scores.graph.receivers)
    full = eap.Circuit.from_mask(scores.graph, scores.graph.edge_mask)
    assert eap.evaluate(model, full, data).faithfulness == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        # Of the layers one by one, none is the residual stream's.
        ("xlm", {"vocab_size": 59, "emb_dim": 24, "n_layers": 2, "n_heads": 3, "pad_token_id": 2}, "decoder layer"),
        # Several residual streams.
        (
            "gemma3n_text",
            {**_WIDE, "num_key_value_heads": 2, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 59},
            "4 that every layer mixes anew",
        ),
    ],
)
def test_what_discovery_cannot_serve_is_refused_in_one_sentence(kind, fields, words):
    with pytest.raises(eap.InputError) as error:
        eap.discover(random_model(kind, fields))
    text = str(error.value)
    assert words in text and "\n" not in text and text.endswith(".")
    assert kind not in FAMILIES


def test_discovery_leaves_the_model_untouched(make_model, monkeypatch):
    from eap_circuits.selfcheck.model import _state

    model = make_model("gemma2").train()
    monkeypatch.delitem(FAMILIES, "gemma2")
    before = _state(model)
    eap.discover(model)
    assert _state(model) == before


def test_tables_of_other_packages_are_loaded_when_first_asked_for(monkeypatch):
    class Announced:
        def load(self):
            return dataclasses.replace(FAMILIES["llama"], model_types=("outside",))

    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or [Announced()])
    registry._load_announced.cache_clear()
    assert registry.family_of("llama") is FAMILIES["llama"] and not asked
    assert registry.family_of("outside").q == "self_attn.q_proj" and asked == ["eap_circuits.families"]
    assert registry.family_of("nowhere") is None and len(asked) == 1
    registry._load_announced.cache_clear()


def test_an_installed_package_changes_no_table_unasked(monkeypatch):
    right = FAMILIES["llama"]
    other = dataclasses.replace(right, q="elsewhere", model_types=("llama", "outside"))
    announced = SimpleNamespace(load=lambda: other, value="package:TABLE")
    monkeypatch.setattr(registry, "entry_points", lambda group: [announced])
    monkeypatch.setitem(FAMILIES, "outside", right)  # to be taken out again
    del FAMILIES["outside"]
    registry._load_announced.cache_clear()
    with pytest.warns(UserWarning, match="llama: the table of package:TABLE is not used, as there is one already"):
        assert registry.family_of("outside") is other
    assert FAMILIES["llama"] is right
    monkeypatch.setitem(FAMILIES, "llama", right)  # to be put back
    eap.register_family(other)
    assert FAMILIES["llama"] is other
    registry._load_announced.cache_clear()


def test_only_a_table_can_be_registered():
    with pytest.raises(eap.InputError, match="Family"):
        eap.register_family({"name": "x"})


def test_the_pages_example_works():
    """docs/adapters.md: the table and its check are run as they stand."""
    page = (ROOT / "docs" / "adapters.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "discover(model)" not in block]
    assert len(blocks) == 3 and len(blocks[0].splitlines()) <= 20
    for block in blocks:
        exec(block, space := globals() | {"eap": eap})
    assert FAMILIES["nemotron"].name == "nemotron" and space
