"""Write docs/methods.md, its table from the registry of methods.

python docs/methods.py
"""

from __future__ import annotations

from pathlib import Path

from eap_circuits.methods import METHODS

PAGE = Path(__file__).parent / "methods.md"
TEXT = """# Methods

These are the values that `attribute(method=)` takes. `python docs/methods.py` writes this page from the registry,
`eap_circuits.methods.METHODS`.

{table}
"Forwards" are passes of the model over the prompts; if prefixes are reused, they start at the first difference. L is the
number of layers, M is `steps`. The definition of a stable method will not change; that of an experimental one may, with a note
in the changelog. Methods without a mark ignore `steps` or `quadrature`. Only `exact` takes `edges` and `checkpoint`; the others
refuse them. A mark under "memory" means that `eap.plan` tells what the run takes and that `memory=` bounds it; `memory=` also
bounds `exact`.

## What a run will take

`eap.plan(model, data, memory="80GiB")` and `eap attribute MODEL --dry-run` run one and two examples, and from these tell the
batches and the bytes needed besides the model's weights. If the model does not fit on this machine, plan without its weights:

```bash
eap attribute meta-llama/Llama-3.1-70B --task ioi --memory 80GiB --dry-run --no-weights
```

or, from Python, call `eap.plan` with a model that was made under `with torch.device("meta"):`. The same passes then run on
shapes only, and their tensors are counted as on a CPU in the model's dtype; on a GPU, attention kernels keep other tensors.
Mixtures of experts that run expert by expert cannot be planned without weights. In bfloat16, those that run all experts in
one product (`experts_implementation="grouped_mm"`) can.

## What each computes

S[u, v] is the score of the edge from sender u to receiver v, a mean over examples; t runs over tokens. c_u is what u writes to
the residual stream, and Δ_u is c_u on the corrupted prompt minus c_u on the clean one. x_v is what v reads, before its norm.
The loss is −metric, so a positive score means that corrupting the edge hurts.

**eap** (Syed et al. 2023, [arXiv 2310.10348](https://arxiv.org/abs/2310.10348)):
S[u, v] = Σ_t ⟨Δ_u, ∂loss/∂x_v at the clean prompt⟩.

**eap-ig-inputs** (Hanna et al. 2024, [arXiv 2403.17806](https://arxiv.org/abs/2403.17806)): the gradient is averaged along
the path between the two prompts' embeddings, x' + α_k (x − x'), where x' are the corrupted ones:
S[u, v] = Σ_t ⟨Δ_u, Σ_k w_k ∂loss/∂x_v at point k⟩. `quadrature` chooses (α_k, w_k): "right" (the paper's), "left" (the
published package's), "midpoint" or "gauss-legendre".

**clean-corrupted**: the same formula with only the two ends of the path, each weighted by half.

**eap-ig-activations** (the same paper and its published package): each group of senders has its own path. The 2L + 1 groups
are the input embedding, each layer's heads, which move together, and each layer's MLP. At a point of a group's path the clean
prompt runs with the group's contribution replaced by c' + α_k (c − c'), where c' is the corrupted contribution:
S[u, v] = Σ_t ⟨Δ_u, Σ_k w_k ∂loss/∂x_v at point k of the path of u's group⟩. Runs start at the group's layer. If the clean
prompt is a point of the path ("right"), one pass serves it for all groups. The published package adds the gradients of *every*
group's path to every edge and divides by 2L + 1, so a path on which u does not move counts as much as u's own;
`compat="eap-ig"` does the same. There the embeddings are also constants on their own path; in models without learned position
embeddings, receivers that read only `input` therefore get nothing from that path.

**eap-conductance** (conductance: Dhamdhere et al. 2018, [arXiv 1805.12233](https://arxiv.org/abs/1805.12233)): along the
path of `eap-ig-inputs`, the gradient at a point is multiplied by the sender's own change there, not by its whole difference:
S[u, v] = −Σ_t ∫ ⟨dc_u/dα, ∂loss/∂x_v⟩ dα, with M segments and the trapezoid rule
Σ_k Σ_t ⟨c_u(k − 1) − c_u(k), ½ (∂loss/∂x_v at k − 1 + ∂loss/∂x_v at k)⟩. Over every set of edges that separates `input`
from `logits` the scores add up to m(clean) − m(corrupted), up to an error that falls with M². EAP-IG's scores do so only over
the edges out of `input`. In mixtures of experts the metric jumps where the path switches experts, and the sums are off by
these jumps.

**information-flow-routes** (Ferrando & Voita 2024, [arXiv 2403.00824](https://arxiv.org/abs/2403.00824)): proximity is
p(u, v) = max(0, ‖x_v‖₁ − ‖x_v − c_u‖₁) at each token of the clean prompt, and S[u, v] is its share p(u, v) / Σ_u' p(u', v),
averaged over a prompt's real tokens and then over prompts. All receivers behind the same norm have the same scores, and a
key/value head has those of its query heads (`to_kv`, which adds them up, does not apply). Corrupted prompts, answers and the
metric are not used. A token where no proximity is positive counts as 0. The published package computes 0 / 0 there, so in
models with a zero padding embedding (Gemma) whole columns are NaN.

**exact**: S[u, v] = m(clean) − m(clean with v reading u's corrupted contribution), with one run for each edge
(Goldowsky-Dill et al. 2023, [arXiv 2304.05969](https://arxiv.org/abs/2304.05969)).

## Which to use

- Start with `eap-ig-inputs`: Hanna et al. found its circuits faithful where those of `eap` were not. For metrics that are flat
  at the clean prompt, such as KL divergence, all `eap` scores are zero.
- Take `eap` for a first look at a large model: it needs one backward pass.
- Take `eap-ig-activations` to integrate over what a sender itself does, without moving everything before it. It costs about L
  times as much.
- Take `eap-conductance` if scores should add up, for instance to compare layers by what passes through them.
- Take `information-flow-routes` if you have no contrast: it shows what is read from where on these prompts, whether it matters
  for the answer or not.
- Take `exact` for few edges (`edges=`), for small models, or to see how good the others are.
"""  # noqa: E501


def table() -> str:
    lines = ["| method | what | cost | steps | quadrature | memory | tier |", "|---|---|---|---|---|---|---|"]
    for name, method in METHODS.items():
        marks = (method.stepped, method.grids, method.planned)
        cells = [f"`{name}`", method.description, method.passes, *("✓" if mark else "–" for mark in marks), method.tier]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    return TEXT.format(table=table())


if __name__ == "__main__":
    PAGE.write_text(page())
