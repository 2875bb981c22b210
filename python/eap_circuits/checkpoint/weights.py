"""One digest of all weights, read again only if they have changed."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..files import digest
from .digest import tensor_digest

_known: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()


def weights_digest(model: nn.Module) -> str:
    """The SHA-256 of the digests of all weights and buffers; of quantised or offloaded ones, only of their names.

    A model's digest is kept, and used again while its weights are the same tensors with the same sums of their bits,
    which are added up on their own device at the speed of its memory.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    plain = {name: x.detach() for name, x in tensors.items() if type(x.data) is Tensor and not x.is_meta}
    seen = [(name, x.data_ptr(), x._version, str(x.dtype), tuple(x.shape)) for name, x in plain.items()]
    state = (seen, sorted(tensors.keys() - plain.keys()), _sums(plain))
    if model not in _known or _known[model][0] != state:
        whole = {name: tensor_digest(x) for name, x in plain.items()}
        _known[model] = state, digest({"weights": whole, "others": state[1]})
    return _known[model][1]


def _sums(tensors: Mapping[str, Tensor]) -> list[int]:
    """Of each tensor's bytes, read as whole numbers of 64 bits: its rows' sums and its columns', weighted by place."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for x in tensors.values():
        flat = x.contiguous().flatten().view(torch.uint8)
        cut = flat.numel() // 8 * 8 if flat.storage_offset() % 8 == 0 else 0
        words, rest = flat[:cut].view(torch.int64), flat[cut:].long()
        rows = len(x) if x.dim() > 1 and len(x) and len(words) % len(x) == 0 else 1
        table = words.view(rows, -1)
        sums = by_device.setdefault(x.device, [])
        sums.extend(map(_weighted, (table.sum(0), *([table.sum(1)] if rows > 1 else []), rest)))
    return [number for sums in by_device.values() for number in torch.stack(sums).tolist()]


def _weighted(numbers: Tensor) -> Tensor:
    """Their sum, each times another odd number: an even one would lose a change of the highest bit."""
    return (numbers * (2 * torch.arange(len(numbers), device=numbers.device) + 1)).sum()
