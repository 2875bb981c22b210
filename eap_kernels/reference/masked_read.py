"""Masked read in plain PyTorch: one matrix product over the senders that any receiver keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from eap_kernels._schemas import accumulation_dtype

# Elements of delta that are copied at once on a CPU where a copy is needed (unread senders, low precision): what its
# cache holds. Elsewhere, of all that is made on the way: what a GPU has room for.
_CHUNK, _CHUNK_ON_DEVICE = 1 << 20, 1 << 28


def masked_read(base: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    """y[v] = base[v] + sum_u mask[u, v] * delta[u], in delta's dtype.

    base [N, D] or [R, N, D], delta [S, N, D], mask [S, R] bool or floating -> [R, N, D]. Senders that no
    receiver keeps are not read: their delta may hold anything.

    With a leading dimension of circuits on all three, [C, R, N, D]: one product, in which every sender is read and must
    be finite.
    """
    wide = accumulation_dtype(delta.dtype)
    if delta.dim() == 4:
        return _products(base, delta, mask, wide)
    if delta.is_cpu:
        return _on_cpu(base, delta, mask, wide)
    base = base.expand(1, mask.shape[1], *delta.shape[1:])
    # To ask which senders are read would wait for the device.
    unread = (mask == 0).all(1)[:, None, None]
    return _products(base, delta[None], mask[None], wide, unread)[0]


def parts(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [parts, *mask.shape] that add up to the mask and have the dtype in which a GPU computes the products.

    A product of two bf16 (or fp16) numbers is exact in fp32. So a mask that delta's dtype holds is used as it is,
    and an fp32 mask of a bf16 delta as a sum of three bf16 parts, 3 x 8 bits of mantissa: no mask is rounded. fp16
    lacks the range for that, so its products are computed in fp32.

    A product with the second or third part that is not finite counts as 0: the one with the first is not finite
    either, and might have the other sign.
    """
    if mask.dtype in (torch.bool, dtype):
        return mask.to(dtype)[None]
    if dtype != torch.bfloat16:
        return mask.to(accumulation_dtype(dtype))[None]
    rest = mask.float()
    weights = rest.new_empty((3, *mask.shape), dtype=dtype)
    for part in weights:
        part.copy_(rest)
        # An infinite weight leaves no remainder.
        rest = (rest - part).nan_to_num_(0, 0, 0)
    return weights


def _on_cpu(base: Tensor, delta: Tensor, mask: Tensor, wide: torch.dtype) -> Tensor:
    read = (mask != 0).any(1).nonzero().flatten()
    apart = not len(read) or int(read[-1] - read[0]) >= len(read)
    if not apart:
        # As those of a layer's receivers, which later senders do not reach. They are read in place.
        some = slice(int(read[0]), int(read[-1]) + 1)
        delta, mask = delta[some], mask[some]
    _, tokens, features = delta.shape
    weights = (mask[read] if apart else mask).T.to(wide)  # [R, senders]
    y = delta.new_empty((weights.shape[0], tokens, features))
    step = max(1, _CHUNK // max(1, weights.shape[1] * features))
    if not apart and delta.dtype == wide:
        step = max(1, tokens)
    for a in range(0, tokens, step):
        part = delta[:, a : a + step]
        if apart:
            part = part.index_select(0, read)
        product = (weights @ part.to(wide).flatten(1)).unflatten(1, (part.shape[1], features))  # [R, n, D]
        y[:, a : a + step] = product.add_(base[..., a : a + step, :])
    return y


def _products(base: Tensor, delta: Tensor, mask: Tensor, wide: torch.dtype, unread: Tensor | None = None) -> Tensor:
    """The read of each circuit, [C, R, N, D]; `unread` bool [S, 1, 1]: senders that are not read."""
    circuits, receivers, tokens, features = base.shape
    tensor_cores = delta.is_cuda and delta.dtype != wide
    weights = parts(mask, delta.dtype) if tensor_cores else mask.to(wide)[None]
    pieces, dtype = len(weights), weights.dtype
    # Rows of a whole number of 16 bytes, without which tensor cores multiply at a fraction of their rate.
    columns = pieces * receivers
    weights = pad(weights.movedim(0, -2).flatten(-2), (0, -columns % 8))[..., :columns].mT  # [C, pieces·R, S]
    # Receivers lead in memory: what projects one of them for all circuits needs no copy.
    y = delta.new_empty((receivers, circuits, tokens, features)).transpose(0, 1)
    copied = 0 if unread is None and delta.dtype == dtype else delta.shape[1]
    step = max(1, _CHUNK_ON_DEVICE // max(1, circuits * features * (copied + columns)))
    for a in range(0, tokens, step):
        part = delta[:, :, a : a + step]
        if unread is not None:
            part = part.masked_fill(unread, 0)
        rows = part.to(dtype).flatten(2)
        product = torch.bmm(weights, rows) if dtype == wide else torch.bmm(weights, rows, out_dtype=wide)
        total, *rest = product.view(circuits, pieces, receivers, part.shape[2], features).unbind(1)
        if rest:
            total.add_(rest[0].add_(rest[1]).nan_to_num_(0, 0, 0))
        torch.add(total, base[:, :, a : a + step], out=y[:, :, a : a + step])
    return y
