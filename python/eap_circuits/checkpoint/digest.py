"""Digests of tensors' bytes, the same on every device.

SHA-1 runs in threads, at about 1.5 GB/s on each core that has instructions for it: an 8B model in bfloat16 takes
seconds. Weights on a GPU are copied to the CPU for it, in chunks, which takes about as long.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_CHUNK = 2**24  # bytes; the digest depends on it, but not on the number of threads


def tensor_digest(x: Tensor) -> str:
    """Of a tensor's dtype, shape and bytes; of a quantised one, what it is stored in."""
    whole = hashlib.sha1(f"{x.dtype} {list(x.shape)}".encode(), usedforsecurity=False)
    if hasattr(type(x), "__tensor_flatten__"):  # made of other tensors
        names, settings = x.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = [f"{name} {tensor_digest(getattr(x, name))}" for name in names]
        whole.update(f"{parts} {settings}".encode())
        return whole.hexdigest()
    if x.is_meta:
        return "no numbers"
    x = x.detach().resolve_conj().resolve_neg()
    flat = (x if x.layout == torch.strided else x.to_dense()).contiguous().reshape(-1)
    chunks = flat.view(torch.uint8).split(_CHUNK) if flat.numel() else ()
    if len(chunks) > 1:
        with ThreadPoolExecutor(min(len(chunks), os.cpu_count() or 1)) as threads:
            digests = list(threads.map(_digest, chunks))
    else:
        digests = [_digest(chunk) for chunk in chunks]
    for each in digests:
        whole.update(each)
    return whole.hexdigest()


def text_digest(text: str) -> str:
    return hashlib.sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()


def _digest(chunk: Tensor) -> bytes:
    # Copies, as `fully_shard` cannot let go of a weight that numpy has seen.
    return hashlib.sha1(chunk.to("cpu", copy=True).numpy().data, usedforsecurity=False).digest()
