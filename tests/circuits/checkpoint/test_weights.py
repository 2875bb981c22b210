"""The digest of all weights, which is kept until they change."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.pretended import pretending
from eap_circuits.checkpoint import weights, weights_digest

# Few words, which are taken one by one; and more, which are added up and leave words and bytes over, in one block and
# in several.
SHAPES = [(5, 7), (301, 333), (1301, 1703)]


def test_a_digest_is_made_once_and_again_after_any_change(make_model, monkeypatch):
    model, read = make_model("llama", torch.float32), []
    monkeypatch.setattr(weights, "tensor_digest", lambda x, real=weights.tensor_digest: read.append(x) or real(x))
    first = weights_digest(model)
    n = len(read)
    assert n and weights_digest(model) == first and len(read) == n
    assert weights_digest(copy.deepcopy(model)) == first
    found = {first}
    for x in model.parameters():
        x.data.view(-1)[-1] += 1  # autograd's own counter of changes does not see this
        found.add(weights_digest(model))
    assert len(found) == 1 + len(list(model.parameters()))


def test_tensors_of_any_size_and_dtype_are_seen_to_change(make_model):
    model = torch.nn.Module()
    for number, dtype in enumerate((torch.float16, torch.int8, torch.bool, torch.float64)):
        for size in (0, 1, 3, 17):
            model.register_buffer(f"b{number}_{size}", torch.zeros(size, dtype=dtype))
    found = {weights_digest(model)}
    changed = 0
    for x in model.buffers():
        if x.numel():
            x.data[-1] = 1
            changed += 1
            found.add(weights_digest(model))
    assert len(found) == 1 + changed


def test_values_that_change_places_are_seen(make_model):
    """In place, through `.data`, with the same sums: rows, columns, halves of a row."""
    model = make_model("llama", torch.float32)
    x = model.model.layers[0].mlp.up_proj.weight.data
    found = {weights_digest(model)}
    changes = (lambda: x.flip(0), lambda: x.flip(1), lambda: x.roll(x.shape[1] // 2, 1), lambda: x.roll(1, 0))
    for change in changes:
        x.copy_(change())
        found.add(weights_digest(model))
    assert len(found) == 1 + len(changes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_moves_within_and_between_tensors_are_seen(shape, dtype):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    a.view(-1)[[3, 7]] = torch.tensor([1.5, -1.5], dtype=dtype)  # apart in the highest bit of a word alone
    b, n = a.flip(0), a.numel()  # the same numbers in another order
    model = torch.nn.Module()
    model.register_buffer("a", a.clone())
    model.register_buffer("b", b)
    x, y = model.a.data, model.b.data

    def swap(first, second):
        first[...], second[...] = second.clone(), first.clone()

    flat = x.view(-1)
    changes = [
        lambda: swap(x, y),
        lambda: swap(x[0], x[-1]),
        lambda: swap(x[:, 0], x[:, -1]),
        lambda: swap(x[:, 0], x[:, 1]),
        lambda: x.copy_(x.roll(1, 0)),
        *(lambda i=i, j=j: swap(flat[i], flat[j]) for i, j in ((3, 7), (0, n - 1), (0, shape[1]), (n - 2, n - 1))),
        *(lambda i=i: flat[i].neg_() for i in (0, 3, 7, n // 2, n - 1)),
    ]
    found = {weights_digest(model)}
    for change in changes:
        change()
        found.add(weights_digest(model))
        swap(x, a.clone())
        swap(y, a.flip(0))
    assert len(found) == 1 + len(changes)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_the_same_wherever_tensors_are(shape):
    whole = {str(dtype): torch.ones(shape).normal_().to(dtype) for dtype in (torch.bfloat16, torch.float64)}
    right = weights._sums(whole)
    # Not where words of 64 bits begin, and not one behind the other.
    behind = {name: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape) for name, x in whole.items()}
    turned = {name: x.T.contiguous().T for name, x in whole.items()}
    assert weights._sums(behind) == weights._sums(turned) == right
    with pretending():
        assert weights._sums({name: x.to("cuda") for name, x in whole.items()}) == right


def test_a_large_models_digests_are_kept_for_other_processes(make_model, monkeypatch, tmp_path):
    model, read = make_model("llama", torch.float32), []
    right = weights_digest(model)
    monkeypatch.setattr(weights, "tensor_digest", lambda x, real=weights.tensor_digest: read.append(x) or real(x))
    monkeypatch.setattr(weights, "_WORTH_A_FILE", 0)
    monkeypatch.setenv("EAP_CACHE", str(tmp_path))

    def anew():
        """Of a model that this process has not seen, and how many tensors were read."""
        read.clear()
        return weights_digest(copy.deepcopy(model)), len(read)

    every = len(list(model.parameters())) + len(list(model.buffers()))
    assert anew() == (right, every) and anew() == (right, 0)
    (file,) = (tmp_path / "weights").iterdir()
    for damaged in (b"", b"{", b"[]", b"\xff", file.read_bytes().replace(b"embed", b"other")):
        file.write_bytes(damaged)
        assert anew() == (right, every)
    model.lm_head.weight.data[0, 0] += 1
    changed, count = anew()
    assert changed != right and count == every
    monkeypatch.setenv("EAP_CACHE", str(file))  # no folder
    assert anew() == (changed, every)
