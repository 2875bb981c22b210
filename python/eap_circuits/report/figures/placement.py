"""Place the nodes and edges of a circuit's picture: pure geometry, no drawing.

One unit across is a column (a head index, or the MLPs at the right side), one unit up is a layer. `input` is a bar
below all columns and `logits` a bar above them. Edges from `input` rise in lanes left of a column's nodes and edges to
`logits` in lanes right of them, so that no edge hides behind a node; all others are curves.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from ...edges import layer_name
from ...graph import Circuit

HEIGHT = 0.36  # of a node's box, as is WIDTH
WIDTH = 0.62
PORTS = {"q": -0.19, "k": 0.0, "v": 0.19}
_MLP_RISE = 0.5  # an MLP stands above its layer's heads, which it reads
_LANE = (WIDTH / 2 + 0.03, 0.5 - 0.02)

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A node: its centre, and its width."""

    name: str
    x: float
    y: float
    width: float = WIDTH


@dataclass(frozen=True)
class Line:
    """An edge: its Bézier points (a start, then three for each curve), its score, and the letter of the head's input
    that it enters ("q", "k", "v", or "" for any other)."""

    sender: str
    receiver: str
    points: tuple[Point, ...]
    letter: str
    score: float | None


@dataclass
class Placement:
    """Everything to draw; `groups` are bars below heads that share keys and values, `layers` are the rows."""

    boxes: list[Box] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    groups: list[tuple[Point, Point]] = field(default_factory=list)
    layers: list[tuple[str, float]] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0
    bars: tuple[float, float] = (0.0, 0.0)

    @property
    def right(self) -> float:
        """How far edges reach at the right side."""
        return max([self.width, *(x for line in self.lines for x, _ in line.points)])


def strongest(circuit: Circuit, n: int) -> list[tuple[int, int]]:
    """The circuit's n edges (sender, receiver indices) of largest absolute score, weakest first."""
    edges = circuit.mask.nonzero()
    if circuit.values is not None:
        size = circuit.values[edges[:, 0], edges[:, 1]].abs()
        edges = edges[size.argsort(descending=True, stable=True)]
    return [(int(u), int(v)) for u, v in edges[:n].flip(0).tolist()]


def place(circuit: Circuit, max_edges: int) -> Placement:
    """Place the strongest `max_edges` edges and the nodes they join."""
    graph = circuit.graph
    edges = strongest(circuit, max_edges)
    owners = _owners(circuit, edges)
    shown = {u for u, _ in edges if u not in graph.input_senders} | {u for heads in owners.values() for u in heads}

    where: dict[int, tuple[int, int | None]] = {}  # sender index -> (layer, head or None)
    for layer in range(graph.n_layers):
        heads = graph.head_senders(layer)
        where |= {u: (layer, u - heads.start) for u in range(heads.start, heads.stop) if u in shown}
        if graph.has_mlp(layer) and graph.mlp_sender(layer) in shown:
            where[graph.mlp_sender(layer)] = (layer, None)
    layers = sorted({layer for layer, _ in where.values()})
    heads_used = sorted({head for _, head in where.values() if head is not None})
    rows = {layer: 1.0 + i for i, layer in enumerate(layers)}
    columns: dict[int | None, float] = {head: 0.5 + i for i, head in enumerate(heads_used)}
    columns[None] = len(heads_used) + (0.9 if heads_used else 0.5)

    placement = Placement(layers=[(layer_name(graph, layer), rows[layer]) for layer in layers])
    any_mlp = any(head is None for _, head in where.values())
    placement.width = max(columns[None] + 0.6 if any_mlp else len(heads_used), 3.0)
    placement.height = len(rows) + 1.0 + _MLP_RISE
    placement.bars = (0.15, placement.height)
    boxes = {}
    for u, (layer, head) in where.items():
        y = rows[layer] + (_MLP_RISE if head is None else 0.0)
        boxes[u] = Box(graph.senders[u], columns[head], y)
    placement.boxes = list(boxes.values())
    _place_lines(placement, circuit, edges, boxes, owners)
    return placement


def _owners(circuit: Circuit, edges: list[tuple[int, int]]) -> dict[int, list[int]]:
    """For each receiver drawn, the senders whose input it is: those drawn, or else those in the circuit."""
    graph = circuit.graph
    drawn = {u for u, _ in edges}
    kept = set(circuit.nodes)
    owners = {}
    for receiver in {v for _, v in edges}:
        nodes = graph.owners[receiver]
        owners[receiver] = [u for u in nodes if u in drawn] or [u for u in nodes if graph.senders[u] in kept] or nodes
    return owners


def _place_lines(
    placement: Placement,
    circuit: Circuit,
    edges: list[tuple[int, int]],
    boxes: dict[int, Box],
    owners: dict[int, list[int]],
) -> None:
    graph, inputs = circuit.graph, circuit.graph.input_senders
    bottom, top = placement.bars
    ports: dict[int, tuple[float, float, str]] = {}
    for v in dict.fromkeys(v for _, v in edges):
        name = graph.receivers[v]
        letter = name.partition("<")[2][:-1]
        letter = letter if letter in PORTS else ""
        heads = [boxes[u] for u in owners[v]]
        if heads:
            x = sum(box.x for box in heads) / len(heads) + PORTS.get(letter, 0.0)
            y = heads[0].y - HEIGHT / 2 - (0.07 if len(heads) > 1 else 0.0)
            ports[v] = (x, y, letter)
            if len(heads) > 1:
                placement.groups.append(((heads[0].x - WIDTH / 2, y), (heads[-1].x + WIDTH / 2, y)))
    placement.groups = sorted(set(placement.groups))

    column = {v: boxes[owners[v][len(owners[v]) // 2]].x for v in ports}
    rising = _lanes([(column[v], ports[v][1], (u, v)) for u, v in edges if u in inputs and v in ports], -1)
    leaving = _lanes([(boxes[u].x, -boxes[u].y, (u, v)) for u, v in edges if u in boxes and v not in ports], +1)
    for u, v in edges:
        if u in inputs and v not in ports:
            points: tuple[Point, ...] = _straight(0.06, bottom, top)
        elif u in inputs:
            points = _rise(rising[u, v], bottom, ports[v][:2])
        elif v not in ports:
            points = _leave((boxes[u].x, boxes[u].y + HEIGHT / 2), leaving[u, v], top)
        else:
            points = _curve(boxes[u], ports[v][:2], placement.width)
        letter = ports[v][2] if v in ports else ""
        score = None if circuit.values is None else float(circuit.values[u, v])
        placement.lines.append(Line(graph.senders[u], graph.receivers[v], points, letter, score))


def _lanes(ends: list[tuple[float, float, tuple[int, int]]], side: int) -> dict[tuple[int, int], float]:
    """The x of each lane: in each column, the edge ends met first take the lanes nearest to the nodes."""
    columns = defaultdict(list)
    for x, order, edge in ends:
        columns[x].append((order, edge))
    near, far = _LANE
    lanes = {}
    for x, members in columns.items():
        for i, (_, edge) in enumerate(sorted(members)):
            lanes[edge] = x + side * (near + (far - near) * (i + 0.5) / max(len(members), 6))
    return lanes


def _straight(x: float, y0: float, y1: float) -> tuple[Point, ...]:
    return ((x, y0), (x, y0), (x, y1), (x, y1))


def _rise(lane: float, bottom: float, end: Point) -> tuple[Point, ...]:
    """Up in the lane from the `input` bar, then over and into the port."""
    x, y = end
    bend = max(y - 0.3, bottom)
    return (*_straight(lane, bottom, bend), (lane, y - 0.1), (x, y - 0.26), (x, y))


def _leave(start: Point, lane: float, top: float) -> tuple[Point, ...]:
    """Out of the node, over into the lane, and up to the `logits` bar."""
    x, y = start
    bend = min(y + 0.3, top)
    return ((x, y), (x, y + 0.26), (lane, y + 0.1), (lane, bend), (lane, bend), (lane, top), (lane, top))


def _curve(sender: Box, end: Point, width: float) -> tuple[Point, ...]:
    """From the top of the sender to a port; sideways around the nodes between if both are in one column."""
    x0, y0 = sender.x, sender.y + HEIGHT / 2
    x1, y1 = end
    rise = max(y1 - y0, 0.2)
    if abs(x1 - x0) < 0.45 and rise > 0.7:
        swing = (0.35 + 0.22 * rise**0.5) * (1 if x0 > width - 1.5 else -1 if x0 > width / 2 else 1)
        reach = min(0.35 * rise, 1.6)
        middle = (max(x0, x1) if swing > 0 else min(x0, x1)) + swing
        half = (y0 + y1) / 2
        return (
            (x0, y0),
            (x0, y0 + 0.25),
            (middle, y0 + 0.1),
            (middle, min(y0 + reach, half)),
            (middle, half),
            (middle, half),
            (middle, max(y1 - reach, half)),
            (middle, y1 - 0.1),
            (x1, y1 - 0.25),
            (x1, y1),
        )
    pull = 0.5 * rise
    return ((x0, y0), (x0, y0 + pull), (x1, y1 - pull), (x1, y1))
