"""Named parts of prompts: a graph with spans has every node once for each of them.

Both ends of an edge are at the same token, so its sender and its receiver are of one span. Information moves inside a
head: a query is read at the head's own token, keys and values (and what else mixes tokens) there and at earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import expected, listed

if TYPE_CHECKING:
    from .layout import Graph

REST = "rest"  # the span of the tokens that are in no other


@dataclass(frozen=True)
class Spans:
    """The spans of some prompts.

    Args:
        names: their names, P of them; the last is "rest": the tokens outside of all others.
        sees: P rows of P flags: does any token of the span come at or after one of the other span, in any prompt?
        scored: P flags: is any token of the span scored?
    """

    names: tuple[str, ...]
    sees: tuple[tuple[bool, ...], ...]
    scored: tuple[bool, ...]

    def __post_init__(self) -> None:
        names, scored = (tuple(listed("spans", x, "a list")) for x in (self.names, self.scored))
        sees = tuple(tuple(listed("spans", row, "a list of flags")) for row in listed("spans", self.sees, "a list"))
        if not names or not all(type(name) is str and name for name in names) or len(set(names)) < len(names):
            raise expected("spans", "names, each once", list(names))
        if names[-1] != REST:
            raise expected("spans", f"{REST!r} as the last name", repr(names[-1]))
        flags = {type(flag) for row in (scored, *sees) for flag in row}
        if len(sees) != len(names) or any(len(row) != len(names) for row in (scored, *sees)) or flags != {bool}:
            raise expected(
                "spans", f"{len(names)} flags, one for each name, of scored and in each row of sees", "others"
            )
        for name, value in (("names", names), ("sees", sees), ("scored", scored)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        return {"names": [*self.names], "sees": [[*row] for row in self.sees], "scored": [*self.scored]}


def spread(values: Tensor, spans: int) -> Tensor:
    """[P, S, R] or, alike for all spans, [S, R] -> [S·P, R·P]: row u·P + p is of span p, as columns are; else 0."""
    senders, receivers = values.shape[-2:]
    flat = values.new_zeros(senders, spans, receivers, spans)
    flat.diagonal(dim1=1, dim2=3).copy_(values.expand(spans, -1, -1).permute(1, 2, 0))
    return flat.view(senders * spans, receivers * spans)


def by_span(flat: Tensor, spans: int) -> Tensor:
    """[S·P, R·P] -> [P, S, R], what `spread` has spread; a copy, as masks are changed in place."""
    senders, receivers = (size // spans for size in flat.shape)
    return flat.reshape(senders, spans, receivers, spans).diagonal(dim1=1, dim2=3).permute(2, 0, 1).clone()


def ends(graph: Graph, spans: Spans) -> Tensor:
    """bool [R·P]: receivers at a token that there is; `logits` where a token is scored. `graph` has no spans."""
    there = torch.tensor([row[p] for p, row in enumerate(spans.sees)]).repeat(graph.n_receivers, 1)
    there[graph.logits_receiver] = torch.tensor(spans.scored)
    return there.flatten()


def inputs_by_span(graph: Graph, spans: Spans) -> tuple[Tensor, Tensor]:
    """`Graph.inputs_of` of a graph with spans; `graph` has none."""
    receivers, senders = graph.inputs_of
    own = torch.zeros(graph.n_receivers, dtype=torch.bool)  # read at the node's own token alone
    for layer, heads in enumerate(graph.n_heads):
        if heads or graph.sources[graph.mlp_sender(layer)]:
            own[graph.receivers_at(layer, "mlp")] = True
        for name, _ in graph.head_inputs(layer):
            own[graph.receivers_at(layer, name)] = name == "q"
    size = len(spans)
    pairs = torch.where(own[receivers, None, None], torch.eye(size, dtype=torch.bool), torch.tensor(spans.sees))
    which, at, of = pairs.nonzero().unbind(1)  # the node at `at` reads its input at `of`
    return receivers[which] * size + of, senders[which] * size + at
