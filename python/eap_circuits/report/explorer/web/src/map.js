// Layers × heads and MLPs: the sum of the scores of each node's outgoing edges.

import { colour, h, onScheme } from "./dom.js";

export class NodeMap {
  constructor(data, store, scene) {
    Object.assign(this, { data, store, scene });
    this.canvas = h("canvas", {
      role: "img",
      "aria-label": "Scores of nodes by layer and head; the same numbers are in the details of each node.",
    });
    this.said = h(
      "p",
      { class: "quiet", "aria-live": "off" },
      "Point at a cell to read it; click to select the node. A dot marks nodes in the graph.",
    );
    this.element = h("section", { class: "map" }, this.canvas, this.said);
    this.heads = Math.max(1, ...data.nodes.map((node) => node.head + 1));
    this.largest = Math.max(...data.nodeScores.slice(1).map(Math.abs).filter(Number.isFinite), 0) || 1;
    this.canvas.addEventListener("pointermove", (event) => {
      const node = this.at(event);
      if (node) this.said.textContent = scene.nodeText(node);
    });
    this.canvas.addEventListener("click", (event) => {
      const node = this.at(event);
      if (node) store.set({ node, edge: null });
    });
    onScheme(() => this.update());
    new ResizeObserver(() => this.update()).observe(this.element);
  }

  at(event) {
    const x = Math.floor((event.offsetX - this.left) / this.cell.width);
    const layer = this.data.nLayers - 1 - Math.floor((event.offsetY - 2) / this.cell.height);
    return this.data.nodes.findIndex((node) => node.layer === layer && this.column(node) === x && node.layer >= 0);
  }

  column(node) {
    return node.head < 0 ? this.heads + 1 : node.head;
  }

  update() {
    const { data, scene, store, canvas } = this;
    const width = this.element.clientWidth;
    if (!width) return;
    const ratio = devicePixelRatio || 1;
    this.left = 56;
    this.cell = {
      width: Math.min(34, (width - this.left - 4) / (this.heads + 2)),
      height: Math.max(7, Math.min(16, 420 / data.nLayers)),
    };
    const size = {
      width: this.left + (this.heads + 2) * this.cell.width + 2,
      height: data.nLayers * this.cell.height + 34,
    };
    Object.assign(canvas, { width: size.width * ratio, height: size.height * ratio });
    Object.assign(canvas.style, { width: `${size.width}px`, height: `${size.height}px` });
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    const y = (layer) => 2 + (data.nLayers - 1 - layer) * this.cell.height;
    data.nodes.forEach((node, i) => {
      if (node.layer < 0) return;
      const score = data.nodeScores[i];
      const x = this.left + this.column(node) * this.cell.width;
      context.globalAlpha = 1;
      context.fillStyle = colour("node");
      context.fillRect(x, y(node.layer), this.cell.width - 1, this.cell.height - 1);
      context.globalAlpha = Math.min(1, Math.sqrt(Math.abs(score) / this.largest)) || 0;
      context.fillStyle = colour(score < 0 ? "negative" : "positive");
      context.fillRect(x, y(node.layer), this.cell.width - 1, this.cell.height - 1);
      context.globalAlpha = 1;
      if (scene.present[i]) {
        context.fillStyle = colour("ink");
        context.beginPath();
        context.arc(x + this.cell.width - 4, y(node.layer) + this.cell.height / 2 - 0.5, 1.6, 0, 7);
        context.fill();
      }
      if (store.state.node === i) {
        context.strokeStyle = colour("accent");
        context.lineWidth = 2;
        context.strokeRect(x, y(node.layer), this.cell.width - 1, this.cell.height - 1);
      }
    });
    context.fillStyle = colour("ink");
    context.textAlign = "right";
    const every = Math.ceil(12 / this.cell.height);
    for (let layer = 0; layer < data.nLayers; layer += every)
      context.fillText(data.layers[layer], this.left - 6, y(layer) + this.cell.height / 2);
    context.textAlign = "center";
    const below = data.nLayers * this.cell.height + 12;
    const apart = Math.ceil(20 / this.cell.width);
    for (let head = 0; head < this.heads; head += apart)
      context.fillText(head, this.left + (head + 0.5) * this.cell.width, below);
    context.fillText("MLP", this.left + (this.heads + 1.4) * this.cell.width, below);
    context.fillText("head", this.left + (this.heads / 2) * this.cell.width, below + 14);
  }
}
