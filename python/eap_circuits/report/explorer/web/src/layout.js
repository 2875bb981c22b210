// Where nodes stand and how edges run. Every node of the model has a fixed place: layers from the bottom to the top,
// heads by index, MLPs at the right side; `input` is a bar below, `logits` a bar above.

const PORTS = { q: -0.3, k: 0, v: 0.3 };
const RISE = 0.5; // an MLP stands above its layer's heads, which it reads

export function layout(data, width, height, groups = []) {
  const heads = Math.max(1, ...data.nodes.map((node) => node.head + 1));
  const pitchX = Math.max(48, (width - 58) / (heads + 2.15));
  const pitchY = Math.max(22, (height - 60) / (data.nLayers + 0.8));
  const left = Math.max(pitchX * 0.75, 58);
  const worldWidth = left + (heads + 2.1) * pitchX;
  const barWidth = (heads + 1.4) * pitchX;
  const worldHeight = 60 + (data.nLayers + 0.8) * pitchY;
  const box = { width: Math.min(pitchX * 0.62, 64), height: Math.min(pitchY * 0.56, 22) };
  const bars = { bottom: worldHeight - 24, top: 24 };
  const rowY = (layer) => bars.bottom - (layer + 0.75) * pitchY;
  const columnX = (head) => left + (head < 0 ? heads + 0.9 : head + 0.5) * pitchX;
  const nodes = data.nodes.map((node) =>
    node.layer < 0
      ? { x: left + barWidth / 2, y: bars.bottom + 11, width: barWidth, height: 22 }
      : {
          x: columnX(node.head),
          y: rowY(node.layer) - (node.head < 0 ? RISE * pitchY : 0),
          ...box,
        },
  );
  // A group stands where the one of its nodes does that is nearest to their middle.
  const grouped = new Set(groups.flatMap((group) => group.nodes));
  for (const members of groups.map((group) => group.nodes)) {
    const mean = (key) => members.reduce((sum, i) => sum + nodes[i][key], 0) / members.length;
    const [x, y] = [mean("x"), mean("y")];
    const far = (i) => Math.hypot(nodes[i].x - x, nodes[i].y - y);
    const place = nodes[members.reduce((best, i) => (far(i) < far(best) ? i : best))];
    for (const i of members) nodes[i] = place;
  }
  const ports = data.receivers.map((r) => {
    if (!r.owners.length) return null; // logits
    const alone = r.owners.filter((u) => !grouped.has(u));
    const owners = (alone.length ? alone : r.owners).map((u) => nodes[u]);
    const middle = owners.reduce((sum, node) => sum + node.x, 0) / owners.length;
    return {
      x: middle + (alone.length ? (PORTS[r.kind] ?? 0) * box.width : 0),
      y: owners[0].y + box.height / 2 + (alone.length > 1 ? 3 : 0),
      column: owners[owners.length >> 1].x,
      depth: r.layer / data.nLayers,
    };
  });
  // Heads that share an input stand on a bar.
  const shared = data.receivers
    .map((r) => ({ ...r, owners: r.owners.filter((u) => !grouped.has(u)) }))
    .filter((r) => r.owners.length > 1)
    .map((r) => ({
      x0: nodes[r.owners[0]].x - box.width / 2,
      x1: nodes[r.owners.at(-1)].x + box.width / 2,
      y: ports[r.index].y,
      receiver: r.index,
    }));
  return { nodes, ports, shared, bars, box, rowY, left, width: worldWidth, height: worldHeight, pitchX, pitchY, data };
}

/** Draw edge u → v with the calls that a canvas, an SVG path and a recorder of points share. */
export function edgePath(to, place, u, v) {
  const { bars, box, data, pitchX, pitchY } = place;
  const port = place.ports[v];
  const sender = place.nodes[u];
  const gap = (pitchX - box.width) / 2;
  if (u === 0 && !port) {
    to.moveTo(place.left + 4, bars.bottom);
    to.lineTo(place.left + 4, bars.top);
    return;
  }
  const bend = pitchY * 0.35;
  if (u === 0) {
    // Up in a lane left of the column, so that no edge hides behind a node.
    const lane = port.column - box.width / 2 - gap * (0.1 + 0.8 * port.depth);
    const turn = Math.min(port.y + bend, bars.bottom);
    to.moveTo(lane, bars.bottom);
    to.lineTo(lane, turn);
    to.bezierCurveTo(lane, port.y + bend / 4, port.x, port.y + bend, port.x, port.y);
    return;
  }
  const y0 = sender.y - box.height / 2;
  to.moveTo(sender.x, y0);
  if (!port) {
    const depth = data.nodes[u].layer / data.nLayers;
    const lane = sender.x + box.width / 2 + gap * (0.1 + 0.8 * depth);
    const turn = Math.max(y0 - bend, bars.top);
    to.bezierCurveTo(sender.x, y0 - bend, lane, y0 - bend / 4, lane, turn);
    to.lineTo(lane, bars.top);
    return;
  }
  const rise = Math.max(y0 - port.y, pitchY * 0.2);
  if (Math.abs(port.x - sender.x) < 0.45 * pitchX && rise > 0.7 * pitchY) {
    // Sideways, around the nodes between.
    const rows = rise / pitchY;
    const right = data.nodes[u].head < 0;
    const swing = right ? 0.35 + 0.14 * Math.sqrt(rows) : -(0.4 + 0.06 * Math.sqrt(rows));
    const middle = sender.x + swing * pitchX;
    const half = (y0 + port.y) / 2;
    const reach = Math.min(0.35 * rise, 1.6 * pitchY);
    to.bezierCurveTo(sender.x, y0 - bend, middle, y0 - bend / 3, middle, Math.max(y0 - reach, half));
    to.lineTo(middle, Math.min(port.y + reach, half));
    to.bezierCurveTo(middle, port.y + bend / 3, port.x, port.y + bend, port.x, port.y);
    return;
  }
  to.bezierCurveTo(sender.x, y0 - rise / 2, port.x, port.y + rise / 2, port.x, port.y);
}

/** A stand-in for a canvas that finds how near a path comes to a point. */
export class Nearness {
  constructor(x, y) {
    Object.assign(this, { x, y });
    this.reset();
  }
  reset() {
    this.distance = Infinity;
  }
  moveTo(x, y) {
    this.at = [x, y];
  }
  lineTo(x, y) {
    const [x0, y0] = this.at;
    const dx = x - x0;
    const dy = y - y0;
    const along = Math.max(0, Math.min(1, ((this.x - x0) * dx + (this.y - y0) * dy) / (dx * dx + dy * dy || 1)));
    this.distance = Math.min(this.distance, Math.hypot(this.x - x0 - along * dx, this.y - y0 - along * dy));
    this.at = [x, y];
  }
  bezierCurveTo(x1, y1, x2, y2, x3, y3) {
    const [x0, y0] = this.at;
    for (let i = 1; i <= 12; i++) {
      const t = i / 12;
      const s = 1 - t;
      const [a, b, c, d] = [s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t];
      this.lineTo(a * x0 + b * x1 + c * x2 + d * x3, a * y0 + b * y1 + c * y2 + d * y3);
    }
  }
}
