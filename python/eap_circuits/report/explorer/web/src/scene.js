// What the state makes of the data: the edges and nodes to show, which of them stand out, and what is said of them.

import { count, filtered, overlap, ranking, strongest, through } from "./circuits.js";
import { edgeName } from "./data.js";
import { plain, signed, whole } from "./dom.js";

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
    if (touched([...CIRCUIT, "preview", ...FILTERS, ...LIT])) this.light();
  }

  choose() {
    const { data, store } = this;
    const { circuit, size } = store.state;
    const index = this.preview ?? circuit;
    this.circuit = index === null ? null : data.circuits[index];
    this.first = this.circuit ? this.circuit.flags : strongest(data, this.order, size);
    if (!data.other) return;
    const taken = this.circuit ? this.circuit.taken : size;
    this.second = taken && this.otherOrder ? strongest(data, this.otherOrder, taken) : data.other.flags;
    this.overlap = overlap(data, this.first, this.second);
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
    this.read = new Uint8Array(data.receivers.length);
    for (const e of this.shown) {
      this.present[data.u[e]] = 1;
      this.read[data.v[e]] = 1;
      for (const owner of data.receivers[data.v[e]].owners) this.present[owner] = 1;
    }
  }

  light() {
    const { data, store } = this;
    const { node, edge, paths, pins } = store.state;
    this.lit = null;
    if (edge !== null) this.lit = this.flags.map((_, e) => +(e === edge));
    else if (node !== null && paths) this.lit = through(data, this.flags, node);
    else if (node !== null || pins.length) this.lit = this.touching(node !== null ? [node] : pins);
    this.litNodes = null;
    this.ordered = this.shown;
    if (!this.lit) return;
    // What stands out is drawn last; an edge that is selected is drawn even if no circuit has it.
    const own = edge !== null ? [edge] : this.shown.filter((e) => this.lit[e]);
    this.ordered = Uint32Array.from([...own, ...this.shown.filter((e) => !this.lit[e])]);
    this.litNodes = new Uint8Array(data.nodes.length);
    if (node !== null) this.litNodes[node] = 1;
    for (const e of this.ordered) {
      if (!this.lit[e]) break;
      this.litNodes[data.u[e]] = 1;
      for (const owner of data.receivers[data.v[e]].owners) this.litNodes[owner] = 1;
    }
  }

  touching(nodes) {
    const { data } = this;
    const from = new Set(nodes);
    const into = new Set(nodes.flatMap((i) => data.nodes[i].inputs));
    return this.flags.map((flag, e) => +(flag && (from.has(data.u[e]) || into.has(data.v[e]))));
  }

  weight(e) {
    const { data } = this;
    const own = Math.abs(data.score[e]) / this.largest;
    const other = data.other?.score ? Math.abs(data.other.score[e]) / this.otherLargest : 0;
    const found = Math.max(own, other);
    return found >= 0 ? Math.min(found, 1) : 0;
  }

  colourOf(e) {
    if (this.data.other) return this.first[e] ? (this.second[e] ? "both" : "positive") : "negative";
    return this.data.score[e] < 0 ? "negative" : "positive";
  }

  nodeText(i) {
    const { data, store } = this;
    const { name } = data.nodes[i];
    const label = store.state.names[name];
    const score = data.nodeScores ? `, score ${signed(data.nodeScores[i])}` : "";
    return `${label ? `${label} (${name})` : name}${score}${this.present[i] ? "" : ", not in what is shown"}`;
  }

  edgeText(e) {
    const { data } = this;
    const other = data.other?.score ? `; ${data.other.second} ${signed(data.other.score[e])}` : "";
    return `${edgeName(data, e)}  ${signed(data.score[e])}${other}`;
  }

  /** One sentence on what is shown. */
  summary() {
    const { data, circuit, store } = this;
    const { curve } = data;
    const hidden = this.shown.length < this.size ? ` ${whole(this.shown.length)} pass the filters.` : "";
    const what = circuit ? circuit.label : `The strongest ${whole(store.state.size)}, those on paths`;
    const edges = `${what}: ${whole(count(this.first))} of ${whole(data.total)} edges.`;
    if (!curve) return edges + hidden;
    if (circuit)
      return edges + (circuit.faithfulness === null ? "" : ` Faithfulness ${plain(circuit.faithfulness)}.`) + hidden;
    return `${edges} This size was not measured.${hidden}`;
  }

  pin(node) {
    const { pins } = this.store.state;
    this.store.set({ pins: pins.includes(node) ? pins.filter((i) => i !== node) : [...pins, node] });
  }
}
