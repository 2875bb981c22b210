// Groups: nodes that the graph shows as one. Edges between the same two places of the picture are one line.

/**
 * For each node the first of its group, or itself; for each receiver the group that it belongs to as a whole, as that
 * group's first node, or -1; and the receiver at whose place it stands.
 */
export function places(data, groups) {
  const lead = Uint32Array.from(data.nodes, (_, i) => i);
  const home = new Int32Array(data.receivers.length).fill(-1);
  const port = Uint32Array.from(data.receivers, (_, v) => v);
  for (const { nodes } of groups) {
    const members = new Set(nodes);
    for (const i of nodes) lead[i] = nodes[0];
    const own = new Set(nodes.flatMap((i) => data.nodes[i].inputs));
    // A key that heads outside of the group share stays where those stand.
    const whole = [...own].filter((v) => data.receivers[v].owners.every((i) => members.has(i)));
    for (const v of whole) {
      home[v] = nodes[0];
      port[v] = whole[0];
    }
  }
  return { lead, home, port };
}

/** Lines as lists of edges by falling score, the edges in order; those inside a group are in none. */
export function bundled(data, edges, { lead, home, port }) {
  const found = new Map();
  for (const e of edges) {
    const from = lead[data.u[e]];
    if (home[data.v[e]] === from) continue;
    const key = from * data.receivers.length + port[data.v[e]];
    if (found.has(key)) found.get(key).push(e);
    else found.set(key, [e]);
  }
  return [...found.values()];
}
