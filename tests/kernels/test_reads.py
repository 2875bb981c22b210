"""All reads of a run, against autograd through a run written out with einsum, in float64."""

import pytest
import torch

import eap_kernels


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
    reach = torch.tensor([1, 2, 3, 3])
    mask = mask * (torch.arange(3)[:, None] < reach)
    found, right = mask.clone().requires_grad_(), mask.clone().requires_grad_()

    reads = eap_kernels.MaskedReads(found, tokens=5, features=4)
    value, leaves = run(found, lambda base, v, u, at: reads.read(base, v, u, at), reads.write)
    slopes = torch.autograd.grad(value, [found, *leaves])

    written = {}

    def read(base, receivers, senders, at):
        delta = torch.cat([written[u] for u in range(senders.start, senders.stop)], -3)
        delta = delta if at is None else delta[..., at, :]
        return base + torch.einsum("...uv,...und->...vnd", right[..., senders, receivers], delta)

    value_there, leaves = run(right, read, written.__setitem__)
    assert torch.allclose(value, value_there, rtol=1e-12)
    for one, two in zip(slopes, torch.autograd.grad(value_there, [right, *leaves]), strict=True):
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"MaskedReads: expected a floating mask .*got torch\.bool of shape \[2, 3\]"):
        eap_kernels.MaskedReads(torch.ones(2, 3, dtype=torch.bool), 1, 2)
    reads = eap_kernels.MaskedReads(torch.ones(2, 3), 1, 2)
    for sender, shape in ((0, (3, 1, 2)), (2, (1, 1, 2)), (0, (1, 2, 2)), (0, (1, 2))):
        with pytest.raises(ValueError, match="MaskedReads: expected contributions within"):
            reads.write(sender, torch.ones(shape))
    with pytest.raises(ValueError, match="expected a read of senders that have been written"):
        reads.read(torch.zeros(1, 2), slice(0, 1), slice(0, 1))
    reads.write(0, torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match="expected each sender to be written once"):
        reads.write(0, torch.ones(1, 1, 2))
