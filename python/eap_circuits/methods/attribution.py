"""Score every edge of a model."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..capture import RULES, TOKENS_TOGETHER, Progress, Run, borrowed, make_batches, prepare
from ..errors import expected, one_of
from ..graph import Circuit, EdgeScores, Graph, Heads
from ..tasks import PairedDataset
from .exact import Checkpoint, edges_to_score, exact_scores
from .gradient import gradient_scores
from .planning import Plan, budget, make_plan, tokens_per_pass
from .spec import METHODS, QUADRATURES, Path


def attribute(
    model: nn.Module,
    data: PairedDataset,
    metric: Any = "logit_diff",
    method: str = "eap-ig-inputs",
    steps: int = 5,
    quadrature: str = "right",
    heads: Heads = "kv",
    ablation: str = "patching",
    batch_size: int | None = None,
    compat: str | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
    progress: Progress | None = None,
    edges: Circuit | Tensor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    rules: str | None = None,
) -> EdgeScores:
    """Score every edge: S[u, v] = mean over examples of Σ_t ⟨Δ_u(t), Σ_k w_k ∂loss/∂x_v(t) at path point k⟩.

    Δ_u is sender u's contribution in the corrupted run less that in the clean run, loss is −metric: a positive score
    says that corrupting the edge hurts the metric. The model comes back as it was, also after an error.

    Args:
        model: a Hugging Face causal language model, on one device.
        data: clean and corrupted prompts with answers.
        metric: "logit_diff", "prob_diff", "kl_divergence", or a callable (logits [E, V], batch) -> [E], higher is
            better.
        method: "eap", "eap-ig-inputs", "clean-corrupted", or "exact", which measures what the others approximate:
            S[u, v] = mean over examples of m(clean) − m(clean with this edge alone corrupted).
        steps: path points M of "eap-ig-inputs".
        quadrature: their grid: "right" (the paper), "left" (EAP-IG version 2), "midpoint", "gauss-legendre".
        heads: "kv" scores a key/value head's inputs once, "query" once for each query head that uses it.
        ablation: "patching", the corrupted prompt's activations.
        batch_size: examples per batch; by default about a thousand tokens. Scores do not depend on it.
        compat: None, or "eap-ig" for the published package's definition where it differs from ours: in models
            with a norm after attention (Gemma 2, Gemma 3, OLMo 2) a head's contribution is then what enters that
            norm, not what it adds to the residual stream.
        reuse_prefix: run the tokens before the first difference once and keep their keys and values; exact.
        memory: what the run may take beside the model and the data, in bytes or such as "8GiB"; by default half of
            what is free. Where it runs out all the same, the run goes on with less at once. Scores do not depend on it.
            "exact" does not heed it.
        progress: called with (examples done, examples in all) after each batch; by "exact" after each pass.
        edges: for "exact", the edges to measure, a circuit or a bool mask [S, R]; the others' scores are zero.
        checkpoint: for "exact", a `.safetensors` file that is written about every minute, and from which the same
            call goes on after an interruption.
        rules: what takes the gradient's place in the backward passes: None, "relp" (relevance patching), "relp-ah"
            (with attention patterns constant too), or "gim" (gradient interaction modifications); docs/rules.md has
            the formulas and sources. "exact" has no backward pass.

    Returns:
        EdgeScores with float32 values [S, R] in units of the metric.

    Raises:
        InputError: see the message; raised before any work, except for a metric that is not finite.
    """
    run, graph, path = _checked(
        model, data, metric, method, steps, quadrature, heads, ablation, batch_size, compat, rules
    )
    model = run.arch.model
    allowed = budget(run, memory)
    if path is not None and (edges is not None or checkpoint is not None):
        raise expected("edges and checkpoint", 'method="exact"', repr(method))
    chosen = edges_to_score(graph, edges)
    name = _metric_name(metric)
    started = None
    if path is None:
        request = _request(model, data, name, graph, chosen, batch_size, reuse_prefix, compat)
        started = Checkpoint(checkpoint, request, (graph.n_senders, graph.n_receivers))

    with borrowed(model):
        if path is not None:
            tokens = tokens_per_pass(run, graph, path, batch_size, reuse_prefix, allowed)
            batches = make_batches(data, batch_size, reuse_prefix, run.arch.device, tokens)
            total = gradient_scores(run, graph, batches, path, tokens, progress)
        elif started is not None:
            batches = make_batches(data, batch_size, reuse_prefix, run.arch.device)
            total = exact_scores(run, graph, batches, chosen, started, TOKENS_TOGETHER, progress)
    info = {
        "method": method,
        "steps": None if path is None else len(path),
        "quadrature": quadrature if method == "eap-ig-inputs" else None,
        "metric": name,
        "ablation": ablation,
        "data": data.name,
        "n_examples": len(data),
        "model": _model_name(model),
    }
    if rules is not None:
        info["rules"] = rules
    if edges is not None:
        info["edges"] = int(chosen.sum())
    return EdgeScores(graph, (total / len(data)).float(), info)


def plan(
    model: nn.Module,
    data: PairedDataset,
    metric: Any = "logit_diff",
    method: str = "eap-ig-inputs",
    steps: int = 5,
    heads: Heads = "kv",
    batch_size: int | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
    rules: str | None = None,
) -> Plan:
    """The batches and passes of the `attribute` call with these arguments, and the memory that it will take.

    Runs one or two examples of each batch, in a few passes.

    Raises:
        InputError: what `attribute` refuses, and "exact", whose memory is that of its passes alone.
    """
    run, graph, path = _checked(model, data, metric, method, steps, "right", heads, "patching", batch_size, None, rules)
    if path is None:
        raise expected("method", "a gradient method", repr(method))
    with borrowed(run.arch.model):
        return make_plan(run, graph, path, batch_size, reuse_prefix, budget(run, memory))


def _checked(
    model: nn.Module,
    data: PairedDataset,
    metric: Any,
    method: str,
    steps: int,
    quadrature: str,
    heads: Heads,
    ablation: str,
    batch_size: int | None,
    compat: str | None,
    rules: str | None,
) -> tuple[Run, Graph, Path | None]:
    one_of("method", method, METHODS)
    one_of("quadrature", quadrature, QUADRATURES)
    one_of("heads", heads, ("kv", "query"))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise expected("steps", "a whole number of at least 1", repr(steps))
    if compat not in (None, "eap-ig"):
        raise expected("compat", "None or 'eap-ig'", repr(compat))
    run = prepare(model, data, metric, ablation, batch_size)
    if compat == "eap-ig":
        run = replace(run, arch=run.arch.before_post_norms())
    find_path = METHODS[method].path
    if rules is not None:
        one_of("rules", rules, RULES)
        if find_path is None:
            raise expected("rules", f"None, as {method!r} has no backward pass", repr(rules))
        run = replace(run, rules=RULES[rules])
    return run, run.arch.graph(heads), None if find_path is None else find_path(steps, quadrature)


def _metric_name(metric: Any) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def _request(
    model: Any,
    data: PairedDataset,
    metric: str,
    graph: Graph,
    edges: Tensor,
    *settings: Any,
) -> dict[str, Any]:
    """What two runs must have in common for one to go on where the other stopped."""
    return {
        "model": model_identity(model),
        "data": [*data_identity(data), _digest(edges)],
        "metric": metric,
        "graph": graph.to_dict(),
        "settings": list(settings),
    }


def model_identity(model: Any) -> list[Any]:
    """What tells models apart: name, configuration, dtype and a sum of weights; plain JSON values."""
    embedding = model.get_input_embeddings().weight.detach()
    return [_model_name(model), model.config.to_json_string(), str(embedding.dtype), float(embedding.sum())]


def data_identity(data: PairedDataset) -> list[str]:
    """What tells prompt pairs apart: digests of their tokens, lengths and answers."""
    return [_digest(x) for x in (data.clean, data.corrupted, data.lengths, data.answers)]


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def _model_name(model: Any) -> str:
    """The hub name, or the folder's own name: results are passed on, and whole paths mean nothing elsewhere."""
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
