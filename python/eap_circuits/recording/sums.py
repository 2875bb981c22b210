"""Does what senders write add up to what receivers read, and do they read nothing else?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..adapters import Norm, ReceiverSite, SenderSite, receiver_sites, sender_sites
from ..forward import Hooks, Runner
from .contributions import BothSides, record_both_sides


class Sum(NamedTuple):
    """What receivers that share a norm read, at a batch's rows.

    Args:
        site: the receivers.
        difference: of the residual stream between the two runs, its norm.
        missing: what the sum of Δ of the senders before them lacks of it.
        size: the norms of the stream itself in both runs together.
    """

    site: ReceiverSite
    difference: float
    missing: float
    size: float


def compare_sums(runner: Runner) -> tuple[list[Sum], BothSides]:
    """(The sum at every norm, what else the pass recorded); one pass of both sides of the batch."""
    arch, graph = runner.arch, runner.arch.graph("kv")
    sites = {site.norm: site for site in receiver_sites(arch, graph)}
    streams: dict[Norm, Tensor] = {}  # of the corrupted and the clean run, [2, n, D]

    def see(norm: Norm, x: Tensor) -> None:
        streams[norm] = runner.batch.at(sites[norm].stream).active(x).to(arch.device, arch.accumulate)

    def register(hooks: Hooks) -> None:
        for norm in sites:
            hooks.on_input(norm.module, partial(see, norm))

    sides, found = record_both_sides(runner, None, register), list[Sum]()
    for number, reach, total in _sums(runner, sides):
        for norm, site in sites.items():
            if (site.stream, site.reach) == (number, reach):
                corrupted, clean = streams[norm]
                missing = corrupted - clean - total
                size = float(corrupted.norm() + clean.norm())
                found.append(Sum(site, float((corrupted - clean).norm()), float(missing.norm()), size))
    return found, sides


def reads_past_receivers(runner: Runner) -> str | None:
    """The first sender that depends on the residual stream in another way than through receivers; one clean pass.

    What receivers read is cut off the stream in the graph of gradients, so nothing that a sender writes may lead there.
    No gradient is computed, and nothing kept for one.
    """
    arch, graph = runner.arch, runner.arch.graph("kv")
    streams: dict[nn.Module, Tensor] = {}  # what layers read
    found: list[int] = []

    def begin(layer: nn.Module, x: Tensor) -> Tensor:
        streams[layer] = x.detach().requires_grad_()
        return streams[layer].view_as(x)  # a model may change it in place, which a leaf forbids

    def see(site: SenderSite, x: Tensor) -> None:
        # The norm with which the next layer begins may be the last part of this one's MLP.
        if _leads_to(x, [streams[layer.module] for layer in arch.layers[: site.layer + 1]]):
            found.append(site.senders.start)

    def register(hooks: Hooks) -> None:
        for module in dict.fromkeys(layer.module for layer in arch.layers):
            hooks.on_input(module, partial(begin, module))
        for index, layer in enumerate(arch.layers):
            for module in layer.projection_modules:
                hooks.on_output(module, Tensor.detach)
            if graph.has_mlp(index):
                hooks.on_input(layer.mlp_in, Tensor.detach)
        for site in sender_sites(arch):
            hooks.on_senders(site, partial(see, site))

    nothing = saved_tensors_hooks(lambda _: None, lambda _: torch.empty(0))
    with torch.enable_grad(), nothing:
        runner.logits(runner.embed(runner.batch.clean).detach(), register)
    return graph.senders[min(found)] if found else None


def _leads_to(x: Tensor, leaves: list[Tensor]) -> bool:
    """Is x made of any of these, in the graph of gradients?"""
    ahead, seen = [x.grad_fn], set[Any]()
    while ahead:
        node: Any = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(getattr(node, "variable", None) is leaf for leaf in leaves):
            return True
        ahead += [after for after, _ in node.next_functions]
    return False


def _sums(runner: Runner, sides: BothSides) -> Iterator[tuple[int, int, Tensor]]:
    """(The stream, how many senders, the sum of their Δ [n, D]) behind each sender or layer's heads."""
    arch, sites = runner.arch, sides.senders.sites
    total: Tensor | float = 0.0
    for site, each in zip(sites, sides.senders.lowered(arch.accumulate)(slice(None)), strict=True):
        written = each.values.flatten(1) if each.weight is None else each.values.flatten(1) @ each.weight.flatten(0, 1)
        total = written.to(arch.device) + (0.0 if site.begins else total)
        yield site.stream, site.senders.stop, total
