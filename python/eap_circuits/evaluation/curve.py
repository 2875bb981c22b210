"""Faithfulness by circuit size, and the two areas that summarise it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..checkpoint import Where
from ..display import Result, drawn, library
from ..errors import SEEDS, expected, flag, growing_shares, instance, known_arguments, listed, one_of, whole
from ..forward import Constants, one_want_of_memory
from ..graph import Circuit, EdgeScores, NodeScores
from ..provenance import COMMAND, called
from ..ranks import together
from ..request import Progress
from ..tasks import PairedDataset
from .baselines import BASELINES, Baseline, cmd, cpr
from .faithfulness import EvaluationResult, evaluate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Curve(Result):
    """Circuits of growing size by the same scores, and their faithfulness.

    `fractions` are the shares asked for, of all edges, or by scores of nodes of all heads and MLPs; `n_edges` are the
    numbers of edges left after pruning; `baselines` holds the baselines that were measured, by name; `info` says what
    ran, and where the scores came from.
    """

    fractions: tuple[float, ...]
    circuits: tuple[Circuit, ...]
    results: tuple[EvaluationResult, ...]
    baselines: dict[str, Baseline] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def n_edges(self) -> tuple[int, ...]:
        return tuple(circuit.n_edges for circuit in self.circuits)

    @property
    def faithfulness(self) -> tuple[float, ...]:
        return tuple(result.faithfulness for result in self.results)

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each circuit's metric."""
        return tuple(result.mean for result in self.results)

    @property
    def clean(self) -> float:
        """The mean of the whole model's metric."""
        return self.results[0].clean

    @property
    def corrupted(self) -> float:
        """The mean of the metric with every edge ablated."""
        return self.results[0].corrupted

    @property
    def cpr(self) -> float:
        """Integrated circuit performance ratio of MIB (arXiv 2504.13151, §3): ∫ f(C_k) dk, more is better.

        f is faithfulness, C_k the circuit with a share k of all edges, or nodes. The integral is taken by the trapezoid
        rule over `fractions`, by default MIB's. MIB ranks by the signed score for CPR: pass `signed=True` to compare
        with it.
        """
        return cpr(self.fractions, self.faithfulness)

    @property
    def cmd(self) -> float:
        """Integrated circuit–model distance of MIB (arXiv 2504.13151, §3): ∫ |1 − f(C_k)| dk, 0 is best.

        MIB ranks edges by the absolute score for CMD, which is the default here.
        """
        return cmd(self.fractions, self.faithfulness)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "fractions": list(self.fractions),
            "n_edges": list(self.n_edges),
            "faithfulness": list(self.faithfulness),
            "mean": list(self.mean),
            "clean": self.clean,
            "corrupted": self.corrupted,
            "cpr": self.cpr,
            "cmd": self.cmd,
            "baselines": {name: baseline.to_dict() for name, baseline in self.baselines.items()},
            "info": self.info,
        }

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each size: fraction, n_edges, faithfulness, mean, and a column with each
        baseline's faithfulness."""
        columns = {"fraction": self.fractions, "n_edges": self.n_edges, "faithfulness": self.faithfulness}
        columns["mean"] = self.mean
        others = {name: baseline.faithfulness for name, baseline in self.baselines.items()}
        return library("pandas", "to_pandas()").DataFrame({**columns, **others})

    def plot(self) -> Figure:
        """Faithfulness against the number of edges kept. See `report.draw_curve`."""
        return drawn("draw_curve", self)

    def __repr__(self) -> str:
        return f"Curve({len(self.fractions)} circuits, cpr={self.cpr:.4g}, cmd={self.cmd:.4g})"


@together
@known_arguments
@one_want_of_memory
def faithfulness_curve(
    model: nn.Module,
    scores: EdgeScores | NodeScores,
    data: PairedDataset,
    fractions: Sequence[float] = FRACTIONS,
    *,
    metric: Any = None,
    how: str = "top",
    signed: bool = False,
    ablation: str | Constants = "patching",
    batch_size: int | None = None,
    reuse_prefix: bool = True,
    progress: Progress | bool | None = None,
    baselines: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    ablation_data: PairedDataset | None = None,
    among: Tensor | None = None,
    memory: int | str | None = None,
    checkpoint: Where = None,
) -> Curve:
    """Select circuits of several sizes and measure the faithfulness of each, in one pass over the data.

    Faithfulness is (m(C) − m(∅)) / (m(M) − m(∅)): C the circuit, M the whole model, ∅ the run with all edges ablated.

    Args:
        scores: edge scores of this model, or its node scores: then circuits are those of `NodeScores.select`.
        fractions: shares of all edges, or of all heads and MLPs, growing, each in (0, 1].
        how, signed: as in `EdgeScores.select` ("top" or "greedy"; of nodes only "top").
        model, data, metric, ablation, batch_size, reuse_prefix, progress, ablation_data, memory, checkpoint: as in
            `evaluate`.
        baselines: what else to measure at every size: "random" (connected circuits with as many edges), "complement"
            (all other edges). Each costs about as much as the curve, "random" for every seed.
        seeds: one random circuit is drawn for each seed and size.
        among: as in `EdgeScores.select`, of edges only; larger sizes take all edges of `among`.

    Raises:
        InputError: fractions that do not grow within (0, 1], an unknown baseline, no seeds, or anything that
            `evaluate` or `select` refuses.

    Example:
        >>> curve = eap.faithfulness_curve(model, scores, data, (0.1, 0.5, 1), baselines=["random"])
        >>> curve.cpr, curve.cmd, curve.baselines["random"].cpr
    """
    call = called(faithfulness_curve, locals())
    if not isinstance(scores, NodeScores):
        instance("scores", scores, EdgeScores, "EdgeScores, such as attribute returns")
    signed, fractions = flag("signed", signed), growing_shares("fractions", fractions)
    baselines = listed("baselines", baselines, "a list of names")
    for name in baselines:
        one_of("baselines", name, BASELINES)
    seeds = tuple(whole("seeds", seed, *SEEDS) for seed in listed("seeds", seeds, "a list of whole numbers"))
    if not seeds and any(BASELINES[name].drawn for name in baselines):
        raise expected("seeds", "at least one", "none")
    if isinstance(scores, NodeScores):
        if how != "top" or among is not None:
            raise expected("scores", "EdgeScores with another how than 'top', or with among", "NodeScores")
        nodes = scores.graph.n_senders - len(scores.graph.input_senders)
        how, circuits = "nodes", tuple(scores.select(int(f * nodes), signed) for f in fractions)
    else:
        circuits = scores.select_sizes([int(f * scores.graph.n_edges) for f in fractions], how, signed, among)
    others = {name: BASELINES[name].circuits(circuits, seeds) for name in baselines}
    rows = [circuits, *(row for draws in others.values() for row in draws)]
    flat = evaluate(
        model,
        [circuit for row in rows for circuit in row],
        data,
        metric,
        ablation=ablation,
        batch_size=batch_size,
        reuse_prefix=reuse_prefix,
        progress=progress,
        ablation_data=ablation_data,
        memory=memory,
        checkpoint=checkpoint,
    )
    results = iter([tuple(flat[first : first + len(circuits)]) for first in range(0, len(flat), len(circuits))])
    own = next(results)
    measured = {name: Baseline(fractions, draws, tuple(next(results) for _ in draws)) for name, draws in others.items()}
    asked = {"call": COMMAND.get() or call, "how": how, "signed": signed, "seeds": list(seeds) if baselines else None}
    return Curve(fractions, circuits, own, measured, {**flat[0].info, **asked, "scores": scores.info})
