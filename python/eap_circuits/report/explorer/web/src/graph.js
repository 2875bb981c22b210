// The picture: edges on two canvases, the strongest at once and the others frame by frame, nodes on a third. While the
// picture is dragged or zoomed its canvases move as they are; they are drawn again when it rests.

import { select } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import { colour, framed, h, ofBrowser, onScheme } from "./dom.js";
import { drawNodes, drawRows } from "./drawing.js";
import { edgePath, layout, Nearness } from "./layout.js";

const AT_ONCE = 400; // edges drawn in the first frame
const CHANGING = 200; // the same, while one change follows another
const LAG = 80; // milliseconds by which nodes may be late meanwhile
const SLOW = 20; // milliseconds: a frame that took longer had too much to draw
const REST = 120; // milliseconds after the last of many changes, as the slider makes them, until all edges follow
const REACH = 6; // how near, in pixels, the pointer must come to an edge
const SEARCHED = 6000; // strongest edges among which the pointer looks
const MANY = 800; // with more edges than these, lines are thinner
const CHUNK = 40; // edges in one stroke, of those that are drawn later
export const ALPHA = 0.85;

export class Graph {
  constructor(data, store, scene) {
    Object.assign(this, { data, store, scene });
    this.canvases = ["weak", "strong", "nodes"].map(() => h("canvas", { "aria-hidden": true }));
    this.moving = h("div", { class: "moving" }, ...this.canvases);
    this.tip = h("div", { class: "tip", hidden: true });
    this.said = h("div", { class: "unseen", "aria-live": "polite" });
    this.element = h(
      "div",
      {
        class: "graph",
        tabindex: 0,
        role: "application",
        "aria-label":
          "The circuit's graph. Arrow keys go from node to node, Enter selects, P pins, G groups the pinned nodes or opens a group, plus and minus zoom, 0 shows all, Escape clears. The table of edges holds the same.",
      },
      this.moving,
      this.tip,
    );
    this.transform = zoomIdentity;
    this.sketched = null; // which lines a sketch shows
    this.focus = null;
    // Inside another page the wheel moves that page, until the graph has been clicked.
    const free = (event) => !framed || event.type !== "wheel" || document.activeElement === this.element;
    this.zoom = zoom()
      .filter((event) => free(event) && (!event.ctrlKey || event.type === "wheel") && !event.button)
      .scaleExtent([0.2, 40])
      .on("zoom", ({ transform, sourceEvent }) => this.moved(transform, sourceEvent));
    select(this.element).call(this.zoom).on("dblclick.zoom", null);
    this.element.addEventListener("pointermove", (event) => this.point(event));
    this.element.addEventListener("pointerleave", () => this.showTip(null));
    this.element.addEventListener("click", (event) => this.click(event));
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.element.addEventListener("blur", () => this.focusOn(null));
    onScheme(() => this.place && this.paint());
    new ResizeObserver(() => this.resize()).observe(this.element);
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!width || !height || (width === this.width && height === this.height)) return;
    Object.assign(this, { width, height });
    this.ratio = Math.min(devicePixelRatio || 1, 2);
    for (const canvas of this.canvases) {
      canvas.width = width * this.ratio;
      canvas.height = height * this.ratio;
    }
    this.arrange();
  }

  /** Give every node and group its place. */
  arrange() {
    const { width, height } = this;
    if (!width) return;
    this.place = layout(this.data, width, height, this.store.state.groups);
    this.least = Math.min(width / this.place.width, height / this.place.height, 1);
    this.zoom.scaleExtent([this.least * 0.6, 40]);
    if (this.focus !== null) this.focus = this.scene.places.lead[this.focus];
    this.show(this.store.state.view);
  }

  /** Show a saved view, or all of the graph. */
  show(view) {
    const k = view?.k ?? 1;
    const scale = k * this.least;
    const x = (view?.x ?? 0.5) * this.place.width;
    const y = (view?.y ?? 0.5) * this.place.height;
    this.quiet = true;
    select(this.element).call(
      this.zoom.transform,
      zoomIdentity.translate(this.width / 2 - scale * x, this.height / 2 - scale * y).scale(scale),
    );
    this.quiet = false;
    this.paint();
  }

  moved(transform, byHand) {
    this.transform = transform;
    if (this.quiet) return;
    this.stop();
    const from = this.drawn ?? transform;
    const k = transform.k / from.k;
    this.moving.style.transform = `translate(${transform.x - k * from.x}px, ${transform.y - k * from.y}px) scale(${k})`;
    clearTimeout(this.resting);
    this.resting = setTimeout(() => {
      this.paint();
      if (byHand !== undefined) this.store.set({ view: this.view() });
    }, 140);
  }

  view() {
    const [x, y] = this.transform.invert([this.width / 2, this.height / 2]);
    return { k: this.transform.k / this.least, x: x / this.place.width, y: y / this.place.height };
  }

  /** Show what has changed: at once if it is one change, as a sketch if it follows another, until these rest. */
  draw() {
    if (!this.place) return;
    const now = performance.now();
    const sketched = now - this.changed < REST && this.drawn === this.transform;
    this.changed = now;
    if (sketched) this.sketch();
    else this.paint();
  }

  /** Only the strongest edges, and these only if the canvas shows others. */
  sketch() {
    const { scene } = this;
    const [weak, strong] = this.canvases;
    this.stop();
    const shown = scene.ordered.subarray(0, CHANGING);
    const look = Array.from(shown, (e, i) => [e, this.hue(e, i), scene.weight(e)]).join();
    if (this.sketched === null) drawRows(this.fresh(weak), this);
    if (this.sketched !== look) this.strokes(this.fresh(strong), shown, shown.length, 0);
    this.sketched = look;
    if (performance.now() - this.named > LAG) this.drawNodes();
    this.pending = true;
    this.later = setTimeout(() => this.paint(), REST);
  }

  /** Everything: the strongest edges at once, the others frame by frame. */
  paint() {
    this.stop();
    this.drawn = this.transform;
    this.moving.style.transform = "";
    this.sketched = null;
    const [weak, strong] = this.canvases.slice(0, 2).map((canvas) => this.fresh(canvas));
    const shown = this.scene.ordered;
    const first = Math.min(shown.length, AT_ONCE);
    drawRows(weak, this);
    this.strokes(strong, shown, first, 0);
    this.drawNodes();
    this.first ??= performance.now();
    let next = shown.length;
    let many = 10 * CHUNK;
    let last = Infinity;
    const step = (now) => {
      // Canvases are filled only after the script has run, so what edges cost shows in when the next frame comes.
      many = now - last < SLOW ? 2 * many : Math.max(10 * CHUNK, many >> 1);
      last = now;
      const to = Math.max(first, next - many);
      this.strokes(weak, shown, next, to);
      next = to;
      this.pending = next > first;
      if (this.pending) this.slice = requestAnimationFrame(step);
    };
    this.pending = next > first;
    if (this.pending) this.slice = requestAnimationFrame(step);
  }

  drawNodes() {
    this.named = performance.now();
    drawNodes(this.fresh(this.canvases[2]), this);
  }

  /** No more slices of what was drawn last. */
  stop() {
    clearTimeout(this.later);
    cancelAnimationFrame(this.slice);
  }

  fresh(canvas) {
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const { x, y, k } = this.transform;
    context.setTransform(this.ratio * k, 0, 0, this.ratio * k, this.ratio * x, this.ratio * y);
    return context;
  }

  /** Stroke the edges shown[to … from - 1], weakest first, so that strong ones lie on top. */
  strokes(context, shown, from, to) {
    const { data, place } = this;
    const chunk = from > AT_ONCE ? CHUNK : 1;
    for (let end = from; end > to; end -= chunk) {
      const begin = Math.max(to, end - chunk);
      const paths = new Map();
      for (let i = end - 1; i >= begin; i--) {
        const e = shown[i];
        const group = this.hue(e, i);
        if (!paths.has(group)) paths.set(group, []);
        paths.get(group).push(e);
      }
      context.lineWidth = this.lineWidth(shown[begin]) / this.transform.k;
      for (const group of ["faint", ...[...paths.keys()].filter((x) => x !== "faint")]) {
        if (!paths.has(group)) continue;
        context.beginPath();
        for (const e of paths.get(group)) edgePath(context, place, data.u[e], data.v[e]);
        context.globalAlpha = group === "faint" ? 0.5 : ALPHA;
        context.strokeStyle = colour(group);
        context.stroke();
      }
    }
    context.globalAlpha = 1;
  }

  /** The colour of the i-th line. */
  hue(e, i) {
    return i >= this.scene.litLines ? "faint" : this.scene.colourOf(e);
  }

  lineWidth(e) {
    const zoomed = Math.min(Math.sqrt(this.transform.k / this.least), 2);
    const crowded = Math.min(1, (MANY / this.scene.shown.length) ** 0.2);
    return (0.8 + 2.4 * Math.sqrt(this.scene.weight(e))) * zoomed * crowded;
  }

  // The pointer.

  nodeAt(x, y) {
    const { box } = this.place;
    const slack = 3 / this.transform.k;
    return this.place.nodes.findIndex(
      (node) =>
        Math.abs(node.x - x) < (node.width ?? box.width) / 2 + slack &&
        Math.abs(node.y - y) < (node.height ?? box.height) / 2 + slack,
    );
  }

  edgeAt(x, y) {
    const { ordered, litLines } = this.scene;
    const near = new Nearness(x, y);
    let best = REACH / this.transform.k;
    let found = null;
    for (let i = 0; i < Math.min(ordered.length, SEARCHED, litLines); i++) {
      const e = ordered[i];
      near.reset();
      edgePath(near, this.place, this.data.u[e], this.data.v[e]);
      if (near.distance < best) {
        best = near.distance;
        found = e;
      }
    }
    return found;
  }

  under(event) {
    const frame = this.element.getBoundingClientRect();
    const at = [event.clientX - frame.left, event.clientY - frame.top];
    const [x, y] = this.transform.invert(at);
    const node = this.nodeAt(x, y);
    return { at, node: node < 0 ? null : node, edge: node < 0 ? this.edgeAt(x, y) : null };
  }

  point(event) {
    if (event.buttons || this.pointing) return;
    this.pointing = requestAnimationFrame(() => {
      this.pointing = null;
      const { at, node, edge } = this.under(event);
      this.element.style.cursor = node !== null || edge !== null ? "pointer" : "";
      this.showTip(node !== null ? this.scene.nodeText(node) : edge !== null ? this.scene.edgeText(edge) : null, at);
    });
  }

  showTip(text, at) {
    this.tip.hidden = text === null;
    if (text === null) return;
    this.tip.textContent = text;
    const right = at[0] > this.width / 2;
    this.tip.style.left = right ? "" : `${at[0] + 14}px`;
    this.tip.style.right = right ? `${this.width - at[0] + 14}px` : "";
    this.tip.style.top = `${Math.min(at[1] + 12, this.height - 40)}px`;
  }

  click(event) {
    if (event.defaultPrevented) return;
    const { node, edge } = this.under(event);
    this.store.set({ node, edge });
  }

  // The keyboard.

  key(event) {
    if (ofBrowser(event)) return;
    const arrows = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    const { state } = this.store;
    if (arrows[event.key]) this.focusOn(this.neighbour(arrows[event.key]));
    else if (event.key === "Enter" && this.focus !== null) this.store.set({ node: this.focus, edge: null });
    else if (event.key === "p" && this.focus !== null) this.scene.pin(this.focus);
    else if (event.key === "g") this.regroup(this.focus ?? state.node);
    else if (event.key === "Escape" && (state.node !== null || state.edge !== null))
      this.store.set({ node: null, edge: null });
    else if (event.key === "+" || event.key === "=") this.zoomBy(1.4);
    else if (event.key === "-") this.zoomBy(1 / 1.4);
    else if (event.key === "0") this.reset();
    else return;
    event.preventDefault();
  }

  regroup(node) {
    if (node !== null && this.scene.groupOf(node)) this.scene.ungroup(node);
    else this.scene.group();
  }

  zoomBy(factor) {
    select(this.element).call(this.zoom.scaleBy, factor);
    this.store.set({ view: this.view() });
  }

  reset() {
    this.store.set({ view: null });
    this.show(null);
  }

  /** Bring a node into the middle. */
  centre(node) {
    const { x, y } = this.place.nodes[node];
    const view = { k: Math.max(this.view().k, node ? 2 : 1), x: x / this.place.width, y: y / this.place.height };
    this.store.set({ view });
    this.show(view);
  }

  neighbour([dx, dy]) {
    const { nodes } = this.place;
    const from = nodes[this.focus ?? this.store.state.node ?? 0];
    let best = Infinity;
    let found = this.focus ?? this.store.state.node ?? 0;
    nodes.forEach((node, i) => {
      if (!this.scene.stands(i)) return;
      const along = (node.x - from.x) * dx + (node.y - from.y) * dy;
      const across = Math.abs((node.x - from.x) * dy) + Math.abs((node.y - from.y) * dx);
      if (along > 1 && along + 3 * across < best) {
        best = along + 3 * across;
        found = i;
      }
    });
    return found;
  }

  focusOn(node) {
    if (node === this.focus) return;
    this.focus = node;
    this.said.textContent = node === null ? "" : this.scene.nodeText(node);
    if (this.place) this.drawNodes();
  }
}
