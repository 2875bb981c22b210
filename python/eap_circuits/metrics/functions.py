"""Metrics over the logits at the scored position: `(logits [E, V], batch) -> [E]`, higher is better.

Where data say which positions are scored, or answers have several tokens, logits are [E, P, V]. What a metric makes of
them is one of `LOOKS_AT`.

The mean over examples is reported; the negative sum is differentiated. Half precision is computed in float32.
Divergences and ranks carry a minus, so that higher is better for them too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import expected, function, one_of, whole


@dataclass(frozen=True, eq=False)
class MetricBatch:
    """What a metric may look at besides the logits of the run.

    Args:
        answers: int64 [E, 2] (good, bad), or [E, 2, A] sets of token ids padded with -1.
        clean_logits: [E, V] the whole model's logits on the clean prompts, without gradient.
        corrupted_logits: [E, V] the same on the corrupted prompts.
        lengths: int64 [E] tokens of each prompt; `lengths - 1` is the scored position.
        index: int64 [E] position of each example in the dataset.
        mask: bool [E, P], which positions of logits [E, P, V] are scored, not padding; None if logits are [E, V].
        targets: int64 [E, P], the token that should follow each, or -1.
        weights: float64 [E, P], how much each counts; 0 in padding.
        answer: int64 [E, P], of answers of several tokens [E, 2, A, L], to which of an example's 2·A it belongs.
    """

    answers: Tensor
    clean_logits: Tensor
    corrupted_logits: Tensor
    lengths: Tensor
    index: Tensor
    mask: Tensor | None = None
    targets: Tensor | None = None
    weights: Tensor | None = None
    answer: Tensor | None = None

    def copy(self) -> MetricBatch:
        """The same in memory of its own."""
        return replace(self, **{name: x.clone() for name, x in vars(self).items() if x is not None})


POSITIONS = ("mask", "targets", "weights", "answer")
MetricFunction = Callable[[Tensor, MetricBatch], Tensor]


# What a metric looks at, and what it makes of several positions.
LOOKS_AT = {
    "answers": "answers of one token, the same at each scored position; the mean over these by their weights",
    "runs": "both runs at each scored position; the mean over these by their weights",
    "targets": "the tokens that should follow scored positions; the mean over these by their weights",
    "sequences": "whole answers of any number of tokens",
    "anything": "what it likes: it gets the logits as they are",
}


@dataclass(frozen=True)
class Metric:
    """A metric: called as its function is.

    Args:
        name: what it is called by.
        description: one line.
        function: (logits [E, V], batch) -> [E], higher is better.
        looks_at: one of `LOOKS_AT`.
        differentiable: edges can be scored by it; the others are steps of the logits and only measure.
        of_answers: looks only at the answers' logits, so that no others are computed for it.
    """

    name: str
    description: str
    function: MetricFunction
    looks_at: str = "anything"
    differentiable: bool = True
    of_answers: bool = False

    def __call__(self, logits: Tensor, batch: MetricBatch) -> Tensor:
        if METRICS.get(self.name) is self:
            return self._of(logits, batch)
        # The user's own may change in place what it is given, and the grad mode, which is put back.
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return self._of(logits.clone(), batch.copy())

    def _of(self, logits: Tensor, batch: MetricBatch) -> Tensor:
        if logits.dim() == 3 and self.looks_at in ("answers", "runs"):
            return _mean_over_positions(self.function, logits, batch)
        return self.function(logits, batch)

    @property
    def __name__(self) -> str:
        return self.name


def logit_diff(logits: Tensor, batch: MetricBatch) -> Tensor:
    """Good logit less bad logit; of sets, logsumexp(good) - logsumexp(bad). [E, V] -> [E], in logits."""
    picked = of_answers(at_least_float32(logits), batch.answers, -torch.inf)
    # The logsumexp of a single logit is that logit.
    good, bad = (picked[..., 0] if picked.shape[2] == 1 else picked.logsumexp(2)).unbind(1)
    return good - bad


def prob_diff(logits: Tensor, batch: MetricBatch) -> Tensor:
    """Probability of the good answers less that of the bad ones. [E, V] -> [E], from -1 to 1."""
    probabilities = at_least_float32(logits).softmax(-1)
    good, bad = of_answers(probabilities, batch.answers, 0.0).sum(2).unbind(1)
    return good - bad


def kl_divergence(logits: Tensor, batch: MetricBatch) -> Tensor:
    """-KL(clean || run) of the next token: minus how far the run is from the whole model on the clean prompt.

    [E, V] -> [E], in nats, at most 0. Its gradient vanishes where the run is the clean run itself.
    """
    run = at_least_float32(logits).log_softmax(-1)
    clean = at_least_float32(batch.clean_logits.to(logits.device)).log_softmax(-1)
    weight = clean.exp()
    # A token that the clean run excludes (logit -inf) adds nothing, and -inf - -inf must not reach the sum.
    return -(weight * (clean - run).masked_fill(weight == 0, 0)).sum(-1)


def js_divergence(logits: Tensor, batch: MetricBatch) -> Tensor:
    """-JS(clean, run) = -(KL(clean || m) + KL(run || m)) / 2 with m = (clean + run) / 2, of the next token.

    [E, V] -> [E], in nats, from -log 2 to 0; symmetric and bounded, unlike `kl_divergence` (Lin 1991, IEEE Trans.
    Inf. Theory 37). Its gradient vanishes where the run is the clean run itself.
    """
    run = at_least_float32(logits).log_softmax(-1)
    clean = at_least_float32(batch.clean_logits.to(logits.device)).log_softmax(-1).to(run.dtype)
    mean = ((run.exp() + clean.exp()) / 2).clamp(min=torch.finfo(run.dtype).tiny).log()
    # As above: what a run excludes has weight 0, and its logarithm must not reach the sum.
    terms = [side.exp() * (side - mean).masked_fill(side.isneginf(), 0) for side in (clean, run)]
    return -(terms[0] + terms[1]).sum(-1) / 2


def next_token_loss(logits: Tensor, batch: MetricBatch) -> Tensor:
    """Minus the loss of the tokens that should follow: their mean log probability. [E, P, V] -> [E], in nats."""
    assert batch.targets is not None and batch.weights is not None
    return _mean(_log_probabilities(logits, batch.targets), batch.weights)


def sequence_logprob(logits: Tensor, batch: MetricBatch) -> Tensor:
    """log P(good answer | prompt), of sets logsumexp. [E, P, V] -> [E], or [E, V] if answers are tokens; in nats."""
    return answer_logprobs(logits, batch)[:, 0].logsumexp(1)


def sequence_logprob_diff(logits: Tensor, batch: MetricBatch) -> Tensor:
    """The same of the good answer less that of the bad one."""
    good, bad = answer_logprobs(logits, batch).logsumexp(2).unbind(1)
    return good - bad


def token_logprob(logits: Tensor, batch: MetricBatch) -> Tensor:
    """As `sequence_logprob`, of each answer the mean over its tokens."""
    return answer_logprobs(logits, batch, mean=True)[:, 0].logsumexp(1)


def token_logprob_diff(logits: Tensor, batch: MetricBatch) -> Tensor:
    """As `sequence_logprob_diff`, of each answer the mean over its tokens."""
    good, bad = answer_logprobs(logits, batch, mean=True).logsumexp(2).unbind(1)
    return good - bad


def answer_logprobs(logits: Tensor, batch: MetricBatch, mean: bool = False) -> Tensor:
    """The log probability of each answer after its prompt, [E, 2, A]; -inf where there is none.

    Args:
        logits: [E, P, V] at the positions that come before the answers' tokens, or [E, V] if answers are tokens.
        mean: the mean over an answer's tokens.
    """
    if batch.answers.dim() < 4:
        logs = at_least_float32(logits).log_softmax(-1)
        if batch.weights is not None:  # of the mean probability over positions
            shares = batch.weights / batch.weights.sum(1, keepdim=True)
            logs = (logs + shares.log()[..., None].to(logs)).logsumexp(1)
        return of_answers(logs, batch.answers, -torch.inf)
    assert batch.targets is not None and batch.mask is not None and batch.answer is not None
    own = batch.answers.to(logits.device).flatten(1, 2)
    found = _log_probabilities(logits, batch.targets).masked_fill(~batch.mask.to(logits.device), 0)
    sums = found.new_zeros(own.shape[:2]).scatter_add(1, batch.answer.to(logits.device), found)
    size = (own >= 0).sum(2)
    if mean:
        sums = sums / size.clamp(min=1)
    return sums.masked_fill(size == 0, -torch.inf).view(len(logits), 2, -1)


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Of the targets [E, P], after a softmax of logits [E, P, V]."""
    picked = targets.to(logits.device).clamp(min=0)[..., None]
    return at_least_float32(logits).log_softmax(-1).gather(2, picked)[..., 0]


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Σ_p w_p values_p / Σ_p w_p, [E, P] -> [E]."""
    weights = weights.to(values.device, values.dtype)
    return (values * weights).sum(1) / weights.sum(1)


def _mean_over_positions(function: MetricFunction, logits: Tensor, batch: MetricBatch) -> Tensor:
    """The mean of a metric of one position over several, each taken as an example."""
    assert batch.weights is not None
    each = logits.shape[1]

    def one(x: Tensor) -> Tensor:
        return x.repeat_interleave(each, 0)

    rows = MetricBatch(
        one(batch.answers),
        batch.clean_logits.flatten(0, 1),
        batch.corrupted_logits.flatten(0, 1),
        one(batch.lengths),
        one(batch.index),
    )
    return _mean(function(logits.flatten(0, 1), rows).view(-1, each), batch.weights)


def rank(logits: Tensor, batch: MetricBatch) -> Tensor:
    """Minus the number of wrong tokens ahead of the best good answer. [E, V] -> [E], whole numbers, at most 0.

    Wrong is every token that is no good answer; a tie counts as ahead, so that a run without a preference is not
    right. Not differentiable: for evaluation only.
    """
    good = batch.answers.to(logits.device).reshape(len(logits), 2, -1)[:, 0]
    good = torch.where(good < 0, good.amax(1, keepdim=True), good)
    best = logits.gather(1, good).amax(1, keepdim=True)
    ahead = (logits >= best).scatter(1, good, False).sum(1)
    values = -ahead.to(at_least_float32(logits).dtype)
    # Comparisons with not-a-number are false and would make it a perfect score.
    return values.masked_fill(logits.isnan().any(1), torch.nan)


def top_k_accuracy(k: int) -> MetricFunction:
    """The function that is 1 where a good answer is among the k highest logits, else 0; see `rank` for ties.

    Not differentiable: for evaluation only. Raises `InputError` where k is no positive whole number.
    """
    k = whole("k", k, 1)

    def accuracy(logits: Tensor, batch: MetricBatch) -> Tensor:
        values = rank(logits, batch)
        return (values > -k).to(values.dtype).masked_fill(values.isnan(), torch.nan)

    accuracy.__name__ = f"top{k}_accuracy"
    accuracy.looks_at = "answers"  # type: ignore[attr-defined]
    return accuracy


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("logit_diff", "good logit less bad logit; of sets, their logsumexp", logit_diff, "answers", True, True),
        Metric("prob_diff", "probability of the good answers less that of the bad ones", prob_diff, "answers"),
        Metric(
            "kl_divergence", "minus KL(whole model on the clean prompt || run) of the next token", kl_divergence, "runs"
        ),
        Metric(
            "js_divergence",
            "minus the Jensen–Shannon divergence of the same two, symmetric and bounded",
            js_divergence,
            "runs",
        ),
        Metric("next_token_loss", "minus the loss of the tokens after scored positions", next_token_loss, "targets"),
        Metric(
            "sequence_logprob",
            "log probability of the good answer, of any number of tokens; of sets, their logsumexp",
            sequence_logprob,
            "sequences",
        ),
        Metric("sequence_logprob_diff", "the same less that of the bad answer", sequence_logprob_diff, "sequences"),
        Metric("token_logprob", "sequence_logprob of each answer's mean over its tokens", token_logprob, "sequences"),
        Metric("token_logprob_diff", "the same less that of the bad answer", token_logprob_diff, "sequences"),
        Metric(
            "top1_accuracy", "1 where a good answer is ahead of all wrong tokens", top_k_accuracy(1), "answers", False
        ),
        Metric("top5_accuracy", "1 where fewer than five wrong tokens are ahead", top_k_accuracy(5), "answers", False),
        Metric("rank", "minus the number of wrong tokens ahead of the best good answer", rank, "answers", False),
    )
}


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# What the published package's metrics take: logits and clean logits [E, T, V], lengths [E], answers.
_PUBLISHED = ("logits[:, None]", "batch.clean_logits[:, None]", "torch.ones_like(batch.lengths)", "batch.answers")


def get_metric(metric: str | MetricFunction) -> Metric:
    """The metric of that name or that computes this function. Raises `InputError` otherwise."""
    if isinstance(metric, str):
        one_of("metric", metric, METRICS)
        return METRICS[metric]
    _check_arguments(metric)
    function("metric", metric, "a name or a function (logits, batch) -> values")
    known = (each for each in METRICS.values() if metric in (each, each.function))
    own = getattr(metric, "__name__", type(metric).__name__), "of the user's own"
    return next(known, Metric(*own, metric, getattr(metric, "looks_at", "anything")))


def _check_arguments(metric: MetricFunction) -> None:
    """Refuse a metric that cannot be called with (logits, batch), such as those of the published EAP-IG package."""
    try:
        signature = inspect.signature(metric)
    except (ValueError, TypeError):
        return  # a callable that does not tell
    try:
        signature.bind(None, None)
    except TypeError:
        wanted, found = "a callable of (logits [E, V], batch), higher is better", f"one of {signature}"
        needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind in _POSITIONAL]
        if len(needed) == len(_PUBLISHED):
            mean = ", mean=False" if "mean" in signature.parameters else ""
            wanted += f" (EAP-IG's is called by lambda logits, batch: -metric({', '.join(_PUBLISHED)}{mean}), without"
            wanted += " the minus where it is no loss)"
        raise expected("metric", wanted, found) from None


def check_metric_values(values: Tensor, batch: MetricBatch, logits: Tensor | None = None) -> None:
    """Refuse what a metric must not return.

    Args:
        values: what the metric returned; must be a floating tensor [E].
        batch: what the metric was given; `batch.index` names the examples.
        logits: [E, V] what the metric was given; where they require grad, so must the values.

    Raises:
        InputError: not such a tensor, or cut off from the logits' gradient.
    """
    shape = [len(batch.index)]
    if not isinstance(values, Tensor):
        raise expected("metric", f"a tensor of shape {shape}, one value per example", type(values).__name__)
    if not values.is_floating_point() or list(values.shape) != shape:
        raise expected(
            "metric",
            f"a floating-point tensor of shape {shape}, one value per example",
            f"{values.dtype} of shape {list(values.shape)}" + ("" if values.dim() else ", such as a mean"),
        )
    # A view made under `no_grad` says that it requires grad, and passes none on.
    if torch.is_grad_enabled() and logits is not None and logits.requires_grad and values.grad_fn is None:
        raise expected(
            "metric",
            "values that depend differentiably on the logits",
            "values without a gradient (a detached tensor, argmax, or torch.no_grad in the metric)",
        )


def check_finite(values: Tensor, index: Tensor, sums: Tensor, dtype: torch.dtype) -> None:
    """Refuse values [E] that are not finite; all tensors are on the CPU.

    Args:
        index: int64 [E], which names the examples.
        sums: [E], sums of each example's logits, which are finite if these are; `dtype` is the logits'.
    """
    bad = ~values.isfinite()
    if bad.any():
        first = int(bad.nonzero()[0])
        found = str(values[first].item())
        if not sums[first].isfinite():
            cure = "; load the model in bfloat16 or float32" if dtype == torch.float16 else ""
            found += f", of logits that are not finite{cure}"
        raise expected(f"metric value of example {int(index[first])}", "a finite number", found)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def of_answers(values: Tensor, answers: Tensor, padding: float) -> Tensor:
    """values [E, V] at the answers' ids: [E, 2, A], `padding` where a set is shorter than A."""
    answers = answers.to(values.device)
    sets = answers if answers.dim() == 3 else answers[..., None]
    picked = values.gather(1, sets.clamp(min=0).flatten(1)).view(sets.shape)
    return picked.masked_fill(sets < 0, padding)
