// Puts the explorer into the page, above what the page shows without it.

import { Controls } from "./controls.js";
import { Sizes } from "./curve.js";
import { read } from "./data.js";
import { Details } from "./details.js";
import { framed, h } from "./dom.js";
import { ALPHA, Graph } from "./graph.js";
import { NodeMap } from "./map.js";
import { Scene } from "./scene.js";
import { Store } from "./state.js";
import { Table } from "./table.js";

function start() {
  const data = read(JSON.parse(document.getElementById("explorer-data").textContent));
  const store = new Store(data);
  const scene = new Scene(data, store);
  const graph = new Graph(data, store, scene);
  const sizes = new Sizes(data, store, scene);
  const controls = new Controls(data, store, scene, graph);
  const details = new Details(data, store, scene, graph);
  const table = new Table(data, store, scene);
  const map = data.nodeScores ? new NodeMap(data, store, scene) : null;
  const below = [];
  if (map) below.push(h("h2", {}, "Nodes by layer and head"), map.element);
  below.push(h("h2", { id: "edges" }, "All edges"), table.element);
  document
    .getElementById("explorer")
    .replaceChildren(
      h("div", { class: "controls" }, controls.tools, controls.filters, controls.overlap),
      h(
        "div",
        { class: "stage" },
        h("div", { class: "picture" }, graph.element, graph.said, controls.legend),
        h("div", { class: "side" }, sizes.element, details.element),
      ),
      ...below,
    );
  document.documentElement.classList.add("live");
  document.documentElement.classList.toggle("framed", framed);
  const looked = [
    "node",
    "edge",
    "paths",
    "pins",
    "names",
    "circuit",
    "size",
    "preview",
    "layers",
    "kinds",
    "sign",
    "least",
    "part",
  ];
  // While the slider moves only the picture follows, and how large the circuit is; the rest once it rests.
  const late = { panels: new Set(), table: new Set() };
  const say = (changed) => {
    controls.update();
    details.update(changed);
  };
  let resting;
  store.listeners.push((changed) => {
    scene.update(changed);
    if (changed.has("groups")) graph.arrange();
    else if (looked.some((key) => changed.has(key))) graph.draw();
    if (changed.has("view") && !changed.has("circuit") && store.state.view === null) graph.show(null);
    sizes.update();
    const sliding = [...changed].every((key) => ["circuit", "size", "preview"].includes(key));
    if (!sliding) say(changed);
    for (const key of changed) {
      late.table.add(key);
      if (sliding) late.panels.add(key);
    }
    clearTimeout(resting);
    resting = setTimeout(
      () => {
        if (late.panels.size) say(late.panels);
        table.update(late.table);
        map?.update();
        late.panels.clear();
        late.table.clear();
      },
      changed.has("edge") ? 0 : 100,
    );
  });
  graph.resize();
  sizes.update();
  controls.update();
  details.update();
  // The rest can wait until the graph is on the screen.
  requestAnimationFrame(() =>
    setTimeout(() => {
      table.update();
      map?.update();
    }),
  );
  performance.mark("explorer");
  return { data, store, scene, graph, table, sizes, ALPHA };
}

// For tests and the console.
window.explorer = start();
