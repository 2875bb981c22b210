// Which edges are shown: pure functions of the data, without a page. Edges are numbered by falling absolute score.
// Senders are numbered by depth, and a node's inputs come after all senders that they read.

/** Edges in the order in which circuits take them: by absolute score, or by the score itself. */
export function ranking(score, signed) {
  const order = Uint32Array.from(score, (_, i) => i);
  return order.sort(
    signed ? (a, b) => score[b] - score[a] || a - b : (a, b) => Math.abs(score[b]) - Math.abs(score[a]) || a - b,
  );
}

/** Edges on a path from one of `starts` (senders), as flags. */
export function downstream(data, flags, starts) {
  const { bySender, u, v, receivers } = data;
  const reached = new Uint8Array(data.nodes.length);
  const found = new Uint8Array(data.n);
  for (const start of starts) reached[start] = 1;
  for (let i = 0; i < data.n; i++) {
    const e = bySender[i];
    if (!flags[e] || !reached[u[e]]) continue;
    found[e] = 1;
    for (const owner of receivers[v[e]].owners) reached[owner] = 1;
  }
  return found;
}

/** Edges on a path to `end`, a sender, or to `logits` if it is null; as flags. */
export function upstream(data, flags, end) {
  const { bySender, u, v, nodes } = data;
  const found = new Uint8Array(data.n);
  const wanted = new Uint8Array(data.receivers.length);
  for (const receiver of end === null ? [data.logits] : nodes[end].inputs) wanted[receiver] = 1;
  for (let i = data.n - 1; i >= 0; i--) {
    const e = bySender[i];
    if (!flags[e] || !wanted[v[e]]) continue;
    found[e] = 1;
    for (const receiver of nodes[u[e]].inputs) wanted[receiver] = 1;
  }
  return found;
}

/** Only edges on a path from `input`, or another source, to `logits`. */
export function prune(data, flags) {
  const down = downstream(data, flags, data.sources);
  return upstream(data, down, null);
}

/** The n first edges of a ranking, pruned. */
export function strongest(data, order, n) {
  const flags = new Uint8Array(data.n);
  for (let i = 0; i < Math.min(n, order.length); i++) flags[order[i]] = 1;
  return prune(data, flags);
}

/** Edges on paths from a source through a node to `logits`. */
export function through(data, flags, node) {
  const before = upstream(data, downstream(data, flags, data.sources), node);
  const after = upstream(data, downstream(data, flags, [node]), null);
  if (!after.includes(1) || (!data.nodes[node].source && !before.includes(1))) return new Uint8Array(data.n);
  return before.map((x, e) => x | after[e]);
}

/** The path `input` → node → `logits` whose weakest edge is strongest, as edges; null if there is none. */
export function widestPath(data, flags, node) {
  const search = (source) => {
    const width = new Float64Array(data.nodes.length).fill(-1);
    const last = new Int32Array(data.nodes.length).fill(-1);
    width[source] = Infinity;
    const better = (receivers, best) => {
      for (const r of receivers) {
        for (const e of data.into[r]) {
          if (!flags[e]) continue;
          const w = Math.min(width[data.u[e]], Math.abs(data.score[e]));
          if (w > best.w) Object.assign(best, { w, e });
        }
      }
      return best;
    };
    for (let i = source + 1; i < data.nodes.length; i++) {
      const best = better(data.nodes[i].inputs, { w: -1, e: -1 });
      width[i] = best.w;
      last[i] = best.e;
    }
    return { last, logits: better([data.logits], { w: -1, e: -1 }).e };
  };
  const walk = (last, e, source) => {
    const path = [];
    for (let at = e; at >= 0; at = data.u[at] === source ? -1 : last[data.u[at]]) path.unshift(at);
    return path;
  };
  const after = search(node);
  if (after.logits < 0) return null;
  const tail = walk(after.last, after.logits, node);
  if (data.nodes[node].source) return tail;
  const before = search(0).last;
  return before[node] < 0 ? null : [...walk(before, before[node], 0), ...tail];
}

/** Edges shown, as flags: those of the circuits that pass every filter. */
export function filtered(data, flags, filters) {
  const { layers, kinds, sign, least } = filters;
  const kind = data.receivers.map((r) => kinds.has(r.kind));
  const low = layers[0];
  const high = layers[1];
  const node = data.nodes.map((x) => x.layer < 0 || (x.layer >= low && x.layer <= high));
  const receiver = data.receivers.map((x) => x.layer >= data.nLayers || (x.layer >= low && x.layer <= high));
  const found = new Uint8Array(data.n);
  for (let e = 0; e < data.n; e++) {
    const s = data.score[e];
    found[e] =
      flags[e] &&
      kind[data.v[e]] &&
      node[data.u[e]] &&
      receiver[data.v[e]] &&
      (!sign || s * sign >= 0) &&
      Math.abs(s) >= least;
  }
  return found;
}

/** Numbers of edges and nodes of two circuits: only the first, both, only the second. */
export function overlap(data, a, b) {
  const edges = [0, 0, 0];
  const place = (x, y) => (x && y ? 1 : x ? 0 : 2);
  const nodes = [a, b].map((flags) => {
    const seen = new Uint8Array(data.nodes.length);
    for (let e = 0; e < data.n; e++) {
      if (flags[e]) {
        seen[data.u[e]] = 1;
        for (const owner of data.receivers[data.v[e]].owners) seen[owner] = 1;
      }
    }
    return seen;
  });
  for (let e = 0; e < data.n; e++) if (a[e] || b[e]) edges[place(a[e], b[e])]++;
  const shared = [0, 0, 0];
  data.nodes.forEach((_, i) => {
    if (nodes[0][i] || nodes[1][i]) shared[place(nodes[0][i], nodes[1][i])]++;
  });
  return { edges, nodes: shared };
}

export function count(flags) {
  let sum = 0;
  for (let e = 0; e < flags.length; e++) sum += flags[e];
  return sum;
}
