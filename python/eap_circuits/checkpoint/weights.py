"""Digests of a model's weights and buffers, read again only if they have changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from eap_kernels.info import cache_folder

from ..adapters import is_offloaded, is_shard, read
from ..errors import InputError
from ..files import digest, write_whole
from .digest import tensor_digest
from .fingerprint import Reader

_WORTH_A_FILE = 2**28  # bytes of weights that take longer to read than a file of digests
_SAMPLED = 8  # numbers of a weight
_FEW = 2**13  # words of a tensor that need not be added up
_MOST = 128  # words of a sum
_APART = 1021  # from one to the next: a prime, so that long rows that change places show in all their sums
_ODD = -0x61C8864680B583EB  # 2**64 over the golden ratio
_known: WeakKeyDictionary[nn.Module, tuple[object, dict[str, str]]] = WeakKeyDictionary()


def weights_digest(model: nn.Module) -> str:
    """The SHA-256 of the digests of all weights and buffers; of quantised or offloaded ones, only of their names."""
    every = {name for name, _, _ in _held(model)}
    kept = _kept(model)
    return digest({"weights": kept, "others": sorted(every - kept.keys())})


def weights_sample(model: nn.Module) -> str:
    """The SHA-256 of the first few numbers of each plain weight: what differs all over differs there."""
    plain = {name: x.detach() for name, _, x in _held(model) if _is_plain(x)}
    # Copies, for the same reason as in `tensor_digest`.
    numbers = {name: x[(0,) * (x.dim() - 1)][:_SAMPLED].clone() for name, x in plain.items() if x.dim() and x.numel()}
    return digest({}, numbers)


def weight_digests(model: nn.Module) -> dict[str, str]:
    """The digest of each weight and buffer, offloaded and quantised ones too; tied ones are read once."""
    kept, seen, found = _kept(model), dict[int, str](), {}
    for name, module, x in _held(model, tied=True):
        if is_offloaded(module) or is_shard(x):
            fetched = read(module, name.rpartition(".")[2])
            assert fetched is not None
            found[name] = tensor_digest(fetched)
            continue
        if id(x) not in seen:
            seen[id(x)] = (kept.get(name) or tensor_digest(x)) + _stored_with(module, x)
        found[name] = seen[id(x)]
    return found


def _held(model: nn.Module, tied: bool = False) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, tensor) of each weight and buffer; where `tied`, a tensor comes under each of its names."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, x in (*module._parameters.items(), *module._buffers.items()):
            if x is not None and (tied or id(x) not in seen):
                seen.add(id(x))
                yield f"{path}.{name}".lstrip("."), module, x


def _is_plain(x: Tensor) -> bool:
    return type(x.data) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_meta


def _kept(model: nn.Module) -> dict[str, str]:
    """The digests of the weights that are plain tensors with numbers.

    They are used again while the weights are the same tensors with the same sums of their bits, which are added up on
    their own device at the speed of its memory. Those of a large model are also kept in the user's cache, by the sums.
    """
    plain = {name: x.detach() for name, _, x in _held(model) if _is_plain(x)}
    seen = [(name, x.data_ptr(), x._version, str(x.dtype), tuple(x.shape)) for name, x in plain.items()]
    state = (seen, _sums(plain))
    if model not in _known or _known[model][0] != state:
        _known[model] = state, _from_cache(plain, state[1])
    return _known[model][1]


def _from_cache(plain: Mapping[str, Tensor], sums: list[int]) -> dict[str, str]:
    """Digests of tensors with these sums; a cache that cannot be read or written makes no difference."""
    if sum(x.nbytes for x in plain.values()) < _WORTH_A_FILE:
        return _digests(plain)
    kinds = {name: [str(x.dtype), list(x.shape)] for name, x in plain.items()}
    path = cache_folder() / "weights" / f"{digest({'kinds': kinds, 'sums': sums})}.json"
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.keys() == kinds.keys() and all(isinstance(x, str) for x in found.values()):
            return found
    made = _digests(plain)
    with suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write_text(json.dumps(made), encoding="utf-8"))
    return made


def _digests(plain: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: tensor_digest(x) for name, x in plain.items()}


def _stored_with(module: nn.Module, x: Tensor) -> str:
    """What bitsandbytes keeps beside a weight, which its first run moves from the weight to the module."""
    if type(x).__module__.partition(".")[0] != "bitsandbytes":
        return ""
    kept = [getattr(place, "SCB", None) for place in (x, getattr(module, "state", None))]
    beside = [*(each for each in kept if isinstance(each, Tensor)), getattr(x, "quant_state", None)]
    return Reader("weights").digest(beside)


def _sums(tensors: Mapping[str, Tensor]) -> list[int]:
    """Of each device one number, in which a change of any bit of its tensors shows; the same one on every device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for x in tensors.values():
        by_device.setdefault(x.device, []).extend(_added_up(x))
    return [int(_mixed(torch.cat(numbers))) for numbers in by_device.values()]  # copies, which are overwritten


def _added_up(x: Tensor) -> list[Tensor]:
    """A tensor's bytes as whole numbers of 64 bits; of many, sums of words that lie far apart: one read, one launch.

    What leaves all sums alike is not seen: words of one sum that change places, or that change by as much up as down.
    """
    flat = x.contiguous().flatten().view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat
    whole = len(flat) // 8 * 8
    words, left = flat[:whole].view(torch.int64), [flat[whole:].long()] if whole < len(flat) else []
    if len(words) <= _FEW:
        return [words, *left]
    blocks = -(-len(words) // (_MOST * _APART))
    table = words[: len(words) // (blocks * _APART) * blocks * _APART].view(blocks, -1, _APART)
    return [table.sum(1).flatten(), words[table.numel() :], *left]


def _mixed(numbers: Tensor) -> Tensor:
    """The sum of all numbers, each replaced, one to one, by another that depends on its place.

    Were each only multiplied by an odd number of its place, numbers that differ in the highest bit alone could change
    places unseen, as the difference of two odd numbers is even; and so could tensors with the same sum, if places were
    counted. So between two products the upper half of the bits goes into the lower.
    """
    odd = torch.arange(1, 2 * len(numbers), 2, device=numbers.device).mul_(_ODD)
    product = numbers.mul_(odd)  # in place: there may be many
    return product.bitwise_xor_((product >> 32).bitwise_and_(0xFFFFFFFF)).mul_(odd).sum()
