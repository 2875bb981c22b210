"""Weights of which each rank has a part, by `fully_shard` (FSDP2), by tensor parallelism (a `tp_plan`), or by experts.

Tensor parallelism may divide a model, and `fully_shard` each part again, over the first of a mesh's two dimensions.

With `fully_shard` a pass makes them whole, and activations are whole, too. Tensor parallel modules compute with parts:
of queries, keys, values and what the heads give each rank has its own heads' features; all other activations that we
see, experts' among them, are whole and alike on all ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...ranks import ALONE, Team, count

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of weights that are no codes


def is_shard(x: object) -> bool:
    """Is it a part of a weight, whose others are on other ranks?"""
    # Only what is in parts has made torch import this module.
    kinds = sys.modules.get("torch.distributed.tensor")
    return kinds is not None and isinstance(x, kinds.DTensor)


def is_in_parts(model: nn.Module) -> bool:
    """Has each rank only a part of its weights?"""
    return is_fully_sharded(model) or any(map(is_shard, model.parameters()))


def is_fully_sharded(model: nn.Module) -> bool:
    """Does `fully_shard` keep a part of its weights on each rank? Some may be whole at the moment."""
    kinds = sys.modules.get("torch.distributed.fsdp")
    return kinds is not None and any(isinstance(part, kinds.FSDPModule) for part in model.modules())


def computes_in_parts(module: nn.Module) -> bool:
    """Is it a tensor parallel module, whose forward transformers has wrapped in the exchange that goes with it?"""
    # Norms have another forward during backward rules, and may be in parts by `fully_shard`.
    return "forward" in vars(module) and any(is_shard(x) and x.dim() > 1 for x in module.parameters(recurse=False))


def run_whole(module: nn.Module, *inputs: Tensor) -> Tensor:
    """A module that is run by itself, outside of the model's pass, in which its weights would be made whole."""
    shards = {name: x for name, x in module.named_parameters() if is_shard(x)}
    sharded = is_fully_sharded(module) or any(x.device_mesh.ndim > 1 for x in shards.values())  # type: ignore[attr-defined]
    if not shards or (computes_in_parts(module) and not sharded):
        return module(*inputs)
    whole = {f"module.{name}": x.detach().full_tensor() for name, x in shards.items()}  # type: ignore[attr-defined]
    return torch.func.functional_call(_Alone(module), whole, inputs)


class _Alone(nn.Module):
    """Runs a module without its hooks, with which a pass of the whole model would begin, and without any exchange."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = type(self.module).forward(self.module, *inputs)
        return found


def team(model: nn.Module) -> Team:
    """Which ranks run each pass together, as each has a part of the model's weights."""
    in_step = is_fully_sharded(model)
    for module in filter(computes_in_parts, model.modules()):
        if in_step and _holds_experts(mesh_of(module)):  # over which ranks with other tokens exchange them
            return Team(getattr(model, "_tp_size", None) or 1, in_step)
        ranks: list[int] = mesh_of(module).mesh.flatten().tolist()
        size, start = len(ranks), ranks[0]
        return Team(size if ranks == list(range(start, start + size)) and start % size == 0 else count(), in_step)
    return Team(in_step=True) if in_step else ALONE


def parts_of(module: nn.Module) -> int:
    """Among how many ranks tensor parallelism divides what a module computes."""
    return int(mesh_of(module).size()) if computes_in_parts(module) else 1


def own_features(module: nn.Module, width: int) -> slice:
    """This rank's even part of the residual stream's features, if tensor parallelism divides the module; else all."""
    if not computes_in_parts(module) or width % (mesh := mesh_of(module)).size():
        return slice(None)
    each = width // mesh.size()
    return slice(mesh.get_local_rank() * each, (mesh.get_local_rank() + 1) * each)


def by_features(module: nn.Module, dim: int, features: slice) -> Tensor:
    """Of a weight that ranks divide by heads some of this rank's `own_features`, which are in this dimension.

    All ranks ask at once, each for as many at the same place among its own.
    """
    from torch.distributed import all_to_all_single

    mesh, weight = mesh_of(module), _by_rank(module).to_local().movedim(dim, 0)  # [D, this rank's heads]
    each = len(weight) // mesh.size()
    first = features.start - mesh.get_local_rank() * each
    given = weight.unflatten(0, (-1, each))[:, first : first + features.stop - features.start].contiguous()
    found = torch.empty_like(given)
    all_to_all_single(found, given, group=mesh.get_group())
    return found.movedim(0, 1).flatten(1).movedim(0, dim)


def is_divided(module: nn.Module, dim: int) -> bool:
    """Do ranks divide a tensor parallel module's weight in this dimension?"""
    weight: Any = module.weight if computes_in_parts(module) else None
    return is_shard(weight) and bool(weight.placements[-1].is_shard(dim))


def in_turn(module: nn.Module, dim: int) -> Iterator[tuple[slice, Tensor]]:
    """A weight that ranks divide evenly in this dimension: (which features they are, each rank's part), in order.

    One rank after another gives all others its part. The next is on its way while one is used, so a rank holds no more
    than two. Every rank sees the same parts in the same order, and so finds the same bits.
    """
    from torch.distributed import broadcast

    mesh, own = mesh_of(module), _by_rank(module).to_local().contiguous()

    def ask(place: int) -> tuple[Tensor, Any]:
        part = own if place == mesh.get_local_rank() else torch.empty_like(own)
        return part, broadcast(part, group=mesh.get_group(), group_src=place, async_op=True)

    coming, each = ask(0), own.shape[dim]
    for place in range(mesh.size()):
        part, sent = coming
        sent.wait()
        if place + 1 < mesh.size():
            coming = ask(place + 1)
        yield slice(place * each, (place + 1) * each), part


def own_part(module: nn.Module, dim: int, features: slice) -> Tensor | None:
    """A weight at some features of this dimension, if they are those that this rank has of a tensor parallel module."""
    if not is_divided(module, dim):
        return None
    mesh, weight = mesh_of(module), _by_rank(module)
    each = weight.shape[dim] // mesh.size()
    own: Tensor = weight.to_local()
    here = features == slice(mesh.get_local_rank() * each, (mesh.get_local_rank() + 1) * each)
    return own if here and own.shape[dim] == each else None


def add_up(module: nn.Module, x: Tensor) -> None:
    """Let x be the sum over the ranks that divide the module."""
    from torch.distributed import all_reduce

    all_reduce(x, group=mesh_of(module).get_group())


def unknown_parts(model: nn.Module) -> str | None:
    """What kind of parts a model is in that nothing here knows how to put together; None: there are no such."""
    early = "weights in parts by something else than a tp_plan of transformers 5.17 or later"
    meshes, several = _meshes(model.parameters()), (getattr(model, "_tp_size", None) or 1) > 1
    sharded = is_fully_sharded(model)
    if not meshes:
        return early if several and not sharded else None
    divided = [module for module in model.modules() if computes_in_parts(module)]
    if not (_fit_further(meshes, divided) if sharded else _fit(meshes)):
        return "weights in parts over several meshes, or several dimensions of one"
    if sharded and not divided:
        return None
    for module in model.modules():
        shards = [weight for weight in module.parameters(recurse=False) if is_shard(weight)]
        if shards and module not in divided and not sharded:
            return early
        if type(module).__module__.startswith("peft."):
            return "adapters of PEFT around weights in parts"
    for module in divided:
        shards = [weight for weight in module.parameters(recurse=False) if is_shard(weight)]
        if hasattr(module, "_hf_quantized_needs_local_tp") or any(weight.dtype not in FLOATS for weight in shards):
            return "quantised weights in parts"
    return None


def _fit(meshes: list[Any]) -> bool:
    """Are they all over the same ranks, in one dimension? Heads and experts may be divided over two meshes."""
    return all(mesh.ndim == 1 and mesh.mesh.tolist() == meshes[0].mesh.tolist() for mesh in meshes)


def _fit_further(meshes: list[Any], divided: list[nn.Module]) -> bool:
    """Are they the meshes of `fully_shard`, or of that and, in a second dimension, of tensor parallelism; and of
    experts, the same over a mesh of their own?"""
    heads = any(not _holds_experts(mesh_of(module)) for module in divided)
    both = (False, heads), (True, True)
    return all(_are_of([mesh for mesh in meshes if _holds_experts(mesh) == experts], dims) for experts, dims in both)


def _are_of(meshes: list[Any], divided: bool) -> bool:
    """Is each one mesh, of two dimensions if it is also `divided`, or one of these?"""
    known = max(meshes, key=lambda mesh: mesh.ndim, default=None)
    if known is None or known.ndim != 1 + divided:
        return known is None
    # What no tp_plan divides is over the first dimension alone, and what a pass has put together over the last.
    fine = [known, *(known[name] for name in known.mesh_dim_names)] if divided else [known]
    named = [(each.mesh_dim_names, each.mesh.tolist()) for each in fine]
    return all((mesh.mesh_dim_names, mesh.mesh.tolist()) in named for mesh in meshes)


def _holds_experts(mesh: Any) -> bool:
    """Is it the mesh of transformers' plan for experts?"""
    return not {"ep", "efsdp"}.isdisjoint(mesh.mesh_dim_names or ())


def _meshes(weights: Iterable[Tensor]) -> list[Any]:
    """The device meshes over which they are in parts, without repetition."""
    found: list[Any] = []
    for weight in weights:
        if is_shard(weight) and (mesh := weight.device_mesh) not in found:  # type: ignore[attr-defined]
            found.append(mesh)
    return found


def mesh_of(module: nn.Module) -> Any:
    """That over which tensor parallelism divides a module: the last dimension of its weight's."""
    mesh = _meshes(module.parameters(recurse=False))[0]
    return mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[-1]]


def _by_rank(module: nn.Module) -> Any:
    """A tensor parallel module's weight as it computes with it: what `fully_shard` divides further is put together."""
    from torch.distributed.tensor import DTensor, Replicate

    weight: Any = module.weight
    weight = weight.detach()
    if weight.device_mesh.ndim == 1:
        return weight
    *others, own = weight.placements
    part = weight.redistribute(placements=[Replicate() for _ in others] + [own]).to_local()
    return DTensor.from_local(part, mesh_of(module), [own], run_check=False)
