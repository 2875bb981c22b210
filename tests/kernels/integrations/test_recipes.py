"""The recipes of docs/integrations.md, run as they stand, against the einsums of the codebases that they are for."""

import re
from pathlib import Path

import pytest
import torch

import eap_kernels

PAGE = (Path(__file__).parents[3] / "docs" / "integrations.md").read_text(encoding="utf-8")
MARKED = re.findall(r"<!-- \S+/test_recipes.py runs this -->\n```python\n(.*?)```", PAGE, re.DOTALL)
RECIPES: dict = {"eap_kernels": eap_kernels, "torch": torch}
for source in MARKED:
    exec(source, RECIPES)


def edge_pruning(x, corr_x, embeds, mask, common_mask):
    """As its blocks' `attn_read` has it."""
    kept = torch.einsum("wbsd,wh->hbsd", x, mask * common_mask)
    return kept + embeds + torch.einsum("wbsd,wh->hbsd", corr_x, (1 - mask) * common_mask)


def ugs(outputs, constants, mask):
    whole = torch.einsum("busd,buv->bvsd", outputs, mask)
    return whole + torch.einsum("ud,buv->bvd", constants, 1 - mask)[:, :, None]


def patch_wrapper(x, ablations, outputs, mask):
    return x + torch.einsum("hu,ubsd->bshd", mask, ablations - outputs)


BATCH, SEQ, SENDERS, HEADS, HIDDEN = 2, 3, 5, 4, 6
RESIDUAL = (SENDERS, BATCH, SEQ, HIDDEN)
CASES = {
    "edge_pruning": (edge_pruning, (RESIDUAL, RESIDUAL, RESIDUAL[1:], (SENDERS, HEADS), (SENDERS, HEADS)), 4),
    "ugs": (ugs, ((BATCH, SENDERS, SEQ, HIDDEN), (SENDERS, HIDDEN), (BATCH, SENDERS, HEADS)), 3),
    "patch_wrapper": (patch_wrapper, ((BATCH, SEQ, HEADS, HIDDEN), RESIDUAL, RESIDUAL, (HEADS, SENDERS)), 4),
}


def test_every_recipe_is_run():
    assert len(MARKED) == len(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_gives_the_codebase_s_read_and_gradients(name):
    published, shapes, differentiated = CASES[name]
    generator = torch.Generator().manual_seed(0)
    given = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if name == "edge_pruning":
        given[-1] = (given[-1] > 0.3).double()
    leaves = [x.requires_grad_() for x in given[:differentiated]]
    found, right = RECIPES[f"{name}_read"](*given), published(*given)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    slopes = (torch.autograd.grad(y.sin().sum(), leaves) for y in (found, right))
    for ours, theirs in zip(*slopes):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
