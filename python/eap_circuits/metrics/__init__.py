"""Metrics: what a prompt pair's answer is worth, from the logits where it is scored."""

from .functions import (
    METRICS,
    POSITIONS,
    Metric,
    MetricBatch,
    MetricFunction,
    answer_logprobs,
    at_least_float32,
    check_finite,
    check_metric_values,
    get_metric,
    js_divergence,
    kl_divergence,
    logit_diff,
    of_answers,
    prob_diff,
    rank,
    top_k_accuracy,
)
from .spelling import misspelled

__all__ = [
    "METRICS",
    "POSITIONS",
    "Metric",
    "MetricBatch",
    "MetricFunction",
    "answer_logprobs",
    "at_least_float32",
    "check_finite",
    "check_metric_values",
    "get_metric",
    "js_divergence",
    "kl_divergence",
    "logit_diff",
    "misspelled",
    "of_answers",
    "prob_diff",
    "rank",
    "top_k_accuracy",
]
