// What the state makes of the data: the edges and nodes to show, which of them stand out, and what is said of them.

import { count, filtered, overlap, ranking, strongest, through } from "./circuits.js";
import { edgeName } from "./data.js";
import { plain, signed, whole } from "./dom.js";
import { bundled, places } from "./groups.js";

const CIRCUIT = ["circuit", "size"];
const FILTERS = ["layers", "kinds", "sign", "least", "part"];
const LIT = ["node", "edge", "paths", "pins"];

export class Scene {
  constructor(data, store) {
    Object.assign(this, { data, store });
    this.order = ranking(data.score, data.signed);
    this.otherOrder = data.other?.score ? ranking(data.other.score, data.signed) : null;
    this.largest = Math.max(...data.score.slice(0, 1).map(Math.abs), 0) || 1;
    this.otherLargest = this.otherOrder ? Math.abs(data.other.score[ranking(data.other.score, false)[0]] ?? 0) || 1 : 1;
    this.preview = null;
    this.update(null);
  }

  /** Compute anew what changed keys touch; `null` is everything. */
  update(changed) {
    const touched = (keys) => !changed || keys.some((key) => changed.has(key));
    if (touched([...CIRCUIT, "preview"])) this.choose();
    if (touched([...CIRCUIT, "preview", ...FILTERS])) this.filter();
    if (touched([...CIRCUIT, "preview", ...FILTERS, "groups"])) this.gather();
    if (touched([...CIRCUIT, "preview", ...FILTERS, "groups", ...LIT])) this.light();
  }

  choose() {
    const { data, store } = this;
    const { circuit, size } = store.state;
    const index = this.preview ?? circuit;
    this.circuit = index === null ? null : data.circuits[index];
    this.first = this.circuit ? this.circuit.flags : strongest(data, this.order, size);
    this.kept = count(this.first);
    if (!data.other) return;
    const taken = this.circuit ? this.circuit.taken : size;
    this.second = taken && this.otherOrder ? strongest(data, this.otherOrder, taken) : data.other.flags;
  }

  /** Numbers of edges and of nodes that two circuits share. */
  overlap() {
    return overlap(this.data, this.first, this.second);
  }

  filter() {
    const { data, store } = this;
    const { part } = store.state;
    const wanted = {
      all: (a, b) => a || b,
      first: (a, b) => a && !b,
      both: (a, b) => a && b,
      second: (a, b) => !a && b,
    }[part];
    const flags = data.other ? this.first.map((a, e) => +wanted(a, this.second[e])) : this.first;
    this.size = count(flags);
    this.flags = filtered(data, flags, store.state);
    this.shown = new Uint32Array(count(this.flags));
    let next = 0;
    for (let e = 0; e < data.n; e++) if (this.flags[e]) this.shown[next++] = e;
    this.present = new Uint8Array(data.nodes.length);
    for (const e of this.shown) {
      this.present[data.u[e]] = 1;
      for (const owner of data.receivers[data.v[e]].owners) this.present[owner] = 1;
    }
  }

  /** The lines of the picture: each is an edge, the strongest of those that it stands for. */
  gather() {
    const { data, store } = this;
    const { groups } = store.state;
    this.places = places(data, groups);
    const bundles = groups.length ? bundled(data, this.shown, this.places) : [];
    this.bundles = new Map(bundles.flatMap((bundle) => bundle.map((e) => [e, bundle])));
    this.lines = this.shown;
    if (groups.length) {
      const found = bundles.map(([e]) => ({ e, sum: this.sum(e, data.score) }));
      this.lines = Uint32Array.from(found.sort((a, b) => b.sum - a.sum || a.e - b.e).map(({ e }) => e));
    }
    this.read = new Uint8Array(data.receivers.length);
    for (const e of this.lines) this.read[this.places.port[data.v[e]]] = 1;
  }

  /** The edges that are drawn as one line with e. */
  bundleOf(e) {
    return this.bundles.get(e) ?? [e];
  }

  groupOf(node) {
    return this.store.state.groups.find(({ nodes }) => nodes.includes(node));
  }

  members(node) {
    return this.groupOf(node)?.nodes ?? [node];
  }

  /** Does this node, or the group that it is the first of, stand in the graph? */
  stands(node) {
    return this.places.lead[node] === node && this.members(node).some((i) => this.present[i]);
  }

  light() {
    const { data, store } = this;
    const { node, edge, paths, pins } = store.state;
    this.lit = null;
    const { lead, home } = this.places;
    if (edge !== null) this.lit = this.flags.map((_, e) => +(e === edge));
    else if (node !== null && paths) this.lit = this.through(this.members(node));
    else if (node !== null || pins.length) this.lit = this.touching(node !== null ? [node] : pins);
    this.litNodes = null;
    this.ordered = this.lines;
    this.litLines = Infinity;
    if (!this.lit) return;
    const { lit, bundles } = this;
    const stands = bundles.size ? (e) => this.bundleOf(e).some((i) => lit[i]) : (e) => lit[e];
    // What stands out comes first, and is drawn last; an edge that is selected is drawn even if no circuit has it.
    let own = this.lines.filter(stands);
    if (edge !== null && !own.length && home[data.v[edge]] !== lead[data.u[edge]]) own = [edge];
    this.ordered = new Uint32Array(own.length + this.lines.length);
    this.ordered.set(own);
    let next = own.length;
    for (const e of this.lines) if (!stands(e)) this.ordered[next++] = e;
    this.ordered = this.ordered.subarray(0, next);
    this.litLines = own.length;
    this.litNodes = new Uint8Array(data.nodes.length);
    if (node !== null) this.litNodes[lead[node]] = 1;
    for (const e of own) {
      this.litNodes[lead[data.u[e]]] = 1;
      for (const owner of data.receivers[data.v[e]].owners) this.litNodes[lead[owner]] = 1;
    }
  }

  through(nodes) {
    const found = nodes.map((node) => through(this.data, this.flags, node));
    return found.reduce((all, one) => all.map((x, e) => x | one[e]));
  }

  touching(chosen) {
    const { data } = this;
    const nodes = chosen.flatMap((i) => this.members(i));
    const from = new Uint8Array(data.nodes.length);
    const into = new Uint8Array(data.receivers.length);
    for (const i of nodes) {
      from[i] = 1;
      for (const v of data.nodes[i].inputs) into[v] = 1;
    }
    return this.flags.map((flag, e) => flag && from[data.u[e]] | into[data.v[e]]);
  }

  weight(e) {
    const { data } = this;
    const own = this.sum(e, data.score) / this.largest;
    const other = data.other?.score ? this.sum(e, data.other.score) / this.otherLargest : 0;
    const found = Math.max(own, other);
    return found >= 0 ? Math.min(found, 1) : 0;
  }

  /** The sum of the absolute scores of a line's edges. */
  sum(e, scores) {
    return this.bundleOf(e).reduce((sum, i) => sum + Math.abs(scores[i]), 0);
  }

  colourOf(e) {
    const edges = this.bundleOf(e);
    if (this.data.other) {
      if (!edges.some((i) => this.first[i])) return "negative";
      return edges.some((i) => this.second[i]) ? "both" : "positive";
    }
    return edges.reduce((sum, i) => sum + this.data.score[i], 0) < 0 ? "negative" : "positive";
  }

  /** What stands where this node does. */
  label(node) {
    const { name } = this.data.nodes[node];
    return this.groupOf(node)?.name ?? this.store.state.names[name] ?? name;
  }

  /** What a line enters: a receiver, or a group. */
  end(e) {
    const v = this.data.v[e];
    return this.places.home[v] < 0 ? this.data.receivers[v].name : this.label(this.places.home[v]);
  }

  nodeText(i) {
    const { data, store } = this;
    const { name } = data.nodes[i];
    const label = store.state.names[name];
    const group = this.groupOf(i);
    const nodes = this.members(i);
    const title = group ? `${group.name}, a group of ${nodes.length} nodes` : label ? `${label} (${name})` : name;
    const score = data.nodeScores ? `, score ${signed(nodes.reduce((sum, j) => sum + data.nodeScores[j], 0))}` : "";
    return `${title}${score}${nodes.some((j) => this.present[j]) ? "" : ", not in what is shown"}`;
  }

  /** The score of a line's edge, or what the scores of its edges sum to. */
  amount(e) {
    const n = this.bundleOf(e).length;
    return n > 1 ? `${plain(this.sum(e, this.data.score))} in ${whole(n)} edges` : signed(this.data.score[e]);
  }

  edgeText(e) {
    const { data } = this;
    if (this.bundleOf(e).length > 1) return `${this.label(data.u[e])} → ${this.end(e)}  ${this.amount(e)}`;
    const other = data.other?.score ? `; ${data.other.second} ${signed(data.other.score[e])}` : "";
    return `${edgeName(data, e)}  ${signed(data.score[e])}${other}`;
  }

  /** One sentence on what is shown. */
  summary() {
    const { data, circuit, store } = this;
    const { curve } = data;
    const hidden = this.shown.length < this.size ? ` ${whole(this.shown.length)} pass the filters.` : "";
    const what = circuit ? circuit.label : `The strongest ${whole(store.state.size)}, those on paths`;
    const n = this.kept;
    const left = circuit?.n_edges > n ? ` Only its strongest ${whole(n)} are in this page.` : "";
    const edges = `${what}: ${whole(circuit?.n_edges ?? n)} of ${whole(data.total)} edges.${left}`;
    if (!curve) return edges + hidden;
    if (circuit)
      return edges + (circuit.faithfulness === null ? "" : ` Faithfulness ${plain(circuit.faithfulness)}.`) + hidden;
    return `${edges} This size was not measured.${hidden}`;
  }

  pin(node) {
    const { pins } = this.store.state;
    this.store.set({ pins: pins.includes(node) ? pins.filter((i) => i !== node) : [...pins, node] });
  }

  /** The pinned nodes that can be grouped: all except `input`; groups among them become part of the new one. */
  groupable() {
    const nodes = this.store.state.pins.flatMap((i) => this.members(i)).filter((i) => i > 0);
    return [...new Set(nodes)].sort((a, b) => a - b);
  }

  group() {
    const { pins, groups } = this.store.state;
    const nodes = this.groupable();
    if (nodes.length < 2) return;
    const others = groups.filter((group) => !nodes.includes(group.nodes[0]));
    this.store.set({
      groups: [...others, { name: `${nodes.length} nodes`, nodes }],
      pins: pins.filter((i) => !nodes.includes(i)),
      node: nodes[0],
      edge: null,
    });
  }

  /** Open a group; its nodes are pinned again, as they were before. */
  ungroup(node) {
    const { pins, groups } = this.store.state;
    const gone = this.groupOf(node);
    const others = pins.filter((i) => !gone.nodes.includes(i));
    this.store.set({ groups: groups.filter((group) => group !== gone), pins: [...others, ...gone.nodes] });
  }
}
