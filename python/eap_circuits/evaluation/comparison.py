"""Compare two circuits: what they share, and how faithful each is on the other's task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..display import Result, drawn, library
from ..errors import known_arguments
from ..graph import Circuit, Overlap, edge_overlap, node_overlap
from ..ranks import together
from ..request import check_kind
from ..tasks import PairedDataset
from .faithfulness import EvaluationResult, evaluate, to_evaluate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """Overlap of two circuits and their results on both tasks.

    `results[i][j]` is circuit i on task j. The paper (arXiv 2403.17806, §5) argues that the off-diagonal faithfulness,
    not the overlap, tells whether two circuits do the same.
    """

    nodes: Overlap
    edges: Overlap
    results: tuple[tuple[EvaluationResult, EvaluationResult], tuple[EvaluationResult, EvaluationResult]]

    @property
    def faithfulness(self) -> list[list[float]]:
        """[circuit][task]"""
        return [[result.faithfulness for result in row] for row in self.results]

    def plot(self) -> Figure:
        """A picture: what the circuits share, and each one's faithfulness on both tasks, with the intervals in which it
        stays for 95 % of resamples of the prompt pairs."""
        return drawn("draw_comparison", self)

    def to_pandas(self) -> Any:
        """A pandas DataFrame of a row for each circuit on each task, both 0 or 1: circuit, task, faithfulness, and the
        ends low and high of its interval."""
        rows = [
            (i, j, result.faithfulness, *result.interval)
            for i, row in enumerate(self.results)
            for j, result in enumerate(row)
        ]
        columns = ["circuit", "task", "faithfulness", "low", "high"]
        return library("pandas", "to_pandas()").DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        shared = f"{self.edges.n_shared} edges and {self.nodes.n_shared} nodes shared"
        rows = "; ".join(", ".join(f"{each:.3g}" for each in row) for row in self.faithfulness)
        return f"Comparison({shared}, faithfulness [circuit][task] = [{rows}])"


@together
@known_arguments
def compare(
    model: nn.Module,
    first: Circuit,
    second: Circuit,
    first_data: PairedDataset,
    second_data: PairedDataset,
    *,
    metric: Any = None,
    batch_size: int | None = None,
) -> Comparison:
    """Node and edge overlap of two circuits, and the faithfulness of each on both tasks.

    Args:
        first, second: two circuits of the model's graph.
        first_data, second_data: prompts of the task that each was found on.
        metric: the metric for both tasks; by default each dataset's own.

    Raises:
        InputError: circuits of different graphs, or anything that `evaluate` refuses.

    Example:
        >>> comparison = eap.compare(model, circuit, other_circuit, data, other_data)
        >>> comparison.edges.n_shared, comparison.faithfulness  # [circuit][task]
        >>> comparison.results[0][1].interval  # an error bar: the first circuit on the second task
        >>> comparison.plot()
    """
    for circuit in (first, second):
        check_kind(circuit)
    nodes, edges = node_overlap(first, second), edge_overlap(first, second)
    for data in (first_data, second_data):  # both are checked before anything runs
        to_evaluate([first, second], model, data, metric, "patching", batch_size)
    on_first, on_second = (
        evaluate(model, [first, second], data, metric, batch_size=batch_size) for data in (first_data, second_data)
    )
    return Comparison(nodes, edges, ((on_first[0], on_second[0]), (on_first[1], on_second[1])))
