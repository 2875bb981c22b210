"""Metrics against hand-written arithmetic, and what a metric must not return."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eap_circuits.errors import InputError
from eap_circuits.metrics import (
    METRICS,
    MetricBatch,
    check_metric_values,
    get_metric,
    kl_divergence,
    logit_diff,
    prob_diff,
)


def batch_of(answers: Tensor, clean: Tensor | None = None, index: list[int] | None = None) -> MetricBatch:
    n = len(answers)
    logits = torch.zeros(n, 5) if clean is None else clean
    return MetricBatch(answers, logits, torch.zeros_like(logits), torch.ones(n).long(), torch.tensor(index or range(n)))


LOGITS = torch.tensor([[1.0, 2.0, 4.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0, 3.0]])
PAIRS = torch.tensor([[2, 0], [4, 1]])
SETS = torch.tensor([[[2, 1], [0, -1]], [[4, -1], [1, 2]]])


def test_logit_diff_of_pairs() -> None:
    assert logit_diff(LOGITS, batch_of(PAIRS)).tolist() == [3.0, 3.0]


def test_logit_diff_of_sets_is_a_difference_of_logsumexp() -> None:
    wanted = [math.log(math.exp(4) + math.exp(2)) - 1, 3 - math.log(2)]
    assert logit_diff(LOGITS, batch_of(SETS)).tolist() == pytest.approx(wanted, abs=1e-6)


def test_prob_diff_sums_probabilities() -> None:
    p = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in LOGITS.tolist()]
    wanted = [p[0][2] + p[0][1] - p[0][0], p[1][4] - p[1][1] - p[1][2]]
    assert prob_diff(LOGITS, batch_of(SETS)).tolist() == pytest.approx(wanted, abs=1e-6)
    wanted = [p[0][2] - p[0][0], p[1][4] - p[1][1]]
    assert prob_diff(LOGITS, batch_of(PAIRS)).tolist() == pytest.approx(wanted, abs=1e-6)


def test_kl_divergence_is_minus_the_sum_over_the_vocabulary() -> None:
    clean = torch.tensor([[0.3, -2.0, 1.0, 0.0, 0.7], [1.0, 1.0, 1.0, 1.0, 1.0]])
    p, q = (
        [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits.tolist()] for logits in (clean, LOGITS)
    )
    wanted = [-sum(a * math.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    assert kl_divergence(LOGITS, batch_of(PAIRS, clean)).tolist() == pytest.approx(wanted, abs=1e-6)


def test_kl_divergence_of_the_clean_run_is_zero_with_zero_gradient() -> None:
    logits = (LOGITS * 100).requires_grad_()
    values = kl_divergence(logits, batch_of(PAIRS, logits.detach()))
    values.sum().backward()
    assert values.tolist() == [0.0, 0.0]
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_kl_divergence_ignores_tokens_that_both_runs_exclude() -> None:
    narrow, clean = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    excluded = torch.full((1, 2), -torch.inf)
    wide = torch.cat([narrow, excluded], 1).requires_grad_()
    values = kl_divergence(wide, batch_of(PAIRS[:1], torch.cat([clean, excluded], 1)))
    values.sum().backward()
    assert values.item() == pytest.approx(kl_divergence(narrow, batch_of(PAIRS[:1], clean)).item())
    assert wide.grad is not None
    assert wide.grad.isfinite().all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.floats(-500, 500), st.floats(0.1, 200))
def test_metrics_do_not_depend_on_a_common_shift_and_stay_in_range(seed: int, shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, clean = (torch.randn(2, 5, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    batch = batch_of(SETS, clean)
    for metric in METRICS.values():
        assert torch.allclose(metric(logits, batch), metric(logits + shift, batch), atol=1e-9, rtol=1e-9)
    assert (prob_diff(logits, batch).abs() <= 1 + 1e-12).all()
    assert (kl_divergence(logits, batch) <= 1e-12).all()


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("answers", [PAIRS, SETS], ids=["pairs", "sets"])
def test_gradients_agree_with_finite_differences(name: str, answers: Tensor) -> None:
    clean = LOGITS.double().flip(1)
    logits = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: METRICS[name](x, batch_of(answers, clean)), logits)


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)  # every value is exact in every dtype
    clean = LOGITS.flip(1).to(dtype)
    values = METRICS[name](logits, batch_of(SETS, clean))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert values.tolist() == pytest.approx(
        METRICS[name](LOGITS.double(), batch_of(SETS, LOGITS.flip(1).double())).tolist(), abs=1e-6
    )


def test_get_metric_by_name_and_callable() -> None:
    def mine(logits: Tensor, batch: MetricBatch) -> Tensor:
        return logits[:, 0]

    assert get_metric("logit_diff") is logit_diff
    assert get_metric(mine) is mine


@pytest.mark.parametrize("wrong", ["accuracy", 3, None])
def test_get_metric_refuses(wrong: object) -> None:
    with pytest.raises(InputError, match=r"^metric: expected .*\.$"):
        get_metric(wrong)  # type: ignore[arg-type]


def test_good_values_pass() -> None:
    logits = LOGITS.clone().requires_grad_()
    check_metric_values(logit_diff(logits, batch_of(PAIRS)), batch_of(PAIRS), logits)
    with torch.no_grad():
        check_metric_values(logit_diff(logits, batch_of(PAIRS)), batch_of(PAIRS), logits)
    check_metric_values(torch.zeros(2), batch_of(PAIRS))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (1.5, "float"),
        (torch.zeros(()), r"torch.float32 of shape \[\]"),
        (torch.zeros(2, 1), r"torch.float32 of shape \[2, 1\]"),
        (torch.zeros(3), r"torch.float32 of shape \[3\]"),
        (torch.zeros(2).long(), r"torch.int64 of shape \[2\]"),
        (torch.zeros(2).bool(), r"torch.bool of shape \[2\]"),
    ],
)
def test_values_of_the_wrong_kind(values: object, found: str) -> None:
    with pytest.raises(InputError, match=rf"^metric: expected .*shape \[2\].*found {found}\.$"):
        check_metric_values(values, batch_of(PAIRS))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_the_example_in_the_dataset(value: float) -> None:
    with pytest.raises(InputError, match=rf"^metric value of example 41: expected a finite number, found {value}\.$"):
        check_metric_values(torch.tensor([0.0, value]), batch_of(PAIRS, index=[40, 41]))


def test_values_cut_off_from_the_logits() -> None:
    logits = LOGITS.clone().requires_grad_()
    with pytest.raises(InputError, match="differentiably on the logits"):
        check_metric_values(logits.detach()[:, 0], batch_of(PAIRS), logits)
