"""Nodes of a transformer's edge graph and their tensor indices.

Names, order and index arithmetic are those of EAP-IG (Hanna et al. 2024, arXiv 2403.17806). Senders are ordered by
depth: `input`, then for each layer its heads `a{l}.h{h}` and its MLP `m{l}`. Receivers are, for each layer, all `<q>`,
all `<k>`, all `<v>` inputs and `m{l}`; the last one is `logits`. With `heads="kv"` a layer has one `<k>` and one `<v>`
receiver per key/value head, with `heads="query"` one of each per query head. Layers that mix tokens otherwise have the
inputs that `reads` names instead: `a{l}.h{h}<name>`, or `a{l}<name>` for one that all heads of the layer share.
What a layer makes of per-layer embeddings, or pictures write behind it, is a node behind its MLP, `p{l}`. Heads of a
second mixer beside a layer's first one are `b{l}.h{h}`.

A graph with spans has all of these once for each span: `a{l}.h{h}@{span}`, and so on (`spans.py`). That of an
encoder-decoder has two residual streams, and other names (`streams.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import refuse_default_device
from .fields import checked_fields
from .pruning import on_paths
from .spans import Spans, by_span, ends, inputs_by_span, spread
from .streams import Stream, names_of, streams_of
from .unspoilt import unspoilt

Heads = Literal["kv", "query"]
Reads = tuple[tuple[str, int], ...]  # the inputs of a layer's heads: (name, how many receivers), in order
_OF_KEYS = ("k", "v")  # of which the query graph has one for each query head


@dataclass(frozen=True)
class Graph:
    """The edge graph of one model; pure index arithmetic, no model.

    Args:
        n_heads: query heads of each layer, [L]; 0 of a layer that is one node, `m{l}`.
        n_kv_heads: key/value heads of each layer, [L]; each divides its layer's `n_heads`.
        d_model: width of the residual stream; 0 if it is not known, as in EAP-IG's files before version 2. Such a graph
            equals those of any width.
        parallel: attention and MLP of a layer read the same residual (GPT-NeoX, Phi).
        heads: "kv" or "query": the kind of head that has its own `<k>` and `<v>` receivers.
        reads: the inputs of each layer's heads in the kv graph, [L], None for a layer with the usual three; or None if
            all layers have these.
        spans: of which the graph has every node once for each; its edges are those that are on a path. None: no spans.
        keys: the layer whose keys and values the heads of each layer attend to, [L]; None if each has its own.
        per_layer: [L], which are no layers of the model but what the one before makes of per-layer embeddings, or
            pictures write behind it: one node, `p{l}`, which the prompt's tokens reach by themselves, as they reach
            `input`; None if none is.
        encoder: how many layers, the first ones, are an encoder's; 0: none. Of the others, the decoder's, every second
            one is cross-attention: its `<k>` and `<v>` read the encoder's residual stream.
        mlps: [L], which have an MLP; None if all do.
        beside: [L], which are no layers of the model but further heads of the one before, which read what its heads
            read and write beside them; only the last such layer may have an MLP. None if none is.
    """

    n_heads: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    d_model: int = field(compare=False)
    parallel: bool = False
    heads: Heads = "kv"
    reads: tuple[Reads | None, ...] | None = None
    spans: Spans | None = None
    keys: tuple[int, ...] | None = None
    per_layer: tuple[bool, ...] | None = None
    encoder: int = 0
    mlps: tuple[bool, ...] | None = None
    beside: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        refuse_default_device()
        for name, value in checked_fields(self).items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        same = all(getattr(self, each.name) == getattr(other, each.name) for each in fields(self) if each.compare)
        return same and (self.d_model == other.d_model or 0 in (self.d_model, other.d_model))

    # Index arithmetic.

    @property
    def n_layers(self) -> int:
        return len(self.n_heads)

    @property
    def n_spans(self) -> int:
        """How often the graph has every node: 1 without spans. It is also how many inputs and logits there are."""
        return 1 if self.spans is None else len(self.spans)

    @cached_property
    def _senders(self) -> tuple[tuple[int, int], ...]:
        """Where each layer's senders begin and end. Before the first layer, and the decoder's first, is an `input`."""
        found, stop = [], 0
        for layer, h in enumerate(self.n_heads):
            start = stop + (self.n_spans if layer in (0, self.encoder) else 0)
            stop = start + (h + self.has_mlp(layer)) * self.n_spans
            found.append((start, stop))
        return tuple(found)

    @cached_property
    def _receiver_starts(self) -> tuple[int, ...]:
        starts = [0]
        for layer in range(self.n_layers):
            starts.append(starts[-1] + sum(n for _, n in self.sites(layer)) * self.n_spans)
        return tuple(starts)

    def has_mlp(self, layer: int) -> bool:
        return self.mlps is None or self.mlps[layer]

    def first_beside(self, layer: int) -> int:
        """The first of the layers that stand side by side with this one."""
        return next(first for first in range(layer, -1, -1) if not (self.beside and self.beside[first]))

    def crosses(self, layer: int) -> bool:
        """Is the layer cross-attention, whose keys and values read the encoder's residual stream?"""
        return 0 < self.encoder <= layer and (layer - self.encoder) % 2 == 1

    def n_kv_receivers(self, layer: int) -> int:
        """How many `<k>` (and as many `<v>`) receivers the layer has."""
        return self.n_kv_heads[layer] if self.heads == "kv" else self.n_heads[layer]

    @property
    def n_senders(self) -> int:
        return self._senders[-1][1]

    @property
    def n_receivers(self) -> int:
        return self._receiver_starts[-1] + self.n_spans

    def head_senders(self, layer: int) -> slice:
        """Indices of the layer's heads among the senders."""
        start = self._senders[layer][0]
        return slice(start, start + self.n_heads[layer] * self.n_spans)

    def mlp_sender(self, layer: int) -> int:
        """The index of the layer's MLP among the senders: with spans, that of its first span."""
        return self._senders[layer][1] - self.n_spans

    def receivers_at(self, layer: int, site: str) -> slice:
        """Indices of the layer's receivers at `site`: one of `sites`."""
        start = self._receiver_starts[layer]
        for name, count in self.sites(layer):
            if name == site:
                return slice(start, start + count * self.n_spans)
            start += count * self.n_spans
        raise KeyError(site)

    def receivers_of(self, layer: int) -> slice:
        """Indices of all of the layer's receivers."""
        return slice(self._receiver_starts[layer], self._receiver_starts[layer + 1])

    @property
    def logits_receiver(self) -> slice:
        return slice(self.n_receivers - self.n_spans, self.n_receivers)

    def head_inputs(self, layer: int) -> Reads:
        """(name, number of such receivers) of each input of the layer's heads, in order; usually "q", "k" and "v"."""
        n, h = self.n_kv_receivers(layer), self.n_heads[layer]
        if not h:
            return ()
        reads = self.reads[layer] if self.reads else None
        return tuple((name, n if name in _OF_KEYS else m) for name, m in reads or (("q", h), ("k", n), ("v", n)))

    def sites(self, layer: int) -> Reads:
        """(name, number of such receivers) of all that reads in a layer, in order: its heads' inputs, then "mlp"."""
        return (*self.head_inputs(layer), *((("mlp", 1),) if self.has_mlp(layer) else ()))

    def stream_at(self, layer: int, site: str = "") -> int:
        """Which of `streams` the layer writes to, or `site` in it reads; the logits' layer is one past the last."""
        return int(0 < self.encoder <= layer and not (site in _OF_KEYS and self.crosses(layer)))

    def reach_at(self, layer: int, site: str) -> int:
        """One past the last sender that the layer's receivers at `site` can see; the first is that of their stream."""
        if self.crosses(layer) and site in _OF_KEYS:
            return self.input_senders[-1]  # all of the encoder's
        if site == "mlp" and not self.parallel:
            return self._senders[layer][0] + self.n_heads[layer] * self.n_spans
        return self._senders[self.first_beside(layer)][0]

    @cached_property
    def input_senders(self) -> list[int]:
        """The senders that are `input`: one, one for each span, or the encoder's and the decoder's."""
        decoders = [self._senders[self.encoder][0] - 1] if self.encoder else []
        return [*range(self.n_spans), *decoders]

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        """The residual streams: one, or an encoder's and its decoder's."""
        return streams_of(self)

    # Names and tensors.

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The number of the model's layer that each layer is, or is a part of, [L]."""
        none = (False,) * self.n_layers
        parts = [a or b for a, b in zip(self.per_layer or none, self.beside or none, strict=True)]
        return tuple(layer - sum(parts[: layer + 1]) for layer in range(self.n_layers))

    @cached_property
    def senders(self) -> list[str]:
        """Sender names, [S]."""
        names = ["enc.input" if self.encoder else "input"]
        for layer, h in enumerate(self.n_heads):
            heads, block = names_of(self, layer)
            names += ["dec.input"] if 0 < layer == self.encoder else []
            names += [*(f"{heads}.h{i}" for i in range(h)), *([block] if self.has_mlp(layer) else [])]
        return self._at_spans(names)

    @cached_property
    def receivers(self) -> list[str]:
        """Receiver names, [R]."""
        names = []
        for layer in range(self.n_layers):
            heads, block = names_of(self, layer)
            for name, n in self.head_inputs(layer):
                shared = n == 1 < self.n_heads[layer] and name not in _OF_KEYS
                names += [f"{heads}<{name}>"] if shared else [f"{heads}.h{i}<{name}>" for i in range(n)]
            names += [block] if self.has_mlp(layer) else []
        return self._at_spans([*names, "logits"])

    def _at_spans(self, names: list[str]) -> list[str]:
        return names if self.spans is None else [f"{name}@{span}" for name in names for span in self.spans.names]

    @cached_property
    def reach(self) -> Tensor:
        """reach[v] = one past the last sender that receiver v can see: how many, if there is one stream. int64 [R]."""
        reach = torch.empty(self.n_receivers, dtype=torch.int64)
        for layer in range(self.n_layers):
            for site, _ in self.sites(layer):
                reach[self.receivers_at(layer, site)] = self.reach_at(layer, site)
        reach[self.logits_receiver] = self.n_senders
        return reach

    @unspoilt
    def edge_mask(self) -> Tensor:
        """edge_mask[u, v]: is there an edge from sender u to receiver v? bool [S, R]."""
        if self.spans is not None:
            return on_paths(self, spread(self.base.edge_mask, self.n_spans) & ends(self.base, self.spans))
        mask = torch.arange(self.n_senders)[:, None] < self.reach
        for stream in self.streams[1:]:
            mask[: stream.senders.start, stream.receivers] = False
        return mask

    @cached_property
    def n_edges(self) -> int:
        return int(self.edge_mask.sum() if self.spans is not None else sum(each.reach.sum() for each in self.streams))

    @cached_property
    def inputs_of(self) -> tuple[Tensor, Tensor]:
        """Pairs (receiver, sender) in which the receiver is an input of the sender's own node. int64 [P] each.

        The inputs of a head are its `<q>` and its group's `<k>` and `<v>` (see `keys`); an MLP has one input.
        """
        if self.spans is not None:
            return inputs_by_span(self.base, self.spans)
        receivers, senders = [], []
        for layer, h in enumerate(self.n_heads):
            heads = torch.arange(h)
            first, of = self.head_senders(layer).start, self.keys[layer] if self.keys else layer
            attended = [(of, *read) for read in self.head_inputs(of) if read[0] != "q"] if of != layer else []
            for at, site, n in [*((layer, *read) for read in self.head_inputs(layer)), *attended]:
                receivers.append(self.receivers_at(at, site).start + heads // (h // n))
                senders.append(first + heads)
            if self.has_mlp(layer):
                receivers.append(torch.tensor([self.receivers_at(layer, "mlp").start]))
                senders.append(torch.tensor([self.mlp_sender(layer)]))
        return torch.cat(receivers), torch.cat(senders)

    @cached_property
    def inputs(self) -> list[list[int]]:
        """For each sender the receivers that are inputs of its node; none for `input`."""
        found: list[list[int]] = [[] for _ in range(self.n_senders)]
        for receiver, sender in zip(*(t.tolist() for t in self.inputs_of), strict=True):
            found[sender].append(receiver)
        return found

    @cached_property
    def owners(self) -> list[list[int]]:
        """For each receiver the senders whose node it is an input of; none for `logits`."""
        found: list[list[int]] = [[] for _ in range(self.n_receivers)]
        for sender, receivers in enumerate(self.inputs):
            for receiver in receivers:
                found[receiver].append(sender)
        return found

    def edge_name(self, sender: int, receiver: int) -> str:
        """`a0.h1->m0`, `input->a0.h0<q>`: EAP-IG's name of the edge."""
        return f"{self.senders[sender]}->{self.receivers[receiver]}"

    # Spans.

    @cached_property
    def base(self) -> Graph:
        """The same model's graph without spans."""
        return self if self.spans is None else replace(self, spans=None)

    def with_spans(self, spans: Spans | None) -> Graph:
        """The same model's graph with these spans, or with none."""
        return replace(self, spans=spans)

    def to_spans(self, values: Tensor) -> Tensor:
        """Values or flags of every edge at every span, [P, S, R] or for all spans alike [S, R], as those of this graph,
        which has spans: [S·P, R·P]. Flags only where there is an edge."""
        found = spread(values, self.n_spans)
        return found & self.edge_mask if found.dtype == torch.bool else found

    def per_span(self, values: Tensor) -> Tensor:
        """A copy of this graph's values or flags [S·P, R·P] by span, [P, S, R]."""
        return by_span(values, self.n_spans)

    # The two head graphs.

    def with_heads(self, heads: Heads) -> Graph:
        """The same model's graph with `<k>` and `<v>` receivers of the given kind."""
        return replace(self, heads=heads)

    @cached_property
    def kv_receiver(self) -> Tensor:
        """For each receiver of the query-head graph, the kv graph's receiver that it belongs to. int64 [R_query]."""
        if self.spans is not None:
            return (self.base.kv_receiver[:, None] * self.n_spans + torch.arange(self.n_spans)).flatten()
        query, kv = self.with_heads("query"), self.with_heads("kv")
        index = torch.empty(query.n_receivers, dtype=torch.int64)
        for layer in range(self.n_layers):
            for site, _ in self.sites(layer):
                mine, theirs = query.receivers_at(layer, site), kv.receivers_at(layer, site)
                n, m = mine.stop - mine.start, theirs.stop - theirs.start
                index[mine] = theirs.start + torch.arange(n) // (n // m)
        index[-1] = kv.n_receivers - 1
        return index

    def to_query(self, values: Tensor) -> Tensor:
        """The kv graph's scores [..., R] over query heads, [..., R_query]: each head of a group gets an equal part."""
        return (values / self.kv_receiver.bincount())[..., self.kv_receiver]

    def to_kv(self, values: Tensor) -> Tensor:
        """Scores [..., R_query] over query heads summed over each group, [..., R]."""
        n = self.with_heads("kv").n_receivers
        return values.new_zeros(*values.shape[:-1], n).index_add(-1, self.kv_receiver, values)

    @cached_property
    def sources(self) -> Tensor:
        """bool [S]: the senders that the prompt's tokens reach by themselves: `input` and per-layer embeddings."""
        firsts = [self.mlp_sender(layer) for layer, one in enumerate(self.per_layer or ()) if one]
        found = torch.isin(torch.arange(self.n_senders) // self.n_spans, torch.tensor(firsts) // self.n_spans)
        found[self.input_senders] = True
        return found

    def _entered(self, given: Tensor) -> Tensor:
        """bool [S]: the senders whose node has one of these receivers, bool [R], as an input."""
        receivers, senders = self.inputs_of
        entered = torch.zeros(self.n_senders, dtype=torch.bool)
        entered[senders[given[receivers]]] = True
        return entered

    def fed(self, given: Tensor) -> Tensor:
        """bool [S]: the `sources`, and the senders whose node has one of these receivers, bool [R], as an input."""
        return self.sources | self._entered(given)

    def read(self, present: Tensor) -> Tensor:
        """bool [R]: `logits`, and the inputs of the nodes of these senders, bool [S]."""
        receivers, senders = self.inputs_of
        read = torch.zeros(self.n_receivers, dtype=torch.bool)
        read[receivers[present[senders]]] = True
        read[self.logits_receiver] = True
        return read

    def between(self, kept: Tensor) -> Tensor:
        """bool [S, R]: all edges among the nodes of these senders, bool [S], `input` and `logits`."""
        kept = kept.clone()
        kept[self.input_senders] = True
        return self.edge_mask & kept[:, None] & self.read(kept)

    def connected(self, mask: Tensor) -> Tensor:
        """bool [S]: senders with a kept edge going out or coming in; mask bool [S, R]."""
        return self._entered(mask.any(0)) | mask.any(1)

    # Storage.

    def to_dict(self) -> dict[str, Any]:
        return {name: x for name, x in asdict(self).items() if x or (x is not None and name != "encoder")}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Graph:
        """The graph of what `to_dict` gave; raises `InputError` or `TypeError` for anything else."""
        spans = fields.get("spans")
        return cls(**{**fields, "spans": Spans(**spans) if isinstance(spans, dict) else spans})

    def __repr__(self) -> str:
        parts = "" if self.spans is None else f"spans {', '.join(self.spans.names)}; "
        parts = f"{self.encoder} of them an encoder's, " if self.encoder else parts
        sizes = f"{self.n_senders} senders, {self.n_receivers} receivers, {self.n_edges} edges"
        return f"Graph({self.numbers[-1] + 1} layers, heads={self.heads!r}, {parts}{sizes})"
