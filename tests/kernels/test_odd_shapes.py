"""The checks by which a card is found to compute right."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from eap_kernels._registry import BACKENDS
from eap_kernels.reference import Backend
from eap_kernels.testing import odd_shapes, shapes


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize("op", odd_shapes.CHECKS)
def test_operands_lie_in_memory_as_was_asked(op, layout, monkeypatch, generator):
    backend, called = Backend(), []

    def watched(*args, **options):
        called.append(tree_leaves(args))
        return getattr(Backend(), op)(*args, **options)

    monkeypatch.setattr(backend, op, watched)
    monkeypatch.setitem(BACKENDS, "watched", backend)
    odd_shapes.CHECKS[op]("watched", "cpu", odd_shapes.SHAPES[0], "float32", layout, generator)
    operands = [x for x in called[0] if isinstance(x, torch.Tensor)]
    assert all(x.is_contiguous() for x in operands) == (layout == "contiguous")
