"""The distributions of gates, against their closed forms and the mean over all hard masks."""

import itertools
import math

import pytest
import torch

from eap_circuits.learning import GATES

LOG_ODDS = torch.tensor([-2.5, -0.3, 0.0, 1.2], dtype=torch.float64)
EVENLY = (torch.arange(100_000, dtype=torch.float64)[:, None] + 0.5) / 100_000  # numbers from 0 to 1


def cut_and_kept(name):
    """The probabilities of 0 and of 1."""
    if name == "hard-concrete":  # stretched sigmoids reach 0 and 1 at log-odds of ∓log 11; the noise's scale is 0.75
        return [((sign * LOG_ODDS - math.log(11)) / 0.75).sigmoid() for sign in (-1, 1)]
    kept = LOG_ODDS.sigmoid()
    window = kept * (1 - kept)
    return [1 - kept - window / 2, kept - window / 2]


@pytest.mark.parametrize("name", GATES)
def test_gates_are_cut_and_kept_as_often_as_they_should_be(name):
    gates = GATES[name].draw(LOG_ODDS, EVENLY)
    for value, share in zip((0, 1), cut_and_kept(name), strict=True):
        assert ((gates == value).double().mean(0) - share).abs().max() <= 1 / len(EVENLY)


def test_between_uniform_gates_are_uniform_and_their_mean_is_the_edge_s_probability():
    gates = GATES["uniform"].draw(LOG_ODDS, EVENLY)
    assert (gates.mean(0) - LOG_ODDS.sigmoid()).abs().max() <= 1 / len(EVENLY)
    for column in gates.T:
        between = column[(column > 0) & (column < 1)].sort().values
        evenly = (torch.arange(len(between)) + 0.5) / len(between)
        assert (between - evenly).abs().max() <= 1 / len(between)


def test_the_mean_slope_of_uniform_gates_is_that_of_the_mean_over_hard_masks():
    """Of a function with products of all gates and a curve along each, in the edges' probabilities."""
    weight = torch.tensor([0.7, -1.3, 2.0, 0.4], dtype=torch.float64)

    def loss(gates):
        return gates.prod(-1) + (gates * gates.roll(1, -1) * weight).sum(-1) + (weight * gates).sin().sum(-1)

    log_odds = LOG_ODDS.clone().requires_grad_()
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
    kept = log_odds.sigmoid()
    chances = (masks * kept + (1 - masks) * (1 - kept)).prod(-1)
    (right,) = torch.autograd.grad((chances * loss(masks)).sum(), log_odds)

    uniform = torch.rand(400_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    every = log_odds.expand(len(uniform), -1).clone().detach().requires_grad_()
    (slopes,) = torch.autograd.grad(loss(GATES["uniform"].draw(every, uniform)).sum(), every)
    assert ((slopes.mean(0) - right).abs() < 5 * slopes.std(0) / len(uniform) ** 0.5).all()


@pytest.mark.parametrize("name", GATES)
def test_edges_far_from_the_threshold_are_kept_or_cut_without_a_slope(name):
    log_odds = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    for uniform in (1e-6, 0.5, 1 - 1e-6):
        gates = GATES[name].draw(log_odds, torch.full_like(log_odds, uniform))
        assert gates.tolist() == [0, 0, 1, 1]
        assert not torch.autograd.grad(gates.sum(), log_odds)[0].any()
