"""All reads of a run, against autograd through a run written out with einsum, in float64."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch

import eap_kernels


class Plain:
    """What `MaskedReads` does, by einsum."""

    def __init__(self, mask):
        self.mask, self.written = mask, {}

    def write(self, sender, delta):
        self.written |= {sender + i: row for i, row in enumerate(delta.split(1, -3))}

    def read(self, base, receivers, senders, at):
        delta = torch.cat([self.written[u] for u in range(senders.start, senders.stop)], -3)
        delta = delta if at is None else delta[..., at, :]
        return base + torch.einsum("...uv,...und->...vnd", self.mask[..., senders, receivers], delta)


def run(mask, read, write):
    """A made-up run: three senders, each a function of what its receiver reads, then a last receiver at some tokens."""
    tokens, features = 5, 4
    generator = torch.Generator().manual_seed(0)
    base, first = torch.randn(2, tokens, features, generator=generator, dtype=torch.float64).requires_grad_()
    shape = [*mask.shape[:-2], 1, tokens, features]
    write(0, first.expand(shape))
    write(1, read(base, slice(0, 1), slice(0, 1), None).sin())
    # A read in two parts: what it reads of the first two senders is the base of what it reads of the third.
    y = read(base, slice(1, 3), slice(0, 2), None)
    write(2, y[..., :1, :, :].cos() * 2)
    rest = read(y[..., 1:, :, :], slice(2, 3), slice(2, 3), None)
    at = torch.tensor([1, 4])
    last = read(base[at], slice(3, 4), slice(0, 3), at)
    return (rest.exp().sum() + (last**3).sum()), (base, first)


@pytest.mark.parametrize("circuits", [None, 2])
def test_gradients_are_those_of_autograd(circuits):
    lead = [] if circuits is None else [circuits]
    mask = torch.rand(*lead, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, right = mask.clone().requires_grad_(), mask.clone().requires_grad_()

    reads = eap_kernels.MaskedReads(found, tokens=5, features=4)
    value, leaves = run(found, lambda base, v, u, at: reads.read(base, v, u, at), reads.write)
    slopes = torch.autograd.grad(value, [found, *leaves])

    plain = Plain(right)
    value_there, leaves = run(right, plain.read, plain.write)
    assert torch.allclose(value, value_there, rtol=1e-12)
    for one, two in zip(slopes, torch.autograd.grad(value_there, [right, *leaves]), strict=True):
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-12)


def drawn(seed, mask, read, write, leaves):
    """Any receivers read any senders that are there by then, at any tokens, again and again; two values of what they
    read."""
    draw = random.Random(seed)
    *lead, n_senders, n_receivers = mask.shape
    seen, written = [], 0
    for leaf in leaves:  # [4, D] each
        if written < n_senders and (not written or draw.random() < 0.3):
            write(written, (leaf * (1 + sum(y.sin().mean() for y in seen))).expand(*lead, 1, *leaf.shape))
            written += 1
            continue
        u, v = (slice(*sorted(draw.sample(range(most + 1), 2))) for most in (written, n_receivers))
        at = draw.choice([None, None, slice(1, 3), torch.tensor([2, 0]), torch.tensor([1, 1, 3]), leaf[:, 0] > 0])
        before = [y for y in seen if y.shape[-3:] == (v.stop - v.start, *leaf.shape)]
        base = draw.choice(before) if before and draw.random() < 0.5 else leaf
        seen.append(read(base if at is None else base[..., at, :], v, u, at))
    return [sum(y.sin().sum() for y in part) for part in (seen[::2], seen[1::2])]


@pytest.mark.parametrize("circuits", [None, 2])
@pytest.mark.parametrize("seed", range(12))
def test_any_reads_in_any_order_and_two_backward_passes(seed, circuits):
    lead = [] if circuits is None else [circuits]
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randn(*lead, 4, 5, generator=generator, dtype=torch.float64)
    given = torch.randn(12, 4, 3, generator=generator, dtype=torch.float64)
    slopes = []
    for kind in (lambda mask: eap_kernels.MaskedReads(mask, tokens=4, features=3), Plain):
        own, leaves = mask.clone().requires_grad_(), given.clone().requires_grad_()
        reads = kind(own)
        values = drawn(seed, own, reads.read, reads.write, leaves)
        # The second pass goes along other reads than the first.
        slopes.append([torch.autograd.grad(value, [leaves, own], retain_graph=True) for value in values])
    for found, right in zip(*slopes):
        for one, two in zip(found, right):
            assert torch.allclose(one, two, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("how", ["threads", "within"])
def test_backward_passes_side_by_side(how):
    """In threads that meet halfway, and one that begins and ends within the other."""
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, right = mask.clone().requires_grad_(), mask.clone().requires_grad_()
    barrier, within = threading.Barrier(2, timeout=20), []
    plain, reads, halfway = Plain(right), eap_kernels.MaskedReads(found, tokens=5, features=4), []

    def meet(gradient):
        if how == "threads":
            barrier.wait()
        elif not within:
            within.append(None)
            within[:] = [gradients(-1.0)]

    def read(base, v, u, at):
        halfway.append(reads.read(base, v, u, at))
        return halfway[-1]

    value, leaves = run(found, read, reads.write)
    halfway[1].register_hook(meet)

    def gradients(factor):
        return torch.autograd.grad(value, [found, *leaves], torch.tensor(factor).double(), retain_graph=True)

    if how == "threads":
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(gradients, (1.0, -1.0)))
    else:
        both = [gradients(1.0), *within]
    value, leaves = run(right, plain.read, plain.write)
    for sign, slopes in zip((1, -1), both, strict=True):
        for one, two in zip(slopes, torch.autograd.grad(value, [right, *leaves], retain_graph=True), strict=True):
            assert torch.allclose(one, two * sign, rtol=1e-10, atol=1e-12)


def test_a_write_that_was_interrupted_wrote_nothing(monkeypatch):
    reads = eap_kernels.MaskedReads(torch.ones(1, 1), 1, 2)
    interrupted = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(torch.autograd.function.FunctionCtx, "save_for_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reads.write(0, torch.ones(1, 1, 2))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="expected a read of senders that have been written"):
        reads.read(torch.zeros(1, 2), slice(0, 1), slice(0, 1))
    reads.write(0, torch.ones(1, 1, 2))


def test_second_order_gradients_are_refused():
    """Of a linear loss, too, whose own gradient has none: what depends on the saved mask would be left out."""
    mask = torch.rand(2, 1, requires_grad=True)
    reads = eap_kernels.MaskedReads(mask, tokens=1, features=3)
    reads.write(0, mask.sum() * torch.ones(2, 1, 3))
    y = reads.read(torch.zeros(1, 3), slice(0, 1), slice(0, 2))
    with pytest.raises(RuntimeError, match=r"^MaskedReads: expected a first-order backward, got create_graph=True"):
        torch.autograd.grad(y.sum(), mask, create_graph=True)


@pytest.mark.parametrize("what", ["mask", "mask without gradient", "tokens"])
def test_what_has_changed_has_no_gradient(what):
    mask, at = torch.rand(2, 2, requires_grad=what == "mask"), torch.tensor([0])
    reads = eap_kernels.MaskedReads(mask, tokens=1, features=3)
    reads.write(0, torch.ones(2, 1, 3, requires_grad=True))
    y = reads.read(torch.zeros(1, 3), slice(0, 2), slice(0, 2), at)
    with torch.no_grad():
        (at if what == "tokens" else mask).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"MaskedReads: expected a floating mask .*got torch\.bool of shape \[2, 3\]"):
        eap_kernels.MaskedReads(torch.ones(2, 3, dtype=torch.bool), 1, 2)
    reads = eap_kernels.MaskedReads(torch.ones(2, 3), 1, 2)
    for sender, shape in (
        (0, (3, 1, 2)),
        (2, (1, 1, 2)),
        (0, (1, 2, 2)),
        (0, (1, 2)),
        (0.0, (1, 1, 2)),
        ("0", (1, 1, 2)),
    ):
        with pytest.raises(ValueError, match="MaskedReads: expected contributions within"):
            reads.write(sender, torch.ones(shape))
    with pytest.raises(ValueError, match="expected a read of senders that have been written"):
        reads.read(torch.zeros(1, 2), slice(0, 1), slice(0, 1))
    reads.write(0, torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match="expected each sender to be written once"):
        reads.write(0, torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match=r"expected contributions in torch\.float32 on cpu, got torch\.float64"):
        reads.write(1, torch.ones(1, 1, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="MaskedReads: expected base as a tensor, got NoneType"):
        reads.read(None, slice(0, 1), slice(0, 1))
    # A list would index, but not in the backward pass.
    for tokens in ([0], 0, torch.tensor([[0]]), torch.tensor([0.0])):
        with pytest.raises(
            ValueError, match=r"MaskedReads: expected tokens as a slice or a tensor \[n\] of numbers or"
        ):
            reads.read(torch.zeros(1, 2), slice(0, 1), slice(0, 1), tokens)
    for size in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"expected tokens to be a whole number of at least 0, got {size}"):
            eap_kernels.MaskedReads(torch.ones(2, 3), size, 2)
    with pytest.raises(ValueError, match="MaskedReads: expected contributions as a tensor, got int"):
        reads.write(1, 3)
    whole = slice(0, 1)
    for wrong in (slice(None), slice(0, 4), slice(-1, 1), slice(1, 0), slice(0, 1, 2), 1):
        with pytest.raises(ValueError, match="expected receivers as a slice with a start and a stop from 0 to 3, got"):
            reads.read(torch.zeros(1, 2), wrong, whole)
        with pytest.raises(ValueError, match="expected senders as a slice with a start and a stop from 0 to 2, got"):
            reads.read(torch.zeros(1, 2), whole, wrong)
