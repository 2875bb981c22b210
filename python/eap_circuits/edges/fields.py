"""What a graph's fields must be, before anything is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import expected, flag, instance, listed, one_of, whole
from .spans import Spans

if TYPE_CHECKING:
    from .layout import Graph, Reads

_PER_LAYER = "a list of whole numbers, one for each layer"


def checked_fields(graph: Graph) -> dict[str, Any]:
    """The fields of a graph in their own types.

    Raises:
        InputError: see the messages.
    """
    one_of("heads", graph.heads, ("kv", "query"))
    found: dict[str, Any] = {"parallel": flag("parallel", graph.parallel)}
    for name in ("n_heads", "n_kv_heads"):
        found[name] = tuple(whole(name, n, 0) for n in listed(name, getattr(graph, name), _PER_LAYER))
    n_heads, n_kv_heads = found["n_heads"], found["n_kv_heads"]
    found["d_model"] = whole("d_model", graph.d_model, 0)
    if not n_heads or len(n_heads) != len(n_kv_heads):
        raise expected("graph", "n_heads and n_kv_heads for each layer", f"{n_heads} and {n_kv_heads}")
    for h, g in zip(n_heads, n_kv_heads, strict=True):
        if h and (g < 1 or h % g):
            raise expected("graph", "a number of query heads that key/value heads divide", f"{h} and {g}")
    found["reads"] = _reads(graph.reads, n_heads)
    keys = found["keys"] = _by_layer("keys", graph.keys, partial(whole, least=0), range(len(n_heads)))
    if any(of > layer or n_heads[of] != n_heads[layer] for layer, of in enumerate(keys or ())):
        raise expected("keys", "for each layer itself, or one before it with as many heads", keys)
    parts = found["per_layer"] = _by_layer("per_layer", graph.per_layer, flag, (False,) * len(n_heads))
    if any(one and (not layer or n_heads[layer]) for layer, one in enumerate(parts or ())):
        raise expected("per_layer", "layers without heads, behind layers of the model", parts)
    mlps = found["mlps"] = _by_layer("mlps", graph.mlps, flag, (True,) * len(n_heads))
    if any(not one and not n_heads[layer] for layer, one in enumerate(mlps or ())):
        raise expected("mlps", "an MLP in each layer without heads", mlps)
    beside = found["beside"] = _by_layer("beside", graph.beside, flag, (False,) * len(n_heads))
    for layer, one in enumerate(beside or ()):
        if one and (not layer or not n_heads[layer] or not n_heads[layer - 1] or mlps is None or mlps[layer - 1]):
            raise expected("beside", "layers with heads, behind layers with heads and no MLP", beside)
    if graph.spans is not None:
        instance("spans", graph.spans, Spans)
    found["encoder"] = whole("encoder", graph.encoder, 0, len(n_heads))
    _check_encoder(
        graph.spans, **{name: found[name] for name in ("n_heads", "encoder", "parallel", "mlps", "beside", "reads")}
    )
    return found


def _reads(given: Any, n_heads: tuple[int, ...]) -> tuple[Reads | None, ...] | None:
    if given is None:
        return None
    wanted = "for each layer none, or (name, number that divides its heads) of each input"
    try:
        reads = tuple(tuple((str(x), whole("reads", n, 1)) for x, n in one) if one else None for one in given)
    except (TypeError, ValueError) as error:
        raise expected("reads", wanted, repr(given)) from error
    for h, one in zip(n_heads, reads, strict=False):
        names = [name for name, _ in one or ()]
        if "mlp" in names or len(set(names)) < len(names) or any(h % n for _, n in one or ()):
            raise expected("reads", wanted, repr(one))
    if len(reads) != len(n_heads):
        raise expected("reads", wanted, f"{len(reads)} for {len(n_heads)} layers")
    return reads if any(reads) else None


def _by_layer(name: str, given: Any, kind: Callable[[str, Any], Any], usual: Iterable[object]) -> Any:
    """A value for each layer; None if these are the usual ones."""
    usual = tuple(usual)
    found = tuple(kind(name, value) for value in (usual if given is None else listed(name, given, "a list")))
    if len(found) != len(usual):
        raise expected(name, f"{len(usual)} values, one for each layer", len(found))
    return None if found == usual else found


def _check_encoder(spans: object, n_heads: Any, encoder: int, parallel: bool, mlps: Any, **others: object) -> None:
    """Refuse a graph with an encoder that is no encoder-decoder's."""
    if not encoder:
        return
    decoder = len(n_heads) - encoder
    bare = mlps is not None and not all((*mlps[:encoder], *mlps[encoder + 1 :: 2]))
    if decoder < 2 or decoder % 2 or parallel or any(others.values()) or bare or spans is not None or 0 in n_heads:
        wanted = "layers of attention and an MLP one after another, the decoder's in pairs, and no spans"
        raise expected("encoder", wanted, f"{encoder} of {len(n_heads)} layers of another graph")
