"""Running sums of edge scores, and what `attribute(keep=)` keeps besides their mean over examples.

A gradient method's score is a sum over tokens. Contracting only the tokens of one example, or of one position, gives
the score of that example or position, and all of these contractions together cost as much as the whole one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from eap_kernels import Nodes

from ..budget import dealt_in_memory, free_bytes, zeros
from ..checkpoint import Checkpoint, remaining
from ..edges import Stream, finite
from ..errors import expected, listed, one_of
from ..forward import Batch, upload
from ..graph import EdgeScores
from ..ranks import least_share
from ..recording import contract, contract_neurons, feature_slices, lowered
from ..request import Measurement, Progress, fetch
from ..tasks import longest, spans_in
from .spec import KEEP, AttributionRequest, Method

_EXAMPLES, _POSITIONS = {"variance", "examples"}, {"positions", "positions-from-end"}
BY_SPAN = {"spans", "within-heads"}


def to_keep(keep: object, method: Method) -> frozenset[str]:
    """The names that `attribute(keep=)` asks for, checked."""
    if keep is None:
        return frozenset()
    wanted = "a name or names of " + ", ".join(map(repr, KEEP))
    names = [keep] if isinstance(keep, str) else listed("keep", keep, wanted)
    for name in names:
        one_of("keep", name, KEEP)
    found = frozenset(names)
    if found >= _POSITIONS:
        raise expected("keep", "positions counted from one end", "both 'positions' and 'positions-from-end'")
    if not found <= set(method.keeps):
        known = " or ".join(map(repr, method.keeps)) or "nothing"
        raise expected("keep", f"{known} for method {method.name!r}", repr(keep))
    return found


def batch_bytes(request: AttributionRequest, examples: int) -> int:
    """The most bytes that the `BatchScores` of this many examples hold for what is kept."""
    parts = min(examples, len(request.data)) if request.keep & _EXAMPLES else 0
    if request.keep & _POSITIONS:
        parts += max(longest(request.data))
    if "spans" in request.keep:
        parts += len(request.data.span_names) + 1
    return parts * request.graph.n_senders * request.graph.n_receivers * request.arch.accumulate.itemsize


class Side(Protocol):
    """Senders or receivers of a batch."""

    def lowered(self, dtype: torch.dtype, stream: int | None = None) -> Callable[[slice], Iterable[Nodes]]:
        """What makes them in a dtype, some features at a time; all of them, or those of one of the graph's streams."""


class Part(NamedTuple):
    """Some features of senders and receivers of a stream, which are contracted with each other.

    Args:
        delta, grad: differences of the senders, gradients at the receivers.
        number, stream: the stream's number, and which of it they are.
        features: of the residual stream.
        times: a factor.
    """

    delta: list[Nodes]
    grad: list[Nodes]
    number: int
    stream: Stream
    features: slice
    times: float


class Contractions(ABC):
    """What the passes of a batch leave to be contracted, part by part, and the metric of these passes."""

    def __init__(self, request: AttributionRequest, batch: Batch) -> None:
        self.batch, self._request = batch, request
        self._measured: list[Measurement] = []
        self.within_heads: Tensor | None = None  # float64 [P, P, R], where asked for

    def measurement(self, clean: Tensor, corrupted: Tensor) -> Measurement:
        """What measures the metric of the batch's passes, given logits [E, V] of both prompts."""
        self.include(Measurement(self._request, self.batch, clean, corrupted))
        return self._measured[-1]

    def include(self, measured: Measurement) -> None:
        """Check what it measured when the sums are fetched."""
        self._measured.append(measured)

    def add(
        self,
        senders: Side,
        receivers: Side,
        of: tuple[int, Stream] | None = None,
        times: float = 1.0,
    ) -> None:
        """Contract differences of senders with gradients at receivers.

        Args:
            senders, receivers: have those of the whole graph, or of a part of it.
            of: the number of the only stream that they are of, and which of it they are; by default all streams.
            times: a factor.
        """
        request = self._request
        dtype = request.arch.accumulate if "neurons" in request.keep else request.arch.contraction_dtype
        slices = feature_slices(request.arch)
        for number, stream in enumerate(request.graph.streams) if of is None else [of]:
            delta, grad = senders.lowered(dtype, number), receivers.lowered(dtype, number)
            for features in slices[:1] if request.only_memory else slices:
                # In a call, so that no slice is held while the next is made.
                self._add(Part(list(delta(features)), list(grad(features)), number, stream, features, times))

    @abstractmethod
    def _add(self, part: Part) -> None:
        """Its senders and receivers meet."""


class LaterScores(Contractions):
    """Contractions of passes that are captured: they wait until the passes are replayed for a batch.

    What is added must not change any more. The weights of nodes are made by the passes, too.
    """

    def __init__(self, request: AttributionRequest, batch: Batch) -> None:
        super().__init__(request, batch)
        self._waiting: list[Part] = []

    def _add(self, part: Part) -> None:
        self._waiting.append(part)

    def of(self, batch: Batch) -> BatchScores:
        """The scores of the batch for which the passes were replayed."""
        scores = BatchScores(self._request, batch)
        for part in self._waiting:
            scores._add(part)
        for measured in self._measured:
            scores.include(measured.of(batch))
        return scores


class BatchScores(Contractions):
    """Scores of one batch, added up as its path points are contracted.

    `sums` holds "total" float64 [S, R], or, where asked for, float32 (or float64) "examples" [E, S, R], "positions" and
    "spans" [P, S, R] instead; "neurons" float64 [S, D]; all on the model's device until `fetch`. `places`: of
    positions and of spans int64 [P], their places in the result.
    """

    def __init__(self, request: AttributionRequest, batch: Batch) -> None:
        super().__init__(request, batch)
        keep, graph, self._arch = request.keep, request.graph, request.arch
        self.sums: dict[str, Tensor] = {}
        self._parts: dict[str, list[list[Tensor | slice]]] = {}  # rows of each part, stream by stream
        self.places: dict[str, Tensor] = {}
        self._neurons = "neurons" in keep
        self._in_features = False  # are the sums over this rank's features alone?
        shape = graph.n_senders, graph.n_receivers
        device = batch.rows.device
        streams = [batch.at(number) for number in range(len(graph.streams))]
        if keep & _EXAMPLES:
            self._parts["examples"] = [_by_example(each) for each in streams]
        places: dict[str, list[Tensor]] = {}  # of each stream's rows
        if keep & _POSITIONS:
            last = max(longest(request.data)) if "positions-from-end" in keep else None
            places["positions"] = [_positions(each, last) for each in streams]
        if "spans" in keep:
            places["spans"] = [each.host["spans"].flatten()[each.host["rows"]] for each in streams]
        for name, found in places.items():
            self.places[name] = torch.cat(found).unique()
            chosen = [[(own == place).nonzero()[:, 0] for place in self.places[name]] for own in found]
            self._parts[name] = [[*upload(device, *rows)] for rows in chosen]
        for name, (parts, *_) in self._parts.items():
            self.sums[name] = torch.zeros(len(parts), *shape, dtype=request.arch.accumulate, device=device)
        if not self._parts:
            self.sums["total"] = torch.zeros(shape, dtype=torch.float64, device=device)
        if self._neurons:
            shape = graph.n_senders, graph.d_model
            self.sums["neurons"] = torch.zeros(shape, dtype=torch.float64, device=device)

    def fetch(self) -> dict[str, Tensor]:
        """Bring the sums to the host, and check what was measured there; raises InputError if it is not finite.

        Returns:
            the sums, and "places of" positions and spans where there are any, for `Statistics.add`.
        """
        for scores in self.sums.values() if self._in_features else ():
            self._arch.add_up(scores)
        if self.within_heads is not None:
            self.sums["within_heads"] = self.within_heads
        every = [name for name in self.sums if name not in self._parts]
        _, arrived = fetch(self._measured, *(self.sums[name] for name in every))
        self._measured.clear()  # which hold logits
        self.sums |= zip(every, arrived, strict=True)
        # Apart, as these may be as large as what else is on the device.
        self.sums |= {name: self.sums[name].cpu() for name in self._parts}
        return self.sums | {f"places of {name}": places for name, places in self.places.items()}

    def _add(self, part: Part) -> None:
        delta, grad, number, (*of, reach), features, times = part
        self._in_features = True
        if self._neurons:
            neurons = contract_neurons(delta, grad, reach).double()
            self.sums["neurons"][of[0], features] += times * neurons.to(self.batch.rows.device)
            delta, grad = lowered(self._arch, delta), lowered(self._arch, grad)
        met = partial(contract, self._arch, delta, grad, reach, workspace=self._request.workspace)
        if not self._parts:
            self.sums["total"][tuple(of)] += times * met().double()
        for name, parts in self._parts.items():
            for scores, rows in zip(self.sums[name], parts[number], strict=True):
                scores[tuple(of)] += times * met(rows)


def _by_example(batch: Batch) -> list[Tensor | slice]:
    """The rows of each of its examples."""
    first = torch.searchsorted(batch.pair, torch.arange(batch.n_examples + 1))
    ends = torch.searchsorted(batch.host["rows"], first * batch.shape[1])
    return [slice(*both) for both in pairwise(ends.tolist())]


def _positions(batch: Batch, last: int | None) -> Tensor:
    """The position of each row's token, int64 [n]: from the prompt's start, or such that so many are before the end."""
    before, rows = batch.host["start"], batch.host["rows"]
    if last is not None:
        before = before + last - batch.host["sizes"][0]
    return before[rows // batch.shape[1]] + rows % batch.shape[1]


class Statistics:
    """Running sums over batches.

    `sums` holds, on the CPU, "total" float64 [S, R] and, where asked for, "squares" float64 [S, R], "examples" float32
    [E, S, R], "positions" float64 [T, S, R], "spans" float64 [P, S, R], "neurons" float64 [S, D], "within_heads"
    float64 [P, P, R]. `notes`: what the result is to say of how they were computed.

    Raises:
        InputError: they do not fit into memory.
    """

    def __init__(self, request: AttributionRequest) -> None:
        keep, graph = request.keep, request.graph
        self._keep, self._graph, self._n = keep, graph, len(request.data)
        self._dtype = request.arch.dtype
        self.notes: dict[str, Any] = {}
        edges = (graph.n_senders, graph.n_receivers)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"total": (edges, torch.float64)}
        if keep & _EXAMPLES:
            shapes["squares"] = edges, torch.float64
        if "examples" in keep:
            shapes["examples"] = (self._n, *edges), torch.float32
        if keep & _POSITIONS:
            shapes["positions"] = (max(longest(request.data)), *edges), torch.float64
        if keep & BY_SPAN:
            self._spans = spans_in(request.data)
        if "spans" in keep:
            shapes["spans"] = (len(self._spans), *edges), torch.float64
        if "neurons" in keep:
            shapes["neurons"] = (graph.n_senders, graph.d_model), torch.float64
        if "within-heads" in keep:
            shapes["within_heads"] = (len(self._spans), len(self._spans), graph.n_receivers), torch.float64
        needed = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())
        free = least_share("scores", {"cpu": free_bytes(torch.device("cpu"))})
        if keep and needed > free:
            raise expected("keep", f"scores that fit into the {free:,} bytes that are free", f"{needed:,} bytes")
        self.sums = {name: zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def add(self, batch: Batch, found: dict[str, Tensor]) -> None:
        """Add the scores of a batch, which `BatchScores.fetch` gave."""
        sums = self.sums
        for part in found.values():
            self._check(part)
        # One example at a time: a float64 copy of a whole batch would take twice as much memory as the batch.
        if "examples" in found:
            for example, part in zip(batch.index, found["examples"], strict=True):
                values = part.double()
                sums["total"] += values
                sums["squares"] += values.square()
                if "examples" in sums:
                    sums["examples"][example] = values.float()
        parts: list[str] = [name for name in ("positions", "spans") if name in found]
        for name in parts:
            for place, part in zip(found[f"places of {name}"], found[name], strict=True):
                values = part.double()
                sums[name][place] += values
                if "examples" not in found and name == parts[0]:
                    sums["total"] += values
        for each in found.keys() & {"total", "neurons", "within_heads"}:
            sums[each] += found[each]

    def scores(self, info: dict[str, Any]) -> EdgeScores:
        """Means over the examples."""
        mean = self.sums["total"] / self._n
        kept = {"per_example": self.sums["examples"]} if "examples" in self.sums else {}
        fields = {"positions": "per_position", "spans": "per_span"}
        for sums in self.sums.keys() - {"total", "squares", "examples"}:
            kept[fields.get(sums, sums)] = self.sums[sums].float() / self._n
        if "squares" in self.sums:
            kept["variance"] = (self.sums["squares"] / self._n - mean.square()).clamp(min=0).float()
        info = {**info, **self.notes}
        if self._keep:
            info = {**info, "keep": sorted(self._keep)}
        if self._keep & BY_SPAN:
            info["spans"] = self._spans.to_dict()
        found = {"values": mean.float(), **kept}
        for scores in found.values():
            self._check(scores)
        return EdgeScores(self._graph, info=info, **found)

    def _check(self, scores: Tensor) -> None:
        """Refuse scores that are not finite."""
        if not finite(scores):
            dtype = str(self._dtype).removeprefix("torch.")
            cure = "; load the model in bfloat16 or float32" if self._dtype == torch.float16 else ""
            found = f"some that are not, as gradients or activations of the {dtype} model are not{cure}"
            raise expected("scores", "finite numbers", found)


def score_batches(
    request: AttributionRequest,
    tokens: int,
    score: Callable[[Batch, int], BatchScores],
    statistics: Statistics,
    checkpoint: Checkpoint,
    progress: Progress | None,
    per_batch: int | None = None,
) -> None:
    """Add `score(batch, tokens of a pass)` of all batches that the checkpoint does not have.

    A batch has `per_batch` tokens, by default as many as a pass.
    """
    finished = torch.zeros(len(request.data), dtype=torch.bool)
    checkpoint.keep({**statistics.sums, "finished": finished})
    per_batch = checkpoint.tokens(tokens if per_batch is None else per_batch, "batch")
    tokens = checkpoint.tokens(tokens)
    batches = remaining(request.data, request.batches(per_batch), finished)

    def fetched(batch: Batch, tokens: int) -> dict[str, Tensor]:
        return score(batch, tokens).fetch()

    for batch, scores in dealt_in_memory(request.data, batches, tokens, fetched, request.arch.team):
        with checkpoint.changing():
            statistics.add(batch, scores)
            finished[batch.index] = True
        if progress is not None:
            progress(int(finished.sum()), len(request.data))
