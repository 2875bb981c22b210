"""Score every edge of a model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..budget import free_share, kind_of
from ..checkpoint import Where, opened, settings_of
from ..errors import expected, flag, known_arguments, one_of, shown, whole
from ..forward import Constants, borrowed, one_want_of_memory
from ..graph import Circuit, EdgeScores, Heads
from ..modules.loans import gives_back
from ..modules.shapes import Weightless
from ..provenance import called, provenance
from ..ranks import together
from ..recording import ABLATIONS, RULES, ablation_of
from ..request import Progress, prepare, watched
from ..tasks import PairedDataset
from .exact import edges_to_score
from .gradient import GradientMethod, Plan, check_divisible
from .quadrature import QUADRATURES
from .registry import METHODS
from .spec import AttributionRequest
from .statistics import BY_SPAN, Statistics, to_keep

_MOST_STEPS = 10_000


@together
@gives_back
@one_want_of_memory
@known_arguments
def attribute(
    model: nn.Module,
    data: PairedDataset,
    metric: Any = None,
    *,
    method: str = "eap-ig-inputs",
    steps: int = 5,
    quadrature: str = "right",
    heads: Heads = "kv",
    ablation: str | Constants = "patching",
    batch_size: int | None = None,
    compat: str | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
    progress: Progress | bool | None = None,
    edges: Circuit | Tensor | None = None,
    checkpoint: Where = None,
    ablation_data: PairedDataset | None = None,
    keep: str | Collection[str] | None = None,
    rules: str | None = None,
) -> EdgeScores:
    """Score every edge: S[u, v] = mean over examples of Σ_t ⟨Δ_u(t), Σ_k w_k ∂loss/∂x_v(t) at path point k⟩.

    Δ_u is sender u's ablated contribution less that in the clean run, loss is −metric: a positive score says that
    ablating the edge hurts the metric. The model comes back as it was, also after an error. Inside a process group of
    torch.distributed all ranks make the same call, share its work and get the same scores (docs/distributed.md).

    Args:
        model: a Hugging Face language model (causal, masked, encoder-decoder) or a classifier of prompts.
        data: clean and corrupted prompts with answers.
        metric: a differentiable metric's name (docs/metrics.md), or a callable (logits [E, V], batch) -> [E]; higher is
            better. By default the data's own, `data.metric`, which is "logit_diff" unless they say otherwise.
        method: one of `METHODS` (docs/methods.md). Of "eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted",
            "eap-conductance" and "eap-gp" the formula above holds with their own points and differences; "exact"
            measures what these approximate: S[u, v] = mean over examples of m(clean) − m(clean with only this edge
            ablated); "information-flow-routes" gives shares of a receiver's input, whatever the metric and the
            corrupted prompts.
        steps: path points M of "eap-ig-inputs" and of each path of "eap-ig-activations"; segments of "eap-conductance";
            steps of "eap-gp".
        quadrature: the points of the first two: "right" (the paper), "left" (EAP-IG version 2), "midpoint",
            "gauss-legendre".
        heads: "kv" scores a key/value head's inputs once, "query" once for each query head that uses it.
        ablation: what an edge carries instead of the clean contribution: "patching", that of the corrupted prompt;
            "zero", nothing; "mean", the sender's mean over all tokens of the ablation data's clean prompts;
            "mean-positional", its mean at the same position; or constants from `eap.optimal_constants`. The path of
            "eap-ig-inputs" runs between the two prompts' embeddings with every ablation.
        batch_size: examples per batch; by default about a thousand tokens. Scores do not depend on it.
        compat: None, or "eap-ig" for the published package's definition where it differs from ours: in models
            with a norm after attention (Gemma 2, Gemma 3, OLMo 2) a head's contribution is then what enters that
            norm, not what it adds to the residual stream; in "eap-ig-activations" every path's gradients go to every
            edge.
        reuse_prefix: run the tokens before the first difference once and keep what they leave in the model's cache;
            this is exact. If the cache does not support it, it is skipped with a warning.
        memory: what the run may take besides the model and the data, in bytes or as "8GiB"; by default half of what is
            free. If memory runs out all the same, the run goes on with smaller passes. Scores do not depend on it.
            "eap-conductance" and "information-flow-routes" ignore it.
        progress: called with (examples done, examples in all) after each batch; by "exact" with edges after each pass.
        edges: for "exact", the edges to measure, a circuit or a bool mask [S, R]; the others' scores are zero.
        checkpoint: a `.safetensors` file that is written after every batch, at most once a second, and on the way out
            of an interruption; from it the same call goes on with the same bits. The model, data, metric and everything
            else that changes a score must be the same; batch size, memory and devices need not.
        ablation_data: whose clean prompts are used to compute means; by default the data themselves.
        keep: what to keep besides the scores' mean over examples, one or more of "variance" (over examples),
            "examples" (each example's scores, and the variance), "positions" or "positions-from-end" (each token
            position's scores, counted from the prompts' start, or with the scored positions last), "spans" (those of
            the data's spans, docs/spans.md), "neurons" (each node's scores by residual dimension), "within-heads" (from
            span to span inside heads, docs/spans.md; only of "eap", "eap-ig-inputs" and "clean-corrupted"). "exact" can
            keep only the first two. None costs nothing.
        rules: what replaces the gradient in the backward passes: None, "relp" (relevance patching), "relp-ah" (with
            attention patterns constant too), or "gim" (gradient interaction modifications); docs/rules.md has the
            formulas and sources. "exact" and "information-flow-routes" have no backward pass.

    Returns:
        EdgeScores with float32 values [S, R] in units of the metric (of "information-flow-routes": shares).

    Raises:
        InputError: see the message; raised before any work, except for a metric that is not finite.

    Example:
        >>> scores = eap.attribute(model, data, method="eap-ig-inputs", steps=5)
        >>> strongest = scores.top_edges(10)
        >>> circuit = scores.select(20, how="greedy")
    """
    asked = dict(locals())
    call = called(attribute, asked)
    # How a call is watched and kept is no part of what is computed.
    request = _request(**{name: x for name, x in asked.items() if name not in ("progress", "checkpoint")})
    progress = watched(progress)
    origin = provenance(request, call, request.method.operator(request))
    spans = {"spans": data.spans} if request.keep & BY_SPAN else {}
    settings = partial(settings_of, request, call="attribute", **spans)
    with opened(checkpoint, request.arch.model, settings) as kept, borrowed(request.arch.model):
        statistics = Statistics(request)
        request.method.run(request.verified(heads).with_constants(), statistics, kept, progress)
    spec = request.method
    info = {
        "method": method,
        "steps": len(request.path) or None,
        "quadrature": quadrature if spec.grids else None,
        "metric": request.metric.name if spec.measures else None,
        "ablation": ablation_of(ablation).name,
        **origin,
    }
    if not spec.backward:
        info["additive"] = False
    if rules is not None:
        info["rules"] = rules
    if compat is not None:
        info["compat"] = compat
    if edges is not None:
        info["edges"] = int(request.edges.sum())
    if ablation_data is not None:
        info["ablation_data"] = ablation_data.name
    return statistics.scores(info)


@together
@gives_back
@one_want_of_memory
@known_arguments
def plan(
    model: nn.Module,
    data: PairedDataset,
    metric: Any = None,
    *,
    method: str = "eap-ig-inputs",
    steps: int = 5,
    heads: Heads = "kv",
    batch_size: int | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
    ablation: str | Constants = "patching",
    keep: str | Collection[str] | None = None,
    rules: str | None = None,
    quadrature: str = "right",
    compat: str | None = None,
    ablation_data: PairedDataset | None = None,
    device: str | None = None,
    gpus: int = 1,
) -> Plan:
    """The batches and passes of the `attribute` call with these arguments, and the memory and time that it will take.

    Runs one or two examples of each batch, in a few passes. The result itself, which may be large with `keep`, is not
    counted.

    Args:
        device: "cuda" or "cpu", the kind of device to plan for, whatever this machine has; by default the model's.
        gpus: how many of them divide one model by tensor parallelism, each with its part of the weights and of the
            work.
        memory: as in `attribute`, on each GPU.

    Raises:
        InputError: what `attribute` refuses, methods that are not planned, such as "exact", another machine's device
            without `memory=`, and a model that cannot be divided among so many GPUs.

    Example:
        >>> eap.plan(model, data, steps=30).bytes  # besides model and data
    """
    asked = {name: value for name, value in locals().items() if name not in ("device", "gpus")}
    kind = None if device is None else kind_of(device)
    gpus = whole("gpus", gpus, 1)
    with Weightless(model) as shapes:
        check_method(method, steps, quadrature, ablation, keep, rules, planned=True)
        request = _request(**asked)
        spec = request.method
        assert isinstance(spec, GradientMethod)
        if kind is not None:
            memory = free_share(kind) if request.memory is None else request.memory
            request = replace(request, arch=replace(request.arch, planned_for=kind), memory=memory)
        if gpus > 1 and request.arch.device_kind != "cuda":
            raise expected("gpus", "1, except for device='cuda'", gpus)
        if gpus > 1:
            check_divisible(request.arch, gpus)
        with borrowed(request.arch.model), shapes.mode:
            return spec.plan(request.verified(heads).with_constants(), gpus)


def _request(
    *,
    model: nn.Module,
    data: PairedDataset,
    metric: Any,
    method: str,
    steps: int,
    quadrature: str,
    heads: Heads,
    ablation: str | Constants,
    ablation_data: PairedDataset | None,
    batch_size: int | None,
    reuse_prefix: bool,
    memory: int | str | None,
    compat: str | None,
    rules: str | None,
    keep: str | Collection[str] | None,
    edges: Circuit | Tensor | None = None,
) -> AttributionRequest:
    """What is asked, checked; raises InputError with what is wrong."""
    steps = check_method(method, steps, quadrature, ablation, keep, rules, edges is not None)
    one_of("heads", heads, ("kv", "query"))
    if compat is not None and not (isinstance(compat, str) and compat == "eap-ig"):
        raise expected("compat", "None or 'eap-ig'", shown(compat))
    spec = METHODS[method]
    reused = flag("reuse_prefix", reuse_prefix) and spec.reuses
    common = prepare(model, data, metric, ablation, batch_size, ablation_data, reused, memory, spec.measures)
    if data.alone and spec.between_prompts(steps, quadrature):
        names = (name for name, each in METHODS.items() if not each.between_prompts(steps, quadrature))
        wanted = f"one of {', '.join(map(repr, names))}, as the data have no corrupted prompts"
        raise expected("method", wanted, repr(method))
    if compat == "eap-ig":
        common = replace(common, arch=common.arch.before_post_norms())
    kept = to_keep(keep, spec)
    for name in sorted(kept & BY_SPAN):
        if data.spans is None:
            raise expected("keep", f"data with spans (docs/data.md) for {name!r}", f"{data.name!r} without")
        common.check_one_stream(f"keep={name!r}")
    if "within-heads" in kept and any(layer.keys is not None for layer in common.arch.layers):
        wanted = "one whose heads attend to keys and values of their own layer, for keep='within-heads'"
        raise expected("model", wanted, f"{type(model).__name__}, whose heads share an earlier layer's")
    if compat is not None:
        common.check_one_stream("compat=")
    graph = common.arch.graph(heads)
    return AttributionRequest(
        **{field.name: getattr(common, field.name) for field in fields(common)},
        graph=graph,
        method=spec,
        path=spec.path(steps, quadrature) if isinstance(spec, GradientMethod) else [],
        compat=compat,
        rules=None if rules is None else RULES[rules],
        keep=kept,
        edges=edges_to_score(graph, edges),
    )


def check_method(
    method: str,
    steps: object,
    quadrature: str,
    ablation: str | Constants,
    keep: str | Collection[str] | None,
    rules: str | None,
    only: bool = False,
    planned: bool = False,
) -> int:
    """The number of steps; refuses what no model and no data would make right.

    Args:
        only: whether only some edges are to be scored.
        planned: whether only a plan is asked for.
    """
    one_of("method", method, METHODS)
    one_of("quadrature", quadrature, QUADRATURES)
    spec = METHODS[method]
    if planned and not spec.planned:
        names = (name for name, each in METHODS.items() if each.planned)
        raise expected("method", f"one whose memory is planned ({', '.join(map(repr, names))})", repr(method))
    if not isinstance(ablation, Constants):
        one_of("ablation", ablation, ABLATIONS)
    ablated = ablation_of(ablation)
    if ablated.learned:
        raise expected("ablation", "constants from eap.optimal_constants, learned for a circuit", repr(ablation))
    if not ablated.patches and not spec.ablated:
        raise expected("ablation", f"'patching' for method {method!r}", repr(ablation))
    if rules is not None:
        one_of("rules", rules, RULES)
        if not spec.backward:
            raise expected("rules", f"None, as {method!r} has no backward pass", repr(rules))
    to_keep(keep, spec)
    if only and not spec.selective:
        raise expected("edges", 'None, except for method "exact"', f"some for {method!r}")
    return whole("steps", steps, 1, _MOST_STEPS)
