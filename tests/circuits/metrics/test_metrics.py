"""Metrics against hand-written arithmetic, and what a metric must not return."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import eap_circuits as eap
from eap_circuits.errors import InputError
from eap_circuits.metrics import (
    METRICS,
    MetricBatch,
    check_finite,
    check_metric_values,
    get_metric,
    js_divergence,
    kl_divergence,
    logit_diff,
    prob_diff,
    rank,
    top_k_accuracy,
)


def batch_of(answers: Tensor, clean: Tensor | None = None, index: list[int] | None = None) -> MetricBatch:
    n = len(answers)
    logits = torch.zeros(n, 5) if clean is None else clean
    return MetricBatch(answers, logits, torch.zeros_like(logits), torch.ones(n).long(), torch.tensor(index or range(n)))


LOGITS = torch.tensor([[1.0, 2.0, 4.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0, 3.0]])
PAIRS = torch.tensor([[2, 0], [4, 1]])
SETS = torch.tensor([[[2, 1], [0, -1]], [[4, -1], [1, 2]]])


# Those of one position.
SINGLE = {name: metric for name, metric in METRICS.items() if metric.looks_at != "targets"}


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


def test_js_divergence_is_the_mean_distance_from_the_mixture() -> None:
    clean = torch.tensor([[0.3, -2.0, 1.0, 0.0, 0.7], [1.0, 1.0, 1.0, 1.0, 1.0]])
    p, q = (
        [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits.tolist()] for logits in (clean, LOGITS)
    )
    wanted = []
    for rows in zip(p, q, strict=True):
        m = [(a + b) / 2 for a, b in zip(*rows, strict=True)]
        wanted.append(-sum(a * math.log(a / c) for row in rows for a, c in zip(row, m, strict=True)) / 2)
    found = js_divergence(LOGITS, batch_of(PAIRS, clean))
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    swapped = js_divergence(clean, batch_of(PAIRS, LOGITS))
    assert swapped.tolist() == pytest.approx(wanted, abs=1e-6)


def test_js_divergence_of_disjoint_runs_is_minus_log_2() -> None:
    run, clean = torch.tensor([[500.0, 0.0, 0.0]]), torch.tensor([[0.0, 500.0, 0.0]])
    assert js_divergence(run, batch_of(PAIRS[:1], clean)).item() == pytest.approx(-math.log(2))


def test_rank_counts_the_wrong_tokens_ahead() -> None:
    # Row 0: 4.0 is best; row 1: 3.0 is best, the four zeros tie.
    assert rank(LOGITS, batch_of(torch.tensor([[2, 0], [4, 1]]))).tolist() == [0, 0]
    assert rank(LOGITS, batch_of(torch.tensor([[4, 0], [1, 0]]))).tolist() == [-3, -4]
    # Of a set the best counts, and its own members are not ahead of it.
    sets = torch.tensor([[[0, 1], [4, -1]], [[0, 1], [4, -1]]])
    assert rank(LOGITS, batch_of(sets)).tolist() == [-1, -3]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-3, 3), min_size=4, max_size=9), st.integers(1, 9), st.data())
def test_top_k_accuracy_is_membership_in_the_sorted_logits(values: list[int], k: int, data: st.DataObject) -> None:
    ids = data.draw(st.permutations(range(len(values))))
    n_good, n_bad = data.draw(st.integers(1, len(values) - 2)), 1
    answers = torch.full((1, 2, max(n_good, n_bad)), -1)
    answers[0, 0, :n_good] = torch.tensor(ids[:n_good])
    answers[0, 1, :n_bad] = torch.tensor(ids[n_good : n_good + n_bad])
    logits = torch.tensor([values]).double()
    # Sorted with good answers last among equals: the worst place that a tie allows.
    good = set(ids[:n_good])
    best = max(good, key=lambda i: values[i])
    wrong = sorted((i for i in range(len(values)) if i not in good), key=lambda i: -values[i])
    place = sum(values[i] >= values[best] for i in wrong)
    batch = batch_of(answers, torch.zeros(1, len(values)))
    assert rank(logits, batch).item() == -place
    assert top_k_accuracy(k)(logits, batch).item() == float(best in [*wrong[:place], best][:k])


@pytest.mark.parametrize("name", ["top1_accuracy", "top5_accuracy", "rank"])
def test_a_run_that_is_not_a_number_is_not_right(name: str) -> None:
    logits = LOGITS.clone()
    logits[1, 4] = torch.nan
    assert METRICS[name](logits, batch_of(PAIRS)).isnan().tolist() == [False, True]


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2"])
def test_top_k_of_no_positive_number(k: object) -> None:
    with pytest.raises(InputError, match=r"^k: expected a whole number of at least 1"):
        top_k_accuracy(k)  # type: ignore[arg-type]


def test_what_cannot_be_differentiated_is_refused_for_scoring() -> None:
    logits = LOGITS.clone().requires_grad_()
    for metric in SINGLE.values():
        values = metric(logits, batch_of(PAIRS))
        assert values.requires_grad == metric.differentiable
        if not values.requires_grad:
            with pytest.raises(InputError, match="differentiably"):
                check_metric_values(values, batch_of(PAIRS), logits)


@pytest.mark.parametrize("divergence", [kl_divergence, js_divergence])
def test_divergence_of_the_clean_run_is_zero_with_zero_gradient(divergence: Any) -> None:
    logits = (LOGITS * 100).requires_grad_()
    values = divergence(logits, batch_of(PAIRS, logits.detach()))
    values.sum().backward()
    assert values.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", [kl_divergence, js_divergence])
def test_a_divergence_ignores_tokens_that_both_runs_exclude(divergence: Any) -> None:
    narrow, clean = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    excluded = torch.full((1, 2), -torch.inf)
    wide = torch.cat([narrow, excluded], 1).requires_grad_()
    values = divergence(wide, batch_of(PAIRS[:1], torch.cat([clean, excluded], 1)))
    values.sum().backward()
    assert values.item() == pytest.approx(divergence(narrow, batch_of(PAIRS[:1], clean)).item())
    assert wide.grad is not None
    assert wide.grad.isfinite().all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.floats(-500, 500), st.floats(0.1, 200))
def test_metrics_do_not_depend_on_a_common_shift_and_stay_in_range(seed: int, shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, clean = (torch.randn(2, 5, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    batch = batch_of(SETS, clean)
    for metric in SINGLE.values():
        assert torch.allclose(metric(logits, batch), metric(logits + shift, batch), atol=1e-9, rtol=1e-9)
    assert (prob_diff(logits, batch).abs() <= 1 + 1e-12).all()
    assert (kl_divergence(logits, batch) <= 1e-12).all()
    js = js_divergence(logits, batch)
    assert (js <= 1e-12).all() and (js >= -math.log(2) - 1e-12).all()


@pytest.mark.parametrize("name", [m.name for m in SINGLE.values() if m.differentiable])
@pytest.mark.parametrize("answers", [PAIRS, SETS], ids=["pairs", "sets"])
def test_gradients_agree_with_finite_differences(name: str, answers: Tensor) -> None:
    clean = LOGITS.double().flip(1)
    logits = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: METRICS[name](x, batch_of(answers, clean)), logits)


@pytest.mark.parametrize("name", sorted(SINGLE))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)  # every value is exact in every dtype
    clean = LOGITS.flip(1).to(dtype)
    values = METRICS[name](logits, batch_of(SETS, clean))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert values.tolist() == pytest.approx(
        METRICS[name](LOGITS.double(), batch_of(SETS, LOGITS.flip(1).double())).tolist(), abs=1e-6
    )


# Of several positions: the second example has one fewer, whose padding must not matter.
WIDE = torch.stack([LOGITS, LOGITS.flip(1)], 1)  # [2, 2, 5]
MASK = torch.tensor([[True, True], [True, False]])
WEIGHTS = torch.tensor([[1.0, 3.0], [0.5, 0.0]]).double()
TARGETS = torch.tensor([[2, 0], [4, -1]])


def several(answers: Tensor, clean: Tensor | None = None) -> MetricBatch:
    where = {"mask": MASK, "targets": TARGETS, "weights": WEIGHTS, "answer": torch.tensor([[0, 0], [1, 0]])}
    logits = WIDE.flip(2) if clean is None else clean
    return MetricBatch(answers, logits, logits, torch.ones(2).long(), torch.arange(2), **where)


@pytest.mark.parametrize("name", [m.name for m in METRICS.values() if m.looks_at in ("answers", "runs")])
def test_a_metric_of_several_positions_is_its_mean_by_weights(name: str) -> None:
    batch = several(SETS)
    each = [METRICS[name](WIDE[:, p], batch_of(SETS, batch.clean_logits[:, p])) for p in range(2)]
    wanted = [(each[0][0] + 3 * each[1][0]) / 4, each[0][1]]
    assert METRICS[name](WIDE, batch).tolist() == pytest.approx([float(x) for x in wanted], abs=1e-6)


def test_next_token_loss_is_the_mean_log_probability_of_what_follows() -> None:
    p = WIDE.double().softmax(-1)
    wanted = [(math.log(p[0, 0, 2]) + 3 * math.log(p[0, 1, 0])) / 4, math.log(p[1, 0, 4])]
    assert METRICS["next_token_loss"](WIDE, several(PAIRS)).tolist() == pytest.approx(wanted, abs=1e-6)
    assert torch.autograd.gradcheck(
        lambda x: METRICS["next_token_loss"](x, several(PAIRS)), WIDE.double().requires_grad_()
    )


def test_the_page_runs(make_model: Any, make_pairs: Any) -> None:
    """docs/metrics.md, on a tiny model and random prompts."""
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found = {"eap": eap, "model": make_model("gpt2"), "data": make_pairs(n=3)}
    exec(code, found)
    assert found["scores"].info["metric"] == "margin"  # type: ignore[attr-defined]


def test_get_metric_by_name_and_callable() -> None:
    def mine(logits: Tensor, batch: MetricBatch) -> Tensor:
        return logits[:, 0]

    assert get_metric("logit_diff") is get_metric(logit_diff) is METRICS["logit_diff"]
    assert (get_metric(mine).function, get_metric(mine).name) == (mine, "mine")
    assert all((metric.name, metric.__name__) == (name, name) for name, metric in METRICS.items())


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
        (torch.zeros(()), r"torch.float32 of shape \[\], such as a mean"),
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
        check_finite(torch.tensor([0.0, value]), torch.tensor([40, 41]), torch.ones(2), torch.float16)
    for dtype, cure in ((torch.float16, "; load the model in bfloat16 or float32"), (torch.float32, "")):
        sums = torch.tensor([1.0, value])
        with pytest.raises(InputError, match=rf"found {value}, of logits that are not finite{cure}\.$"):
            check_finite(torch.tensor([0.0, value]), torch.tensor([40, 41]), sums, dtype)


def test_values_cut_off_from_the_logits() -> None:
    logits = LOGITS.clone().requires_grad_()
    with pytest.raises(InputError, match="differentiably on the logits"):
        check_metric_values(logits.detach()[:, 0], batch_of(PAIRS), logits)
    with torch.no_grad():
        view = logits[:, 0]
    assert view.requires_grad  # which is not so
    with pytest.raises(InputError, match="differentiably on the logits"):
        check_metric_values(view, batch_of(PAIRS), logits)
