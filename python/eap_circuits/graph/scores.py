"""Edge scores, and how a circuit is chosen from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import formats
from ..display import Result, drawn
from ..edges import Graph, Spans, numbers
from ..edges import prune as pruned
from ..errors import expected, flag, instance, known_arguments, listed, number, warn, whole
from ..formats import hub
from ..selection import SECONDS, select_edges
from . import exports
from .circuit import Circuit
from .confidence import bootstrap_confidence, normal_confidence
from .nodes import NodeScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS = ("variance", "per_example", "per_position", "per_span", "neurons", "within_heads")


@dataclass(frozen=True, eq=False)
class EdgeScores(Result):
    """Scores of every edge: S[u, v] > 0 means that corrupting the edge hurts the metric.

    Args:
        graph: the graph whose edges these are.
        values: float32 [S, R], in units of the metric; zero where there is no edge.
        info: where they came from (method, metric, task …), as plain JSON values.
        variance: float32 [S, R] of the scores over examples, divided by E. This and the next five may be None.
        per_example: float32 [E, S, R] in the order of the dataset; its mean is `values`.
        per_position: float32 [T, S, R] by token position, counted from the prompts' start or, if `info["keep"]` has
            "positions-from-end", with the scored positions last. It is a mean over all examples, even those without
            such a position, so that its sum is `values`.
        neurons: float32 [S, D], scores of the nodes by dimension of the residual stream; see `NodeScores`.
        per_span: float32 [P, S, R] by span, named in `info["spans"]`; its sum is `values`. See `by_span`.
        within_heads: float32 [P, P, R] inside heads: what a head's input matters at a key's span, the second, by way of
            what the head gives at a query's, the first; zero where a receiver is no head's input. See docs/spans.md.
    """

    graph: Graph
    values: Tensor
    info: dict[str, Any] = field(default_factory=dict)
    variance: Tensor | None = None
    per_example: Tensor | None = None
    per_position: Tensor | None = None
    neurons: Tensor | None = None
    per_span: Tensor | None = None
    within_heads: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        instance("graph", self.graph, Graph)
        shape = [self.graph.n_senders, self.graph.n_receivers]
        shapes: dict[str, list[int | str]] = {"variance": [*shape], "neurons": [shape[0], self.graph.d_model]}
        shapes["within_heads"] = ["P", "P", shape[1]]
        object.__setattr__(self, "values", numbers("score values", self.values, shape, " [senders, receivers]"))
        for name, tensor in self.statistics().items():
            object.__setattr__(self, name, numbers(name, tensor, shapes.get(name, ["N", *shape])))

    def statistics(self) -> dict[str, Tensor]:
        """What was kept, by name: of `variance` and the fields after it."""
        kept = {name: getattr(self, name) for name in STATISTICS}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    @known_arguments
    def select(
        self,
        n_edges: int | None = None,
        how: str = "top",
        signed: bool = False,
        threshold: float | None = None,
        prune: bool = True,
        positive_ratio: float | None = None,
        among: Tensor | None = None,
        seconds: float = SECONDS,
        exactly: bool = False,
    ) -> Circuit:
        """Choose a circuit.

        Args:
            n_edges: how many edges to take before pruning, which leaves fewer; see `exactly`.
            how: "top" takes the highest scores anywhere; "greedy" grows from the logits, so that every edge taken
                leads to one taken before (EAP-IG's `apply_greedy`); "optimal" takes at most `n_edges` edges, all on
                paths from `input` to `logits`, with the greatest sum (needs scipy; `info["selection"]["gap"]` is 0 if
                that is proven, else the share of the greatest sum that may be missing); "threshold" takes every
                score ≥ `threshold`.
            signed: rank by the score itself; by default by its absolute value.
            threshold: the least score kept, for how="threshold".
            prune: remove edges that are on no path from `input` to `logits`.
            positive_ratio: first take this share of the edges by highest positive score, then the others by largest
                absolute score (Nikankin et al. 2025, arXiv 2510.25786); for how="top".
            among: bool [S, R], the only edges that may be taken, such as `scores.confidence() >= 0.95`.
            seconds: how long "optimal" may search.
            exactly: the circuit has exactly `n_edges` edges, all on paths from `input` to `logits`. The strongest edges
                are taken until at least this many of them are on paths. Then the weakest that the others do not need
                are left out again. If that misses the number, the strongest that fit are put in. If no such circuit is
                found, the result has fewer edges, with a warning.

        Raises:
            InputError: an unknown `how`, a size outside the graph, scores that are not finite, a mask of another shape.
        """
        return self._selected([n_edges], how, signed, threshold, prune, positive_ratio, among, seconds, exactly)[0]

    @known_arguments
    def select_sizes(
        self,
        n_edges: Sequence[int],
        how: str = "top",
        signed: bool = False,
        among: Tensor | None = None,
    ) -> tuple[Circuit, ...]:
        """A circuit of each of these sizes, as `select` chooses them, from scores that are sorted once.

        Raises:
            InputError: what `select` refuses.
        """
        sizes = listed("n_edges", n_edges, "a list of whole numbers")
        return self._selected(sizes, how, signed, None, True, None, among, SECONDS, False)

    def _selected(
        self,
        sizes: Sequence[int | None],
        how: str,
        signed: bool,
        threshold: float | None,
        prune: bool,
        positive_ratio: float | None,
        among: Tensor | None,
        seconds: float,
        exactly: bool,
    ) -> tuple[Circuit, ...]:
        signed, prune, exactly = flag("signed", signed), flag("prune", prune), flag("exactly", exactly)
        if exactly and not prune:
            raise expected("select(exactly=True)", "prune=True, as all its edges are on paths", "prune=False")
        seconds = number("seconds", seconds, "a number of at least 0", 0)
        if threshold is not None:
            threshold = number("threshold", threshold, "a number")
        if positive_ratio is not None:
            positive_ratio = number("positive_ratio", positive_ratio, "a share from 0 to 1", 0, 1)
        chosen = select_edges(
            self.graph, self.values, sizes, how, signed, threshold, positive_ratio, among, seconds, exactly
        )
        selection: dict[str, Any] = {"how": how, "n_edges": None, "threshold": threshold, "signed": signed}
        if positive_ratio is not None:
            selection["positive_ratio"] = positive_ratio
        if among is not None:
            selection["among"] = int((among.cpu() & self.graph.edge_mask).sum())
        circuits = []
        for n in sizes:
            mask, gap = chosen.pop(0)  # of which there may be many, and large ones
            info = {**selection, "n_edges": None if n is None else int(n)}
            if gap is not None:
                info["gap"] = gap
            if exactly:
                info["exactly"] = True
                if (found := int(mask.sum())) != n:
                    warn(
                        f"select(n_edges={n}, exactly=True): found no circuit of this many edges on paths from input "
                        f"to logits; this one has {found}."
                    )
            mask = pruned(self.graph, mask) if prune else mask
            circuits.append(Circuit(self.graph, mask, self.values, {**self.info, "selection": info}))
        return tuple(circuits)

    def top_edges(self, n: int = 20) -> list[tuple[str, str, float]]:
        """The n edges of largest absolute score: (sender, receiver, score)."""
        n = min(whole("n", n, 0), self.graph.n_edges)
        ((mask, _),) = select_edges(self.graph, self.values, [n], "top", False)
        u, v = mask.nonzero(as_tuple=True)
        values = self.values[u, v]
        order = values.abs().argsort(descending=True, stable=True)
        return [(self.graph.senders[u[i]], self.graph.receivers[v[i]], float(values[i])) for i in order]

    def top_within_heads(self, n: int = 20) -> list[tuple[str, str, float]]:
        """The n largest scores inside heads by absolute value: (input and the key's span, the query's span, score).

        Raises:
            InputError: no scores inside heads were kept.

        Example:
            >>> scores = eap.attribute(model, spanned, keep="within-heads")
            >>> read, where, score = scores.top_within_heads(5)[0]  # "a1.h0<v>@giver", "end"
        """
        spans = self.info.get("spans")
        if self.within_heads is None or not isinstance(spans, dict):
            raise expected("top_within_heads()", 'scores of attribute(keep="within-heads")', "others")
        order = self.within_heads.flatten().abs().argsort(descending=True, stable=True)[: whole("n", n, 0)]
        places = zip(*torch.unravel_index(order, self.within_heads.shape), strict=True)
        names, receivers = spans["names"], self.graph.receivers
        return [(f"{receivers[v]}@{names[p]}", names[q], float(self.within_heads[q, p, v])) for q, p, v in places]

    def confidence(self) -> Tensor:
        """How sure the sign of each score is, float64 [S, R] from 0 to 1: for `select(among=… >= 0.95)`.

        It is `bootstrap_confidence` of the examples' scores if they were kept, else `normal_confidence` of their
        variance.

        Raises:
            InputError: neither was kept, or there are fewer than two examples.
        """
        if self.per_example is not None:
            return bootstrap_confidence(self.per_example)
        if self.variance is None or "n_examples" not in self.info:
            raise expected("confidence()", 'scores of attribute(keep="variance") or keep="examples"', "neither")
        return normal_confidence(self.values, self.variance, self.info["n_examples"])

    def node_scores(self) -> NodeScores:
        """Scores of the nodes: each the sum over its outgoing edges, which is exact for every gradient method.

        Raises:
            InputError: a method whose edge scores do not add up to node scores.
        """
        if not self.info.get("additive", True):
            raise expected("node_scores()", "scores of a gradient method", repr(self.info.get("method")))
        return NodeScores(self.graph, self.values.double().sum(1).float(), self.neurons, self.info)

    def by_span(self) -> EdgeScores:
        """The scores of every edge at every span: of a graph that has each node once for each span.

        Raises:
            InputError: no scores of spans were kept.
        """
        spans = self.info.get("spans")
        if self.per_span is None or not isinstance(spans, dict):
            raise expected("by_span()", 'scores of attribute(keep="spans")', "others")
        graph = self.graph.with_spans(Spans(**spans))
        return EdgeScores(graph, graph.to_spans(self.per_span), self.info)

    def across_spans(self) -> EdgeScores:
        """What `by_span` was made of: the position-blind scores, of the graph without spans, and each span's."""
        each = self.graph.per_span(self.values)
        return EdgeScores(self.graph.base, each.double().sum(0).to(each.dtype), self.info, per_span=each)

    def to_kv(self) -> EdgeScores:
        """Query-head scores summed over each group: the scores of the kv graph.

        The variance of a sum is known only if the examples' scores were kept.
        """
        if self.graph.heads == "kv":
            return self
        kv, summed = self.graph.with_heads("kv"), self.graph.to_kv
        parts = self.per_example, self.per_position, self.per_span, self.within_heads
        examples, positions, spans, inside = (None if x is None else summed(x) for x in parts)
        variance = None if self.variance is None or examples is None else examples.var(0, correction=0)
        kept = {"per_position": positions, "neurons": self.neurons, "per_span": spans, "within_heads": inside}
        return EdgeScores(kv, summed(self.values), self.info, variance, examples, **kept)

    def to_pandas(self) -> Any:
        """A pandas DataFrame of all edges: sender, receiver, score and, if the variance was kept, standard_error."""
        error = {}
        if self.variance is not None and "n_examples" in self.info:
            error["standard_error"] = (self.variance / self.info["n_examples"]).sqrt()
        return exports.to_frame(self.graph, self.graph.edge_mask, {"score": self.values, **error})

    def plot(self, n_edges: int = 100) -> Figure:
        """A picture of the strongest edges, pruned as a circuit."""
        return self.select(n_edges=min(whole("n_edges", n_edges, 0), self.graph.n_edges)).plot(n_edges)

    def heatmap(self) -> Figure:
        """Layers × heads and MLPs: the sum of the scores of each node's outgoing edges."""
        return drawn("draw_heatmap", self.graph, self.values.double().sum(1))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `.safetensors`, or EAP-IG's `.json` or `.pt`; whole or not at all."""
        content = formats.Content(self.graph, {"values": self.values, **self.statistics()}, self.info)
        formats.save(path, "scores", content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EdgeScores:
        """Read what `save` or EAP-IG wrote; nothing is unpickled. Raises `InputError` for anything else."""
        graph, tensors, info = formats.load(path)
        if "values" not in tensors:
            found = "a circuit with only its own edges' scores" if "kept" in tensors else "a circuit without scores"
            raise expected(str(path), "a file with edge scores", found)
        return cls(graph, tensors["values"], info, **{name: tensors.get(name) for name in STATISTICS})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str = "scores.safetensors",
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Write the scores to a repository of the Hugging Face Hub, as a file that `from_pretrained` reads.

        Args:
            repo_id: "user/name"; made if it is missing.
            filename: the file's name, with a suffix that `save` knows; an existing file gets a new revision.
            private: of a repository that is made: whether others may read it; by default as the account has it.
            revision: the branch; by default "main".
            token: by default that of `hf auth login`.

        Returns:
            The commit's address.

        Raises:
            InputError: scores that cannot be saved, or a repository that cannot be written to.

        Example:
            >>> scores.push_to_hub("me/gpt2-ioi-scores")
            >>> scores == eap.EdgeScores.from_pretrained("me/gpt2-ioi-scores")
            True
        """
        return hub.upload(self.save, repo_id, filename, private, revision, token)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        filename: str = "scores.safetensors",
        revision: str | None = None,
        token: str | None = None,
    ) -> EdgeScores:
        """Read scores from a folder or from a repository of the Hugging Face Hub, as `push_to_hub` writes them.

        Args:
            name: a folder, or "user/name".
            filename: which of its files.
            revision: a branch, tag or commit; by default the newest.
            token: for private repositories; by default that of `hf auth login`.

        Raises:
            InputError: no such folder, repository or file, or a file that holds no scores.
        """
        return cls.load(hub.found(name, filename, revision, token))

    def __repr__(self) -> str:
        return f"EdgeScores({self.info.get('method', '?')}, {self.graph!r})"
