// The data of the page: JSON whose arrays are base64 of little-endian numbers.

const KINDS = { u2: Uint16Array, u4: Uint32Array, f4: Float32Array, u1: Uint8Array };

/** A typed array from `{type, data}`. */
export function numbers({ type, data }) {
  const text = atob(data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new KINDS[type](bytes.buffer);
}

/** One bit per edge as `numpy.packbits` writes them, as a Uint8Array of zeros and ones. */
export function bits(packed, n) {
  const bytes = numbers(packed);
  const flags = new Uint8Array(n);
  for (let i = 0; i < n; i++) flags[i] = (bytes[i >> 3] >> (7 - (i & 7))) & 1;
  return flags;
}

const SIGNS = { q: "q", k: "k", v: "v", mlp: "MLP", logits: "logits", other: "other" };

/** For each of n places, the edges there. */
function grouped(places, n) {
  const found = Array.from({ length: n }, () => []);
  for (let e = 0; e < places.length; e++) found[places[e]].push(e);
  return found;
}

/** What everything else reads: names, edges by falling absolute score, circuits, the curve. */
export function read(raw) {
  const u = numbers(raw.edges.u);
  const v = numbers(raw.edges.v);
  const n = u.length;
  const receivers = raw.receivers.map((r, i) => ({ ...r, index: i }));
  const kinds = Object.keys(SIGNS).filter((kind) => receivers.some((r) => r.kind === kind));
  return {
    n,
    total: raw.total,
    nodes: raw.nodes.map((node, i) => ({ ...node, index: i })),
    receivers,
    kinds: kinds.map((kind) => ({ kind, title: SIGNS[kind] })),
    nLayers: raw.layers.length,
    layers: raw.layers, // what they are called
    sources: raw.nodes.flatMap((node, i) => (node.source ? [i] : [])),
    logits: receivers.length - 1,
    u,
    v,
    bySender: Uint32Array.from(grouped(u, raw.nodes.length).flat()),
    into: grouped(v, raw.receivers.length),
    score: numbers(raw.edges.score),
    error: raw.edges.error ? numbers(raw.edges.error) : null,
    nodeScores: raw.node_scores ? numbers(raw.node_scores) : null,
    signed: raw.signed,
    circuits: raw.circuits.map((c) => ({ ...c, flags: bits(c.flags, n) })),
    // For each point of the curve, its circuit's index, or -1 if that is not known.
    curve: raw.curve && {
      ...raw.curve,
      circuits: raw.curve.n_edges.map((_, i) => raw.circuits.findIndex((c) => c.point === i)),
    },
    other: raw.other && {
      ...raw.other,
      score: raw.other.score ? numbers(raw.other.score) : null,
      flags: bits(raw.other.flags, n),
    },
    title: raw.title,
    profiles: raw.profiles.map((p) => ({ ...p, values: numbers(p.values) })),
  };
}

export const edgeName = (data, e) => `${data.nodes[data.u[e]].name} → ${data.receivers[data.v[e]].name}`;
