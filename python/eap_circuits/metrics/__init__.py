"""Metrics: what a prompt pair's answer is worth, from the logits at the scored position."""

from .functions import (
    METRICS,
    Metric,
    MetricBatch,
    MetricFunction,
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
    "METRICS",
    "Metric",
    "MetricBatch",
    "MetricFunction",
    "check_metric_values",
    "get_metric",
    "js_divergence",
    "kl_divergence",
    "logit_diff",
    "prob_diff",
    "rank",
    "top_k_accuracy",
]
