"""The specification: what the package computes, head by head in plain PyTorch, without a hook, a cache or a batch.

Every receiver v of a run reads x_v = read(v, c), where c are the contributions of the senders before it:

    the model's run        x_v = Σ_u c_u                                 plain_run(decoder, embeddings)
    a circuit's run        x_v = Σ_u m[u, v]·c_u + (1 − m[u, v])·c'_u    … with read=of_circuit(m, c')
    a receiver's gradient  ∂loss/∂x_v(t)                                 gradients(loss, plain_run(…).x)
    a score                Σ_t ⟨Δ_u(t), Σ_k w_k ∂loss/∂x_v(t)⟩           scores(delta, points, loss)

Words and shape letters are those of ARCHITECTURE.md; senders and receivers are in the graph's order. decoders.py has
the pieces of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests.circuits.decoders import Decoder

Read = Callable[[int, list[Tensor]], Tensor]


class Run(NamedTuple):
    """One prompt's run, with its autograd graph."""

    x: list[Tensor]  # what every receiver reads, [R] of [T, D]
    c: list[Tensor]  # what every sender contributes, [S] of [T, D]
    logits: Tensor  # after the last token, [V], or after each scored one, [P, V]


def of_model(v: int, c: list[Tensor]) -> Tensor:
    return torch.stack(c).sum(0)


def of_circuit(m: Tensor, ablated: Sequence[Tensor]) -> Read:
    """Of a mask [S, R], or one for every token [S, R, T], and what every sender contributes where an edge is ablated,
    [S] of [T, D]."""
    m, ablated = (m if m.dim() == 3 else m[..., None]).double()[..., None], torch.stack(list(ablated))

    def read(v: int, c: list[Tensor]) -> Tensor:
        kept = m[: len(c), v]
        return (kept * torch.stack(c) + (1 - kept) * ablated[: len(c)]).sum(0)

    return read


def of_moved(group: Sequence[int], alpha: float, clean: Run, delta: Tensor) -> Read:
    """Of the model, except for a group of senders: they contribute c_u(x) + (1 − α) Δ_u."""
    moved = {u: clean.c[u].detach() + (1 - alpha) * delta[u] for u in group}
    return lambda v, c: sum(moved.get(u, own) for u, own in enumerate(c))


def plain_run(decoder: Decoder, embeddings: Tensor, read: Read = of_model, scored: int | list[int] = -1) -> Run:
    """The run of one prompt, given its embeddings [T, D]."""
    x, c = [], [embeddings]
    fixed = decoder.positions(len(embeddings))  # what no sender contributes

    def take() -> Tensor:
        x.append((read(len(x), c) + fixed).requires_grad_())
        return x[-1]

    H, n = decoder.n_heads, decoder.n_inputs
    for layer in decoder.layers:
        q = decoder.project(layer, "q", [take() for _ in range(H)])
        k = decoder.project(layer, "k", [take() for _ in range(n)])
        v = decoder.project(layer, "v", [take() for _ in range(n)])
        z = [decoder.attend(layer, q[h], k[h * n // H], v[h * n // H]) for h in range(H)]
        beside = take() if decoder.parallel else None
        c += decoder.heads(layer, z)
        fixed = fixed + decoder.bias(layer)
        c.append(decoder.mlp(layer, take() if beside is None else beside))
    return Run(x, c, decoder.unembed(take()[scored]))


def gradients(loss: Tensor, x: list[Tensor]) -> Tensor:
    """∂loss/∂x_v(t) of every receiver, [R, T, D]: as x_v alone changes, and what follows from it. Of c, ∂loss/∂c_u."""
    return torch.stack(torch.autograd.grad(loss, x, retain_graph=True, materialize_grads=True))


def differences(clean: Run, corrupted: Run) -> Tensor:
    """Δ_u(t), [S, T, D]."""
    return (torch.stack(corrupted.c) - torch.stack(clean.c)).detach()


def scores(delta: Tensor, points: Iterable[tuple[float, Run]], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """S[u, v] of one prompt pair from (w_k, run) of every path point, [S, R]; also where no edge is."""
    return sum(w * torch.einsum("utd,vtd->uv", delta, gradients(loss(at.logits), at.x)) for w, at in points)
