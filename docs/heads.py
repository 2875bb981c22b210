"""Which heads attend as those of the IOI circuit of Wang et al. 2022 do, and how many edges of circuits touch them.

python -m docs.heads     # two minutes behind docs.shared; writes docs/results/heads.json
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from docs import files
from docs.fewer import RANKINGS, SEEDS
from docs.shared import circuits_of, rank

if TYPE_CHECKING:
    from torch import Tensor

    import eap_circuits as eap
    from bench.tables import Results

RESULT = Path(__file__).with_name("results") / "heads.json"
TASK, ATTENDS = "ioi", 0.3  # the least mean attention of a class
DRAWS, MOST = 1000, 0.95  # of random heads; the quantile of draws that is shown beside their mean
# From which token to which: IO receives, S1 and S2 are the giver's two mentions, S1+1 is the token behind the first.
CLASSES = {
    "name mover": ("end", "IO"),
    "S-inhibition": ("end", "S2"),
    "duplicate token": ("S2", "S1"),
    "induction": ("S2", "S1+1"),
    "previous token": ("S1+1", "S1"),
}
# Which input of whom each writes to; the last one to the logits.
WIRING = {
    "previous token": ("induction", "<k>"),
    "duplicate token": ("S-inhibition", "<v>"),
    "induction": ("S-inhibition", "<v>"),
    "S-inhibition": ("name mover", "<q>"),
    "name mover": ("logits", "logits"),
}


def measure() -> dict[str, Any]:
    """Attention on pairs that ranked nothing, the first seed's; circuits of all seeds."""
    circuits: dict[str, list[eap.Circuit]] = {name: [] for name in RANKINGS}
    for seed in SEEDS[::-1]:
        rankings, model, _, others = rank(TASK, seed)
        for name, circuit in circuits_of({name: rankings[name] for name in RANKINGS}).items():
            circuits[name].insert(0, circuit)
    attention = _attention(model, others.clean, others), _attention(model, others.corrupted, others)
    found: dict[str, Any] = {}
    members: dict[str, list[str]] = {}
    for name, (here, before) in CLASSES.items():
        clean, corrupted = (each[here, before] for each in attention)
        order = clean.flatten().argsort(descending=True)[: int((clean >= ATTENDS).sum())].tolist()
        at = {f"a{i // clean.shape[1]}.h{i % clean.shape[1]}": divmod(i, clean.shape[1]) for i in order}
        members[name] = list(at)
        found[name] = {"attention": {head: [float(clean[i]), float(corrupted[i])] for head, i in at.items()}}
    for name, (reader, site) in WIRING.items():
        wires = _wires(circuits["learned"][0].graph, members[name], members.get(reader, []), site)
        found[name]["wires"] = int(wires.sum())
        for ranking, every in circuits.items():
            found[name][ranking] = [
                {**_touched(each, members[name]), "wires": int((each.mask & wires).sum())} for each in every
            ]
    return found


def _attention(model: Any, ids: Tensor, data: eap.PairedDataset) -> dict[tuple[str, str], Tensor]:
    """The mean over pairs of every head's attention, [L, H], from and to the tokens of each class."""
    import torch

    pairs, spans = torch.arange(len(data)), [data.span_names.index(name) for name in ("first", "second", "giver")]
    first, second, giver = ((data.spans == span).int().argmax(1) for span in spans)
    begins = data.clean[pairs, first] == data.clean[pairs, giver]  # S1 comes before IO
    s1, io = torch.where(begins, first, second), torch.where(begins, second, first)
    at = {"end": data.lengths - 1, "IO": io, "S1": s1, "S1+1": s1 + 1, "S2": giver}
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")  # others do not say what they attend to
    with torch.no_grad():
        mask = torch.arange(ids.shape[1]) < data.lengths[:, None]
        layers = model(ids, attention_mask=mask.long(), output_attentions=True).attentions
    model.set_attn_implementation(usual)
    return {
        (here, before): torch.stack([layer[pairs, :, at[here], at[before]].mean(0) for layer in layers])
        for here, before in CLASSES.values()
    }


def _touched(circuit: eap.Circuit, heads: list[str]) -> dict[str, Any]:
    """How many of the heads write in a circuit; the share of its edges that leave one of these or enter an input of it;
    and this share for random heads, as many of all or as many of each layer."""
    import torch

    graph = circuit.graph
    writes = circuit.mask.any(1).tolist()  # a head that does not may share an input with one that does
    edges = circuit.mask.nonzero().tolist()
    touch = torch.zeros(len(edges), graph.n_senders, dtype=torch.bool)
    for edge, (sender, receiver) in enumerate(edges):
        touch[edge, [sender, *(owner for owner in graph.owners[receiver] if writes[owner])]] = True

    def share(chosen: list[str]) -> float:
        return float(touch[:, [graph.senders.index(head) for head in chosen]].any(1).float().mean())

    rng = random.Random(0)
    every = [name for name in graph.senders if ".h" in name]
    counts = Counter(head.split(".")[0] for head in heads)
    peers = {layer: [name for name in every if name.split(".")[0] == layer] for layer in counts}
    draws = {
        "any heads": lambda: rng.sample(every, len(heads)),
        "heads of these layers": lambda: [
            head for layer, count in counts.items() for head in rng.sample(peers[layer], count)
        ],
    }
    found: dict[str, Any] = {"heads": sum(writes[graph.senders.index(head)] for head in heads), "share": share(heads)}
    for name, draw in draws.items():
        shares = sorted(share(draw()) for _ in range(DRAWS))
        found[name] = [mean(shares), shares[int(MOST * DRAWS)]]
    return found


def _wires(graph: Any, writers: list[str], readers: list[str], site: str) -> Tensor:
    """bool [S, R]: the graph's edges from these heads to this input of those, or to the logits."""
    import torch

    owners = [{graph.senders[i] for i in each} for each in graph.owners]
    enter = [
        name.endswith(site) and (site == "logits" or not each.isdisjoint(readers))
        for name, each in zip(graph.receivers, owners, strict=True)
    ]
    leave = [name in writers for name in graph.senders]
    wires: Tensor = graph.edge_mask & torch.tensor(leave)[:, None] & torch.tensor(enter)
    return wires


def classes(_: Results) -> str:
    """The heads of each class, with their attention in the clean and in the corrupted prompt."""
    lines = ["| as in the paper | attention from, to | heads |", "|---|---|---|"]
    for name, found in files.committed(RESULT)[TASK].items():
        if name in CLASSES:
            heads = (f"{head} {clean:.2f} ({other:.2f})" for head, (clean, other) in found["attention"].items())
            lines.append(f"| {name} | {', '.join(CLASSES[name])} | {', '.join(heads)} |")
    return "\n".join(lines) + "\n"


def table(_: Results) -> str:
    """By class and ranking, means over seeds."""
    head = ["heads like", "circuit", "of these heads it has", "share of its edges that touch them"]
    head += ["of as many random heads", "of as many of these layers", "edges as in the paper"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    found = files.committed(RESULT)[TASK]
    for name in CLASSES:
        for ranking, shown in RANKINGS.items():
            runs = found[name][ranking]
            kept, wires = (", ".join(str(run[what]) for run in runs) for what in ("heads", "wires"))
            share = _percent(run["share"] for run in runs)
            cells = [name, shown, f"{kept} of {len(found[name]['attention'])}", share]
            for drawn in ("any heads", "heads of these layers"):
                usual, most = (_percent(each) for each in zip(*(run[drawn] for run in runs), strict=True))
                cells.append(f"{usual} (to {most})")
            lines.append("| " + " | ".join([*cells, f"{wires} of {found[name]['wires']}"]) + " |")
    return "\n".join(lines) + "\n"


def _percent(shares: Iterable[float]) -> str:
    return f"{100 * mean(shares):.0f} %"


if __name__ == "__main__":
    files.add(RESULT, TASK, measure)
