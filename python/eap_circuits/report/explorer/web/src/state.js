// What the reader has chosen, and the same in the address, so that a view can be sent as a link.

export const NAME = 60; // characters of a name

export const initial = (data) => ({
  circuit: 0, // index of a circuit of the page, or null if `size` was chosen
  size: null, // the strongest n edges, pruned
  layers: [0, data.nLayers - 1],
  kinds: new Set(data.kinds.map((k) => k.kind)),
  sign: 0,
  least: 0,
  part: "all", // of two circuits: all, first, both, second
  node: null,
  edge: null,
  paths: false,
  pins: [],
  names: {},
  groups: [], // {name, nodes}: nodes that the graph shows as one, by rising index
  view: null, // {k, x, y}: scale and the middle of what is seen, in parts of the picture
});

/** The state as the text behind `#`; only what differs from the beginning. */
export function toHash(data, state) {
  const start = initial(data);
  const found = new URLSearchParams();
  const put = (key, value, usual) => value !== usual && found.set(key, value);
  if (state.circuit === null) found.set("size", state.size);
  else put("circuit", state.circuit, start.circuit);
  put("layers", state.layers.join("-"), start.layers.join("-"));
  put("kinds", [...state.kinds].sort().join("."), [...start.kinds].sort().join("."));
  put("sign", state.sign, 0);
  put("least", state.least, 0);
  put("part", state.part, "all");
  put("node", state.node === null ? null : data.nodes[state.node].name, null);
  put("edge", state.edge === null ? null : `${data.u[state.edge]}-${data.v[state.edge]}`, null);
  put("paths", state.paths, false);
  put("pins", state.pins.map((i) => data.nodes[i].name).join("~"), "");
  put("names", Object.keys(state.names).length ? JSON.stringify(state.names) : null, null);
  const groups = state.groups.map(({ name, nodes }) => [name, ...nodes.map((i) => data.nodes[i].name)]);
  put("groups", groups.length ? JSON.stringify(groups) : null, null);
  if (state.view) found.set("view", [state.view.k, state.view.x, state.view.y].map((x) => +x.toFixed(4)).join("~"));
  return found.toString();
}

/** The state that a hash describes. Whatever does not fit the data is left as at the beginning. */
export function fromHash(data, text) {
  const state = initial(data);
  const given = new URLSearchParams(text);
  const number = (key, low, high) => {
    const x = given.has(key) && given.get(key) !== "" ? Number(given.get(key)) : Number.NaN;
    return x >= low && x <= high ? x : null;
  };
  const node = (name) => data.nodes.findIndex((x) => x.name === name);
  const whole = (key, low, high) => {
    const x = number(key, low, high);
    return Number.isInteger(x) ? x : null;
  };
  state.size = whole("size", 1, data.n);
  state.circuit = state.size === null ? (whole("circuit", 0, data.circuits.length - 1) ?? 0) : null;
  const layers = (given.get("layers") ?? "").split("-").map(Number);
  if (layers.length === 2 && layers.every(Number.isInteger) && layers[0] <= layers[1] && layers[1] < data.nLayers) {
    state.layers = layers;
  }
  if (given.has("kinds"))
    state.kinds = new Set(
      given
        .get("kinds")
        .split(".")
        .filter((k) => state.kinds.has(k)),
    );
  state.sign = whole("sign", -1, 1) ?? 0;
  state.least = number("least", 0, Number.MAX_VALUE) ?? 0;
  if (data.other && ["first", "both", "second"].includes(given.get("part"))) state.part = given.get("part");
  if (node(given.get("node")) >= 0) state.node = node(given.get("node"));
  const [u, v] = (given.get("edge") ?? "").split("-").map(Number);
  const edge = data.u.findIndex((x, e) => x === u && data.v[e] === v);
  if (edge >= 0) state.edge = edge;
  state.paths = given.get("paths") === "true";
  state.pins = (given.get("pins") ?? "")
    .split("~")
    .map(node)
    .filter((i) => i >= 0);
  // A damaged address shows the page as it is without it.
  const json = (key, usual) => {
    try {
      return JSON.parse(given.get(key)) ?? usual;
    } catch {
      return usual;
    }
  };
  for (const [name, label] of Object.entries(json("names", {}))) {
    if (node(name) >= 0 && typeof label === "string") state.names[name] = label.slice(0, NAME);
  }
  for (const group of [json("groups", [])].flat()) {
    if (!Array.isArray(group) || typeof group[0] !== "string") continue;
    const taken = state.groups.flatMap((x) => x.nodes);
    const nodes = [...new Set(group.slice(1).map(node))].filter((i) => i > 0 && !taken.includes(i));
    if (nodes.length > 1) state.groups.push({ name: group[0].slice(0, NAME), nodes: nodes.sort((a, b) => a - b) });
  }
  const view = (given.get("view") ?? "").split("~").map(Number);
  if (view.length === 3 && view.every(Number.isFinite) && view[0] > 0) {
    state.view = { k: Math.min(view[0], 40), x: view[1], y: view[2] };
  }
  return state;
}

/** Holds the state; tells listeners what changed, once a frame at most. */
export class Store {
  constructor(data) {
    this.data = data;
    this.state = fromHash(data, location.hash.slice(1));
    this.listeners = [];
    this.changed = new Set();
    addEventListener("hashchange", () => {
      if (location.hash.slice(1) !== toHash(data, this.state)) this.set(fromHash(data, location.hash.slice(1)));
    });
  }
  set(changes) {
    Object.assign(this.state, changes);
    for (const key of Object.keys(changes)) this.changed.add(key);
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => this.flush());
  }
  flush() {
    cancelAnimationFrame(this.waiting);
    this.waiting = null;
    const changed = this.changed;
    this.changed = new Set();
    for (const listener of this.listeners) listener(changed, this.state);
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.save(), 250);
  }
  save() {
    const hash = toHash(this.data, this.state);
    try {
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    } catch {
      // Pages inside a notebook's frame have no address of their own.
    }
  }
}
