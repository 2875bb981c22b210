"""What the host has to know of a batch's values, whatever pass runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

# If it saves this many tokens, the common beginning of all prefixes runs once, in a pass of its own.
_WORTH_A_PASS = 64


class Known(NamedTuple):
    """Passes over two batches of one shape differ only in what tensors hold if this is the same of both.

    Args:
        shared: how many tokens all prefixes begin with, if it pays that these run by themselves; else 0.
        even: whether all prefixes are equally long.
        whole: the tokens of the longest prompt, with its prefix.
        padded: whether a prompt is shorter than the batch is wide.
    """

    shared: int
    even: bool
    whole: int
    padded: bool


def known_of(host: Mapping[str, Tensor]) -> Known:
    """Of `Batch.host`."""
    prefix, start, tokens = host["prefix"], host["start"], host["clean"].shape[1]
    shared = int((prefix == prefix[0]).all(0).cumprod(0).sum())
    pays = shared * (len(prefix) - 1) >= _WORTH_A_PASS and shared < prefix.shape[1]
    return Known(
        shared=shared if pays else 0,
        even=bool((start == prefix.shape[1]).all()),
        whole=int((start + host["last"]).max()) + 1,
        padded=bool((host["sizes"] != tokens).any()),
    )
