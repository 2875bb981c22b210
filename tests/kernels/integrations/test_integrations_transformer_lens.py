"""TransformerLens's edge attribution with our contraction, against its own on the same activations and gradients."""

import re
from types import SimpleNamespace

import pytest
import torch

from eap_kernels.integrations import transformer_lens

LAYERS, HEADS, TOKENS, HIDDEN = 2, 3, 5, 7


@pytest.fixture
def package():
    pytest.importorskip("transformer_lens.model_bridge")
    from transformer_lens.tools.analysis import attribution_patching

    return attribution_patching


@pytest.fixture
def make_cache(package, randn):
    def make():
        shapes = {"hook_embed": (TOKENS, HIDDEN), f"blocks.{LAYERS - 1}.hook_resid_post": (TOKENS, HIDDEN)}
        for layer in range(LAYERS):
            shapes |= {f"blocks.{layer}.{name}": (TOKENS, HIDDEN) for name in ("hook_mlp_out", "hook_mlp_in")}
            names = ("z", "result", "q_input", "k_input", "v_input")
            shapes |= {f"blocks.{layer}.attn.hook_{name}": (TOKENS, HEADS, HIDDEN) for name in names}
        values, gradients = (
            {name: randn(1, *shape, dtype=torch.float64) for name, shape in shapes.items()} for _ in range(2)
        )
        return package.GradientCache(values, gradients, torch.zeros(()))

    return make


@pytest.mark.parametrize("parallel", [False, True])
def test_scores_are_the_package_s(package, make_cache, parallel):
    clean, corrupt = make_cache(), make_cache()
    model = SimpleNamespace(cfg=SimpleNamespace(n_layers=LAYERS, parallel_attn_mlp=parallel))
    edges = package.enumerate_edges(model, corrupt)
    expected = package._edge_effects(clean, corrupt, edges)
    with transformer_lens.patch():
        assert package._edge_effects.__module__ == transformer_lens.__name__
        found = package._edge_effects(clean, corrupt, edges)
    assert package._edge_effects.__module__ == package.__name__
    assert list(found) == list(expected)
    values = (torch.tensor([*scores.values()], dtype=torch.float64) for scores in (found, expected))
    torch.testing.assert_close(*values)


def test_a_gradient_that_is_missing_is_named_by_the_package(package, make_cache):
    clean, corrupt = make_cache(), make_cache()
    edges = package.enumerate_edges(SimpleNamespace(cfg=SimpleNamespace(n_layers=LAYERS)), corrupt)
    corrupt.gradients["blocks.1.hook_mlp_in"] = None
    with transformer_lens.patch(), pytest.raises(ValueError, match=re.escape("blocks.1.hook_mlp_in")):
        package._edge_effects(clean, corrupt, edges)


def test_another_version_is_refused_before_anything_is_touched(package, monkeypatch):
    def another(clean_cache, corrupt_cache, edges):
        return {}

    monkeypatch.setattr(package, "_edge_effects", another)
    with pytest.raises(RuntimeError, match=r"^transformer_lens.patch: expected .*another to use .*, got another"):
        transformer_lens.patch()
    assert package._edge_effects is another
