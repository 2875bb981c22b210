"""What an attribution method is, and what it is asked.

The kinds of methods are subclasses in modules of their own: gradients along a path, information flow, exact patching.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from ..checkpoint import Checkpoint
from ..graph import Graph
from ..recording import Rules
from ..request import Progress, Request
from .quadrature import Path

if TYPE_CHECKING:
    from .statistics import Statistics

KEEP = ("variance", "examples", "positions", "positions-from-end", "spans", "neurons", "within-heads")
Tier = Literal["stable", "experimental"]
# On a GPU rows that are expanded where senders meet receivers have this share of a user's budget: at least what keeps a
# kernel busy, and at most what makes launches cost nothing.
_SHARE, _LEAST, _MOST = 8, 2**26, 2**32


@dataclass(frozen=True, kw_only=True)
class AttributionRequest(Request):
    """What `attribute` and `plan` are asked, checked.

    Args:
        graph: whose edges are scored.
        method: how.
        path: the points and weights of a gradient method.
        compat: "eap-ig" for the published package's definition.
        rules: what takes the gradient's place in backward passes.
        keep: which of `KEEP`.
        edges: bool [S, R], those that "exact" measures.
        only_memory: whether only the memory counts that a run takes: of steps that take alike, one is enough.
    """

    graph: Graph
    method: Method
    path: Path
    compat: str | None
    rules: Rules | None
    keep: frozenset[str]
    edges: Tensor
    only_memory: bool = False

    @property
    def workspace(self) -> int | None:
        """Bytes of expanded rows that `head_space_scores` may hold; None: its default, for which a budget that is only
        half of what is free leaves room."""
        if self.memory is None or self.arch.device_kind != "cuda":
            return None
        return min(max(self.memory // _SHARE, _LEAST), _MOST)


@dataclass(frozen=True)
class Method(ABC):
    """An attribution method.

    Args:
        name: what it is called by.
        description: one line.
        passes: what it costs, in passes of the model over the data.
        tier: "stable": the definition will not change; "experimental": it may, with a note in the changelog.
    """

    name: str
    description: str
    passes: str
    tier: Tier

    # What methods of a kind can do: compare runs by a metric, take ablations other than patching, run prefixes once,
    # run backward passes, score only some edges, tell in `plan` what memory they will take; and what they can keep
    # besides the scores' mean.
    measures: ClassVar[bool] = True
    ablated: ClassVar[bool] = True
    reuses: ClassVar[bool] = True
    backward: ClassVar[bool] = False
    selective: ClassVar[bool] = False
    planned: ClassVar[bool] = False
    keeps: ClassVar[tuple[str, ...]] = ()

    @property
    def stepped(self) -> bool:
        """Does `steps=` matter?"""
        return False

    @property
    def grids(self) -> bool:
        """Does `quadrature=` matter?"""
        return False

    def between_prompts(self, steps: int, quadrature: str) -> bool:
        """Does anything run on a path between the embeddings of the two prompts?"""
        return False

    @abstractmethod
    def operator(self, request: AttributionRequest) -> str:
        """What computes scores from the model's passes, as results name it under "backend"."""

    @abstractmethod
    def run(
        self, request: AttributionRequest, statistics: Statistics, checkpoint: Checkpoint, progress: Progress | None
    ) -> None:
        """Add the scores of all examples to `statistics`, going on from the checkpoint and saving to it."""
