"""The specification: every operator in plain PyTorch, on any device, in any floating dtype."""

from functools import partial
from typing import Any

from eap_kernels._schemas import tf32
from eap_kernels.reference import collapse, edge_scores, head_space_scores, masked_read, normalise_rows


class Backend:
    """One way to compute the operators. This class itself is the reference.

    Every other backend is a subclass in its own folder and an entry of `_registry.BACKENDS`. It overrides the operators
    that it has; the others run as here. An operator's arguments are those of its plain overload in `_schemas`, already
    checked, with reach and segments on the CPU.
    """

    name = "reference"
    edge_scores = staticmethod(edge_scores.edge_scores)
    masked_read = staticmethod(masked_read.masked_read)
    normalise_rows = staticmethod(normalise_rows.normalise_rows)
    collapse = staticmethod(collapse.collapse)

    @property
    def device(self) -> str | None:
        """The type of device whose tensors it takes; None for any."""
        return None

    def missing(self) -> str | None:
        """Why it cannot run on this machine, in one clause; None if it can."""
        return None

    def head_space_scores(self, *args: Any) -> None:
        """Expand tiles with the library's batched product and contract them with the backend's `edge_scores`."""
        contract = partial(self.edge_scores, tf32=tf32())
        # On a GPU tiles keep the operands' dtype, because tensor cores multiply that dtype.
        partial(head_space_scores.head_space_scores, contract=contract, rounded=args[0][0].is_cuda)(*args)
