"""What holds for every codebase that is patched, and the recipe for others."""

import re
import sys
from pathlib import Path

import pytest
import torch

import eap_kernels as ek
from eap_kernels import testing
from eap_kernels.integrations import auto_circuit, eap_ig, transformer_lens
from tests.kernels.integrations.stand_ins import install

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("adapter", "module"),
    [
        (eap_ig, "eap.utils"),
        (auto_circuit, "auto_circuit.utils.patch_wrapper"),
        (transformer_lens, "transformer_lens.tools.analysis.attribution_patching"),
    ],
)
def test_a_missing_package_is_one_sentence(monkeypatch, adapter, module):
    monkeypatch.setitem(sys.modules, module, None)
    name = adapter.__name__.rsplit(".", 1)[1]
    with pytest.raises(ImportError, match=rf"^{name}.patch: expected {module} to be importable, got "):
        adapter.patch()


@pytest.mark.parametrize(
    ("adapter", "module", "has", "missing"),
    [
        (eap_ig, "eap__utils", "", "make_hooks_and_matrices"),
        (auto_circuit, "auto_circuit__utils__patch_wrapper", "", "PatchWrapperImpl"),
        (auto_circuit, "auto_circuit__utils__patch_wrapper", "class PatchWrapperImpl:\n    pass", "forward"),
        (transformer_lens, "transformer_lens__tools__analysis__attribution_patching", "", "_edge_effects"),
    ],
)
def test_a_package_without_what_is_replaced_is_one_sentence(monkeypatch, adapter, module, has, missing):
    install(monkeypatch, **({"eap__evaluate": ""} if adapter is eap_ig else {}), **{module: has})
    name = adapter.__name__.rsplit(".", 1)[1]
    with pytest.raises(RuntimeError, match=rf"^{name}.patch: expected .* to have '{missing}', got another version"):
        adapter.patch()


def test_the_recipe_of_the_page_is_the_contraction(randn):
    (recipe,) = re.findall(r"```python\n(delta, .+?)```", (ROOT / "docs" / "integrations.md").read_text(), re.DOTALL)
    assert len(recipe.strip().splitlines()) == 3
    difference, gradients, scores = randn(2, 5, 9, 7), randn(2, 5, 4, 7), torch.ones(9, 4)
    exec(recipe, {"torch": torch, "eap_kernels": ek, "difference": difference, "gradients": gradients,
                  "scores": scores, "prev_index": 6})  # fmt: skip
    rows = [x.flatten(0, 1).transpose(0, 1) for x in (difference, gradients)]
    reach = torch.full((4,), 6)
    testing.assert_close(
        scores - 1, ek.edge_scores(*rows, reach, impl="reference"), testing.edge_scores_oracle(*rows, reach)
    )
