"""What exact patching has measured: whole batches in the sums, and the edges of the batch that was begun."""

from __future__ import annotations

import torch
from torch import Tensor

from ...budget import zeros
from ...checkpoint import Checkpoint
from ...forward import Batch
from ..statistics import Statistics

_SUMMED = ("total", "squares")


class EdgesMeasured:
    """Edges' scores, put pass by pass and added up batch by batch.

    Wherever an error comes, no edge of an example counts twice and none is lost: an edge's scores are put in place, not
    added, and then it is marked done; until then it can be measured again.

    Args:
        statistics: the sums that finished batches are added to.
        n_examples: E.
        checkpoint: what the same call did before, and where this goes.
    """

    def __init__(self, statistics: Statistics, n_examples: int, checkpoint: Checkpoint) -> None:
        self._sums, self._checkpoint = statistics.sums, checkpoint
        self.finished = torch.zeros(n_examples, dtype=torch.bool)
        # Of the batch that is being measured: its examples, the edges done, and their scores, not yet in the sums.
        self.current = torch.zeros_like(self.finished)
        edges = self._sums["total"].shape
        self.done = zeros(edges, torch.bool)
        self._partial = {name: zeros(edges, torch.float64) for name in _SUMMED if name in self._sums}
        partial = {f"partial {name}": tensor for name, tensor in self._partial.items()}
        own = {"finished": self.finished, "current": self.current, "done": self.done}
        checkpoint.keep({**self._sums, **partial, **own})

    def begin(self, batch: Batch) -> None:
        """Go on with a batch; what has been measured of another one that was not finished is forgotten."""
        examples = torch.zeros_like(self.finished)
        examples[batch.index] = True
        if not torch.equal(examples, self.current):
            # In this order: until the last step the edges of whatever batch is current are simply not done. Where no
            # batch was begun, all is zero, and still takes no memory.
            if self.current.any():
                self.done.zero_()
                for tensor in self._partial.values():
                    tensor.zero_()
            self.current.copy_(examples)

    def put(self, edges: Tensor, batch: Batch, scores: Tensor) -> None:
        """The scores of a pass, float64 [edges, E of the batch], of edges (sender, receiver), int64 [edges, 2]."""
        senders, receivers = edges.T
        self._partial["total"][senders, receivers] = scores.sum(1)
        if "squares" in self._partial:
            self._partial["squares"][senders, receivers] = scores.square().sum(1)
        if "examples" in self._sums:
            self._sums["examples"][batch.index[:, None], senders, receivers] = scores.T.float()
        self.done[senders, receivers] = True
        self._checkpoint.save()

    def finish(self) -> None:
        """All edges of the current batch are done."""
        with self._checkpoint.changing():
            for name, tensor in self._partial.items():
                self._sums[name] += tensor
                tensor.zero_()
            self.finished |= self.current
            self.done.zero_()
            self.current.zero_()
