"""Write docs/methods.md: the table is that of the registry.

python docs/methods.py
"""

from __future__ import annotations

from pathlib import Path

from eap_circuits.methods import METHODS

PAGE = Path(__file__).parent / "methods.md"
TEXT = """# Methods

Written by `python docs/methods.py` from the registry, `eap_circuits.methods.METHODS`: what `attribute(method=)` takes.

{table}
"Forwards" are passes of the model over the prompts, from their first difference on where prefixes are reused; L layers, M
`steps`. The definition of a stable method will not change; that of an experimental one may, with a note in the changelog.
`steps` and `quadrature` are heeded where the table says so and ignored elsewhere; `edges` and `checkpoint` are of `exact`
alone and refused elsewhere; "memory": `eap.plan` tells what the run takes; `memory=`
bounds it, and `exact` as well.

## What a run will take

`eap.plan(model, data, memory="80GiB")` and `eap attribute MODEL --dry-run` give the batches and the bytes beside the model's
weights, for which one and two examples run. A model that this machine does not hold can be planned without its weights:

```bash
eap attribute meta-llama/Llama-3.1-70B --task ioi --memory 80GiB --dry-run --no-weights
```

or, from Python, `eap.plan` of a model that was made under `with torch.device("meta"):`. The same passes then run on shapes
alone and their tensors are counted, as on a CPU in the model's dtype: on a GPU attention kernels keep something else. Mixtures
of experts whose experts run one by one need their weights; in one product (`experts_implementation="grouped_mm"`) those in
bfloat16 do not.

## What each computes

S[u, v] is the score of the edge from sender u to receiver v, a mean over examples; t runs over tokens. c_u is what u writes to
the residual stream, Δ_u its value on the corrupted prompt less that on the clean one, x_v what v reads, before its norm. The
loss is −metric, so that a positive score says that corrupting the edge hurts.

**eap** (Syed et al. 2023, [arXiv 2310.10348](https://arxiv.org/abs/2310.10348)):
S[u, v] = Σ_t ⟨Δ_u, ∂loss/∂x_v at the clean prompt⟩.

**eap-ig-inputs** (Hanna et al. 2024, [arXiv 2403.17806](https://arxiv.org/abs/2403.17806)): the gradient is averaged along
the path between the two prompts' embeddings, x' + α_k (x − x') with x' the corrupted ones:
S[u, v] = Σ_t ⟨Δ_u, Σ_k w_k ∂loss/∂x_v at point k⟩. `quadrature` chooses (α_k, w_k): "right", the paper's, "left", that of
the published package, "midpoint", "gauss-legendre".

**clean-corrupted**: the same with the two ends of the path, half each.

**eap-ig-activations** (the same paper and its published package): each group of senders has its own path. Groups are the input
embedding, each layer's heads, which move together, and each layer's MLP: 2L + 1 of them. At a point of its path the clean
prompt runs with the group's contribution replaced by c' + α_k (c − c'), c' the corrupted one:
S[u, v] = Σ_t ⟨Δ_u, Σ_k w_k ∂loss/∂x_v at point k of the path of u's group⟩. Runs start at the group's layer; where the clean
prompt is a point (right), it is one pass for all groups. The published package adds the gradients of *every* group's path to
every edge and divides by 2L + 1, so that a path on which u does not move counts as much as u's own; `compat="eap-ig"` does
the same. There the embeddings are also constants on their own path, so that in models without learned position embeddings what
reads nothing but `input` gets nothing from it.

**eap-conductance** (conductance: Dhamdhere et al. 2018, [arXiv 1805.12233](https://arxiv.org/abs/1805.12233)): along the
path of `eap-ig-inputs`, the gradient at a point meets the sender's own change there, not its whole difference:
S[u, v] = −Σ_t ∫ ⟨dc_u/dα, ∂loss/∂x_v⟩ dα, with M segments and the trapezoid rule
Σ_k Σ_t ⟨c_u(k − 1) − c_u(k), ½ (∂loss/∂x_v at k − 1, and at k)⟩. Over every set of edges that separates `input` from
`logits` the scores add up to m(clean) − m(corrupted), up to an error that falls with M²; those of EAP-IG do so only
over the edges out of `input`. Where experts are chosen the metric jumps along the path, and so the sums are off by the jumps.

**information-flow-routes** (Ferrando & Voita 2024, [arXiv 2403.00824](https://arxiv.org/abs/2403.00824)): proximity is
p(u, v) = max(0, ‖x_v‖₁ − ‖x_v − c_u‖₁) at each token of the clean prompt, S[u, v] its share p(u, v) / Σ_u' p(u', v),
averaged over a prompt's real tokens and then over prompts. All receivers behind one norm have the same scores, and a key/value
head those of its query heads (`to_kv`, which adds them up, does not apply). Corrupted prompts, answers and the metric play no
part. A token where no proximity is positive counts 0; the published package has no number there, which in models with a zero
padding embedding (Gemma) makes whole columns NaN.

**exact**: S[u, v] = m(clean) − m(clean with v reading u's corrupted contribution), each edge by a run of its own
(Goldowsky-Dill et al. 2023, [arXiv 2304.05969](https://arxiv.org/abs/2304.05969)).

## Which to use

- `eap-ig-inputs` first: Hanna et al. found its circuits faithful where those of `eap` were not. With metrics that are flat at
  the clean prompt, as KL divergence is, `eap` scores are all zero.
- `eap` for a first look at a large model: one backward pass.
- `eap-ig-activations` to integrate over what a sender itself does, without moving everything before it; it costs about L
  times as much.
- `eap-conductance` where scores should add up, for instance to compare layers by what passes through them.
- `information-flow-routes` without a contrast: what is read from where on these prompts, important for the answer or not.
- `exact` for few edges (`edges=`), small models, or to see how good the others are.
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
