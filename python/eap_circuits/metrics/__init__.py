"""Metrics: what a prompt pair's answer is worth, from the logits at the scored position."""

from .functions import (
    METRICS,
    Metric,
    MetricBatch,
    check_metric_values,
    get_metric,
    kl_divergence,
    logit_diff,
    prob_diff,
)

__all__ = [
    "METRICS",
    "Metric",
    "MetricBatch",
    "check_metric_values",
    "get_metric",
    "kl_divergence",
    "logit_diff",
    "prob_diff",
]
