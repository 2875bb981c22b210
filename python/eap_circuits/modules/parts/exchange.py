"""What the ranks of a tensor parallel model send each other for our hooks: parts of features, and of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import expected
from .weights import mesh_of

_Way = Callable[[Tensor], Tensor]


class Shares:
    """The last dimension of tensors, features, is divided evenly among the ranks that divide a module.

    What each method gives has the gradient that one process would find. If there is no module, there is one rank, which
    is given back what it has.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.size, self.rank = 1, 0
        self._group: Any = None
        if module is not None:
            mesh = mesh_of(module)
            self.size, self.rank, self._group = mesh.size(), mesh.get_local_rank(), mesh.get_group()

    def parts(self, number: int) -> list[slice]:
        """Each rank's of so many things, as evenly as it goes."""
        ends = [number * rank // self.size for rank in range(self.size + 1)]
        return [slice(*both) for both in pairwise(ends)]

    def here(self, number: int) -> slice:
        """This rank's of these parts."""
        return self.parts(number)[self.rank]

    def own(self, x: Tensor) -> Tensor:
        """This rank's features of x [..., F], which all have."""
        return self._exchange(x, self._pick, self._gather)

    def whole(self, x: Tensor) -> Tensor:
        """All ranks' features, for this rank's x."""
        return self._exchange(x, self._gather, self._pick)

    def dealt(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """This rank's rows, with all features, of x [rows, ...], its features of all ranks' rows.

        Args:
            rows: how many are each rank's; one's stand before the next one's.
        """
        return self._exchange(x, partial(self._deal, rows), partial(self._collect, rows))

    def joined(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """All ranks' rows, for this rank's x [rows, ...]; see `dealt`."""
        end = list(accumulate(rows))[self.rank]
        return self._exchange(x, partial(self._join, rows), lambda y: y[end - rows[self.rank] : end].contiguous())

    def summed(self, x: Tensor) -> Tensor:
        """x itself, for work that is divided: each rank's gives another part of its gradient, which are added up."""
        return self._exchange(x, lambda x: x, self._add_up)

    def _exchange(self, x: Tensor, there: _Way, back: _Way) -> Tensor:
        if self.size == 1:
            return x
        y: Tensor = _Exchange.apply(x, there, back)
        return y

    def _pick(self, x: Tensor) -> Tensor:
        return x.chunk(self.size, -1)[self.rank].contiguous()

    def _gather(self, x: Tensor) -> Tensor:
        """[..., f] of each rank, side by side."""
        from torch.distributed import all_gather_into_tensor

        every = x.new_empty((self.size, *x.shape))
        if x.numel():
            all_gather_into_tensor(every.flatten(0, 1), x.contiguous(), group=self._group)
        return every.movedim(0, -2).flatten(-2)

    def _deal(self, rows: Sequence[int], x: Tensor) -> Tensor:
        from torch.distributed import all_to_all_single

        own = rows[self.rank]
        found = x.new_empty((self.size * own, *x.shape[1:]))
        all_to_all_single(found, x.contiguous(), [own] * self.size, list(rows), group=self._group)
        return found.unflatten(0, (self.size, own)).movedim(0, -2).flatten(-2)

    def _collect(self, rows: Sequence[int], y: Tensor) -> Tensor:
        """The inverse of `_deal`."""
        from torch.distributed import all_to_all_single

        parts = y.unflatten(-1, (self.size, -1)).movedim(-2, 0).flatten(0, 1)
        found = y.new_empty((sum(rows), *parts.shape[1:]))
        all_to_all_single(found, parts.contiguous(), list(rows), [rows[self.rank]] * self.size, group=self._group)
        return found

    def _join(self, rows: Sequence[int], x: Tensor) -> Tensor:
        from torch.distributed import all_gather_into_tensor

        most = max(rows)
        padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        every = x.new_empty((self.size * most, *x.shape[1:]))
        all_gather_into_tensor(every, padded, group=self._group)
        return torch.cat([part[:some] for part, some in zip(every.split(most), rows, strict=True)])

    def _add_up(self, x: Tensor) -> Tensor:
        from torch.distributed import all_reduce

        y = x.clone(memory_format=torch.contiguous_format)
        all_reduce(y, group=self._group)
        return y


class Split:
    """Features of a tensor parallel module, its inputs or outputs, around the hooks of one pass.

    It shows hooks all heads' features, so that a rank sees what one process would, and gives the module back its own.
    So every gradient that a hook sees is whole, too.

    Args:
        module: the module.
        width: how many features all ranks have together.
        name: the module's, for messages.
    """

    def __init__(self, module: nn.Module, width: int, name: str) -> None:
        self._shares, self._width, self._name = Shares(module), width, name
        self._parted = False

    def whole(self, x: Tensor) -> Tensor | None:
        """All ranks' features, for this rank's x [..., features]; None if they are all here, as some plans have it."""
        self._parted, shares = x.shape[-1] != self._width, self._shares
        if self._parted and x.shape[-1] * shares.size != self._width:
            found = f"{x.shape[-1]} on rank {shares.rank} of {shares.size}"
            raise expected(self._name, f"{self._width} features, divided evenly among the ranks", found)
        return shares.whole(x) if self._parted else None

    def own(self, x: Tensor) -> Tensor | None:
        """This rank's features again; None if they were not put together."""
        return self._shares.own(x) if self._parted else None


class _Exchange(torch.autograd.Function):
    """One way for values, the other for their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: _Way, back: _Way) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None
