// Nodes, rows and legends of the picture, on a canvas; and all of it as SVG.

import { path as svgPath } from "d3-path";
import { colour } from "./dom.js";
import { edgePath } from "./layout.js";

const READABLE = 6.5; // pixels: smaller text is not drawn
const FONT = 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif';

/** What the picture says of each node: whether it is there, how it stands out, and its text. */
function marks(graph) {
  const { scene, store, focus } = graph;
  const { lead } = scene.places;
  const { node: chosen, pins } = store.state;
  return graph.data.nodes.map((node, i) => {
    const focused = focus === i || (chosen !== null && lead[chosen] === i);
    const group = scene.members(i).length > 1;
    return {
      hidden: lead[i] !== i,
      present: scene.stands(i) || i === 0 || scene.litNodes?.[i],
      dim: scene.litNodes && !scene.litNodes[i],
      strong: focused || group || pins.includes(i),
      focused,
      text: scene.label(i),
      mlp: node.head < 0,
      group,
    };
  });
}

export function drawRows(context, { place, data, transform }) {
  context.fillStyle = colour("muted");
  context.strokeStyle = colour("faint");
  context.lineWidth = 1 / transform.k;
  context.textAlign = "right";
  context.textBaseline = "middle";
  const size = Math.min(11, Math.max(place.pitchY * 0.5, 7));
  context.font = `${size}px ${FONT}`;
  const every = Math.ceil(READABLE / (size * transform.k));
  for (let layer = 0; layer < data.nLayers; layer++) {
    const y = place.rowY(layer);
    context.beginPath();
    context.moveTo(place.left, y);
    context.lineTo(place.width, y);
    context.stroke();
    if (layer % every === 0) context.fillText(data.layers[layer], place.left - 4, y);
  }
}

export function drawNodes(context, graph) {
  const { place, scene, transform } = graph;
  const { k } = transform;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.lineWidth = 1.6 / k;
  context.strokeStyle = colour("muted");
  context.beginPath();
  for (const { x0, x1, y, receiver } of place.shared) {
    if (!scene.read[receiver]) continue;
    context.moveTo(x0, y);
    context.lineTo(x1, y);
  }
  context.stroke();
  drawPorts(context, graph);
  const bar = { x: place.nodes[0].x, y: place.bars.top - 11, width: place.nodes[0].width, height: 22 };
  const all = marks(graph);
  const later = [];
  place.nodes.forEach((node, i) => {
    if (all[i].hidden) return;
    if (all[i].strong) later.push([node, all[i]]);
    else drawNode(context, node, all[i], k);
  });
  drawNode(context, bar, { present: true, text: "logits", mlp: true }, k);
  for (const [node, mark] of later) drawNode(context, node, mark, k);
}

function drawPorts(context, { place, scene, data, transform }) {
  const { home } = scene.places;
  const size = Math.min(3.2, place.box.height * 0.22);
  if (size * transform.k < 1.2) return;
  for (const kind of ["q", "k", "v", "other", "mlp"]) {
    context.fillStyle = colour({ q: "query", k: "key", v: "value" }[kind] ?? "muted");
    context.beginPath();
    place.ports.forEach((port, i) => {
      if (!port || !scene.read[i] || (home[i] < 0 ? data.receivers[i].kind : "other") !== kind) return;
      context.moveTo(port.x, port.y);
      context.lineTo(port.x - size, port.y + 1.6 * size);
      context.lineTo(port.x + size, port.y + 1.6 * size);
    });
    context.fill();
  }
}

function drawNode(context, node, mark, k) {
  const { x, y } = node;
  // What stands out can be read at any scale.
  const width = mark.strong ? Math.max(node.width, (7 * mark.text.length + 10) / k) : node.width;
  const height = mark.strong ? Math.max(node.height, 17 / k) : node.height;
  context.beginPath();
  context.roundRect(x - width / 2, y - height / 2, width, height, Math.min(5, height / 4));
  context.fillStyle = colour(mark.focused ? "chosen" : mark.mlp ? "node" : "paper");
  if (mark.present || mark.strong) context.fill();
  context.lineWidth = (mark.focused ? 2.5 : mark.strong ? 2 : mark.present ? 1 : 0.5) / k;
  const line = mark.focused ? "accent" : mark.strong ? "ink" : mark.present && !mark.dim ? "muted" : "faint";
  context.strokeStyle = colour(line);
  context.stroke();
  if (mark.group) {
    // A second frame around it.
    const more = 3 / k;
    context.beginPath();
    context.roundRect(x - width / 2 - more, y - height / 2 - more, width + 2 * more, height + 2 * more, 5 / k);
    context.stroke();
  }
  if (!mark.present && !mark.strong) return;
  const fits = Math.min(11, height * 0.68, (width / Math.max(mark.text.length, 4)) * 1.7);
  const size = mark.strong ? Math.max(fits, 11 / k) : fits;
  if (size * k < READABLE) return;
  context.font = `${mark.strong ? "600 " : ""}${size}px ${FONT}`;
  context.fillStyle = colour(mark.dim && !mark.strong ? "muted" : "ink");
  context.fillText(mark.text, x, y);
}

const escaped = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

/** The whole picture as an SVG file's text, whatever part of it is in view. */
export function toSvg(graph, title) {
  const { place, scene, data } = graph;
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${place.width.toFixed(1)} ${place.height.toFixed(1)}" width="${Math.round(place.width)}" height="${Math.round(place.height)}" font-family="sans-serif" text-anchor="middle"><title>${escaped(title)}</title><rect width="100%" height="100%" fill="${colour("paper")}"/>`,
  ];
  for (let layer = 0; layer < data.nLayers; layer++) {
    parts.push(
      `<text x="${place.left - 4}" y="${place.rowY(layer).toFixed(1)}" font-size="8" text-anchor="end" fill="${colour("muted")}">${data.layers[layer]}</text>`,
    );
  }
  parts.push(`<g fill="none" stroke-opacity="0.85">`);
  for (let i = scene.ordered.length - 1; i >= 0; i--) {
    const e = scene.ordered[i];
    const line = svgPath(1); // rounded to tenths
    edgePath(line, place, data.u[e], data.v[e]);
    const faint = i >= scene.litLines;
    const width = (0.8 + 2.4 * Math.sqrt(scene.weight(e))).toFixed(2);
    parts.push(
      `<path d="${line}" stroke="${colour(faint ? "faint" : scene.colourOf(e))}" stroke-width="${width}"><title>${escaped(scene.edgeText(e))}</title></path>`,
    );
  }
  parts.push("</g>");
  const box = (node, text, fill) =>
    parts.push(
      `<rect x="${(node.x - node.width / 2).toFixed(1)}" y="${(node.y - node.height / 2).toFixed(1)}" width="${node.width.toFixed(1)}" height="${node.height.toFixed(1)}" rx="4" fill="${fill}" stroke="${colour("muted")}"/><text x="${node.x.toFixed(1)}" y="${(node.y + 3).toFixed(1)}" font-size="${Math.min(10, node.height * 0.62).toFixed(1)}" fill="${colour("ink")}">${escaped(text)}</text>`,
    );
  marks(graph).forEach((mark, i) => {
    if (mark.present && !mark.hidden) box(place.nodes[i], mark.text, colour(mark.mlp ? "node" : "paper"));
  });
  box({ ...place.nodes[0], y: place.bars.top - 11 }, "logits", colour("node"));
  return `${parts.join("")}</svg>`;
}

/** What is in view, as a canvas with a background. */
export function toCanvas(graph) {
  const [first] = graph.canvases;
  const found = document.createElement("canvas");
  Object.assign(found, { width: first.width, height: first.height });
  const context = found.getContext("2d");
  context.fillStyle = colour("paper");
  context.fillRect(0, 0, found.width, found.height);
  for (const canvas of graph.canvases) context.drawImage(canvas, 0, 0);
  return found;
}
