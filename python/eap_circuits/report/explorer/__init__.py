"""What the report's explorer shows: the data that goes into the page, and the script that reads it.

The script is built from `web/` by `make explorer` and committed, so that an installation needs no npm.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from ...edges import layer_name
from ...files import digest
from ...graph import Circuit, EdgeScores, Graph
from ..curves import CurveLike, jsonable
from ..tables import BASELINE_NAMES, drawn_baselines, percent

if TYPE_CHECKING:
    from ...tasks import PairedDataset

KEPT = 200_000  # edges in the file
_PROFILE = 400_000  # numbers of examples', and of positions' scores in the file
_TOLD_APART_BY = ("task", "data", "model", "method", "metric", "date")


def asset(name: str) -> str:
    """The text of explorer.js or explorer.css."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def policy(script: str) -> str:
    """A content security policy under which only this script runs, and nothing is loaded."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def page_data(
    scores: EdgeScores,
    circuit: Circuit,
    curve: CurveLike | None,
    other: tuple[Circuit, EdgeScores | None] | None,
    data: PairedDataset | None,
    title: str,
    tokenizer: Any = None,
    kept: int = KEPT,
) -> str:
    """JSON for a `<script>` element: the strongest edges, as arrays in base64, and what is known of them.

    Args:
        scores, circuit, curve, data, tokenizer: as `write_report` takes them.
        other: the circuit to compare with and, if they are known, the scores that it was chosen by.
        kept: how many edges at most; those of the circuits come first.
    """
    points = _measured(scores, circuit, curve)
    if scores.graph.spans is not None:
        # An edge is in a circuit if any span's is; its profile says what each span's scores.
        points = [None if mask is None else scores.graph.per_span(mask).any(0) for mask in points]
        if other is not None:
            other = other[0].across_spans(), None if other[1] is None else other[1].across_spans()
        scores, circuit = scores.across_spans(), circuit.across_spans()
    graph = scores.graph
    circuits = _circuits(circuit, curve, points)
    chosen = [mask for mask, _ in circuits if int(mask.sum()) < graph.n_edges] + ([other[0].mask] if other else [])
    u, v = _strongest(graph, scores.values, chosen, kept)
    edges = {"u": _packed(u), "v": _packed(v), "score": _packed(scores.values[u, v])}
    n_examples = scores.info.get("n_examples")
    if scores.variance is not None and n_examples:
        edges["error"] = _packed((scores.variance[u, v] / n_examples).sqrt())
    content = {
        "title": title,
        "total": graph.n_edges,
        "layers": _layers(graph),
        "nodes": _nodes(graph),
        "receivers": _receivers(graph),
        "edges": edges,
        "node_scores": _packed(scores.values.double().sum(1)),
        "signed": _signed(circuit),
        "circuits": [{**known, "flags": _flags(mask, u, v)} for mask, known in circuits],
        "curve": None if curve is None else _curve(curve, points),
        "other": None if other is None else _other(scores, circuit, other, u, v),
        "profiles": _profiles(scores, data, tokenizer, u, v),
    }
    # "<" could end the element.
    return json.dumps(jsonable(content), separators=(",", ":")).replace("<", "\\u003c")


def other_of(scores: EdgeScores, circuit: Circuit, against: Circuit | EdgeScores) -> tuple[Circuit, EdgeScores | None]:
    """The circuit to compare with; of scores, the one with as many edges as `circuit`."""
    if isinstance(against, Circuit):
        values = against.values
        return against, None if values is None else EdgeScores(against.graph, values, against.info)
    return against.select(circuit.n_edges, signed=_signed(circuit), exactly=True), against


def same_prompts(info: Mapping[str, Any], data: PairedDataset) -> bool:
    """Are these the prompts of the run that `info` tells of?"""
    return data.prompts is not None and info.get("prompts_sha256") == digest({"prompts": data.prompts})


def names(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str]:
    """What two circuits are called: the first entry of `info` in which they differ."""
    for key in _TOLD_APART_BY:
        a, b = first.get(key), second.get(key)
        if a is not None and b is not None and a != b:
            return str(a)[-40:], str(b)[-40:]
    return "first", "second"


def _signed(circuit: Circuit) -> bool:
    return bool(circuit.info.get("selection", {}).get("signed", False))


def _strongest(graph: Graph, values: Tensor, chosen: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor]:
    """(senders, receivers) of the n edges to keep, those of the chosen circuits before others; by falling |score|."""
    u, v = graph.edge_mask.nonzero(as_tuple=True)
    order = values[u, v].abs().nan_to_num(nan=0.0).argsort(descending=True, stable=True)
    if len(order) > n:
        needed = torch.zeros_like(graph.edge_mask)
        for mask in chosen:
            needed |= mask
        first = (~needed[u, v][order]).long().argsort(stable=True)[:n]
        order = order[first.sort().values]
    return u[order], v[order]


def _packed(values: Tensor) -> dict[str, str]:
    """The numbers in base64, little-endian, in the smallest of the types that the script knows."""
    array = values.cpu().numpy()
    kind = "f4" if values.is_floating_point() else "u2" if array.max(initial=0) < 2**16 else "u4"
    return {"type": kind, "data": base64.b64encode(array.astype(f"<{kind}").tobytes()).decode()}


def _flags(mask: Tensor, u: Tensor, v: Tensor) -> dict[str, str]:
    packed = numpy.packbits(mask[u, v].cpu().numpy())
    return {"type": "u1", "data": base64.b64encode(packed.tobytes()).decode()}


def _layers(graph: Graph) -> list[str]:
    """What the rows are called: layers, and between an encoder's and its decoder's, the decoder's `input`."""
    names = [layer_name(graph, layer) for layer in range(graph.n_layers)]
    if graph.encoder:
        names.insert(graph.encoder, graph.senders[graph.input_senders[-1]])
    return names


def _row(graph: Graph, layer: int) -> int:
    """The row of a layer; that after the last is for `logits`."""
    return layer + (0 < graph.encoder <= layer)


def _nodes(graph: Graph) -> list[dict[str, Any]]:
    """Name, row (-1 for `input`), head (-1 if it is none) and receivers of each sender; do paths begin there?"""
    place = [(-1, -1)]
    for layer, heads in enumerate(graph.n_heads):
        row = _row(graph, layer)
        place += [(row - 1, -1)] if 0 < layer == graph.encoder else []
        place += [*((row, head) for head in range(heads)), *([(row, -1)] if graph.has_mlp(layer) else [])]
    rows = zip(graph.senders, place, graph.inputs, graph.sources.tolist(), strict=True)
    return [
        {"name": name, "layer": layer, "head": head, "inputs": inputs, "source": source}
        for name, (layer, head), inputs, source in rows
    ]


def _receivers(graph: Graph) -> list[dict[str, Any]]:
    """Name, kind, row (that after the last for `logits`) and owners of each receiver."""
    kinds = []
    for layer in range(graph.n_layers):
        for name, n in graph.sites(layer):
            kinds += [(name if name in ("q", "k", "v", "mlp") else "other", _row(graph, layer))] * n
    kinds.append(("logits", _row(graph, graph.n_layers)))
    rows = zip(graph.receivers, kinds, graph.owners, strict=True)
    return [{"name": name, "kind": kind, "layer": layer, "owners": owners} for name, (kind, layer), owners in rows]


def _measured(scores: EdgeScores, circuit: Circuit, curve: CurveLike | None) -> list[Tensor | None]:
    """The mask of each circuit of the curve. One read from a file has none: its circuits are selected again, and count
    if they have as many edges."""
    if curve is None:
        return []
    if hasattr(curve, "circuits"):
        return [each.mask for each in curve.circuits]
    how, signed = curve.info.get("how", "top"), bool(curve.info.get("signed", _signed(circuit)))
    if how not in ("top", "greedy"):
        return [None] * len(curve.fractions)
    again = scores.select_sizes([int(fraction * scores.graph.n_edges) for fraction in curve.fractions], how, signed)
    return [each.mask if each.n_edges == n else None for each, n in zip(again, curve.n_edges, strict=True)]


def _circuits(
    circuit: Circuit, curve: CurveLike | None, points: Sequence[Tensor | None]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """(mask, what is known) of the report's circuit, then of each of the curve's that is another."""
    own: dict[str, Any] = {"label": "The circuit", "n_edges": circuit.n_edges, "faithfulness": None, "taken": None}
    found = [(circuit.mask, own)]
    if curve is None:
        return found
    how = getattr(curve, "info", {}).get("how", "top")
    top, of = how == "top", "nodes" if how == "nodes" else "edges"
    for i, mask in enumerate(points):
        if mask is None:
            continue
        known: dict[str, Any] = {"faithfulness": float(curve.faithfulness[i]), "point": i}
        known["taken"] = int(curve.fractions[i] * circuit.graph.n_edges) if top else None
        if torch.equal(mask, circuit.mask) and "point" not in own:
            own |= known
        else:
            known["label"] = f"{percent(curve.fractions[i])} of the {of}, those on paths"
            found.append((mask, {**known, "n_edges": int(mask.sum())}))
    return found


def _curve(curve: CurveLike, points: Sequence[Tensor | None]) -> dict[str, Any]:
    drawn = drawn_baselines(curve)
    baselines = []
    for name, baseline in curve.baselines.items():
        entry: dict[str, Any] = {"title": BASELINE_NAMES.get(name, name), "drawn": name in drawn}
        entry["faithfulness"] = list(baseline.faithfulness)
        if len(baseline.draws) > 1:
            columns = list(zip(*baseline.draws, strict=True))
            entry |= {"low": list(map(min, columns)), "high": list(map(max, columns))}
        baselines.append(entry)
    return {"n_edges": list(curve.n_edges), "faithfulness": list(curve.faithfulness), "baselines": baselines}


def _other(
    scores: EdgeScores, circuit: Circuit, other: tuple[Circuit, EdgeScores | None], u: Tensor, v: Tensor
) -> dict[str, Any]:
    second, by = other
    first_name, second_name = names({**scores.info, **circuit.info}, second.info)
    content = {"first": first_name, "second": second_name, "flags": _flags(second.mask, u, v)}
    if by is not None:
        content["score"] = _packed(by.values[u, v])
    return content


def _profiles(
    scores: EdgeScores, data: PairedDataset | None, tokenizer: Any, u: Tensor, v: Tensor
) -> list[dict[str, Any]]:
    """The strongest edges' scores by example and by position, where they were kept; [example, edge] each."""
    found = []
    prompts: list[str] = []
    tokens: list[str] = []  # of the first prompt
    if data is not None and data.prompts is not None and same_prompts(scores.info, data):
        prompts = [clean for clean, _ in data.prompts]
        if tokenizer is not None and data.decoder is None:
            tokens = [tokenizer.decode(token) for token in data.clean[0, : data.lengths[0]].tolist()]
    for values, title, one in (
        (scores.per_example, "By example", "example"),
        (scores.per_position, "By position", "position"),
        (scores.per_span, "By span", "span"),
    ):
        if values is None or not len(values):
            continue
        n = min(len(u), _PROFILE // len(values))
        labels = [f"{one} {i}" for i in range(len(values))]
        if one == "example" and prompts:
            labels = [f"{i}: {clean}" for i, clean in enumerate(prompts)]
        elif one == "position":
            from_end = "positions-from-end" in str(scores.info.get("keep"))
            last = len(values) - 1
            if from_end:
                labels = [f"{i - last} from the end" for i in range(len(values))]
            if tokens:
                title = "By position, with the first prompt's tokens"
            for i, token in enumerate(tokens, len(values) - len(tokens) if from_end else 0):
                labels[i] = f"{i - last if from_end else i}: {token!r}"
        elif one == "span" and isinstance(scores.info.get("spans"), dict):
            labels = [str(name) for name in scores.info["spans"]["names"]]
        packed = _packed(values[:, u[:n], v[:n]].float().reshape(-1))
        found.append({"title": f"{title}: this edge's score", "labels": labels, "values": packed, "edges": n})
    return found
