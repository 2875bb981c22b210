"""Metrics: what a prompt pair's answer is worth, from the logits at the scored position."""

from .functions import (
    DIFFERENTIABLE,
    METRICS,
    OF_ANSWERS,
    Metric,
    MetricBatch,
    check_metric_values,
    get_metric,
    js_divergence,
    kl_divergence,
    logit_diff,
    prob_diff,
    rank,
    top_k_accuracy,
)

__all__ = [
    "DIFFERENTIABLE",
    "METRICS",
    "OF_ANSWERS",
    "Metric",
    "MetricBatch",
    "check_metric_values",
    "get_metric",
    "js_divergence",
    "kl_divergence",
    "logit_diff",
    "prob_diff",
    "rank",
    "top_k_accuracy",
]
