// What is said of the node or edge that is selected.

import { widestPath } from "./circuits.js";
import { edgeName } from "./data.js";
import { h, plain, signed, whole } from "./dom.js";

const LISTED = 12;

export class Details {
  constructor(data, store, scene, graph) {
    Object.assign(this, { data, store, scene, graph });
    this.element = h("section", { class: "details", "aria-label": "details of what is selected" });
  }

  update(changed) {
    const keys = ["node", "edge", "paths", "pins", "circuit", "size", "layers", "kinds", "sign", "least", "part"];
    if (changed && !keys.some((key) => changed.has(key))) return;
    const { node, edge } = this.store.state;
    const held = document.activeElement?.id;
    this.element.replaceChildren(
      ...(node !== null ? this.ofNode(node) : edge !== null ? this.ofEdge(edge) : this.ofNothing()),
    );
    if (held && this.element.querySelector(`#${CSS.escape(held)}`)) document.getElementById(held).focus();
  }

  ofNothing() {
    const { pins } = this.store.state;
    const hint = h(
      "p",
      { class: "quiet" },
      "Select a node or an edge, in the graph, in the table or by its name, to see what it reads and writes.",
    );
    if (!pins.length) return [hint];
    return [
      hint,
      h("h4", {}, "Pinned"),
      h("ul", { class: "links" }, ...pins.map((i) => h("li", {}, this.nodeButton(i)))),
    ];
  }

  head(title) {
    const close = h(
      "button",
      {
        type: "button",
        class: "close",
        id: "details-close",
        "aria-label": "clear the selection",
        onclick: () => this.store.set({ node: null, edge: null }),
      },
      "×",
    );
    return h("div", { class: "bar" }, h("h3", {}, title), close);
  }

  nodeButton(i) {
    const { name } = this.data.nodes[i];
    return h(
      "button",
      { type: "button", class: "link", onclick: () => this.store.set({ node: i, edge: null }) },
      this.store.state.names[name] ?? name,
    );
  }

  edgeButton(e, text) {
    return h("button", { type: "button", class: "link", onclick: () => this.store.set({ edge: e, node: null }) }, text);
  }

  ofNode(i) {
    const { data, scene, store, graph } = this;
    const { name } = data.nodes[i];
    const { pins, paths, names } = store.state;
    const toggle = (id, text, on, onclick) => h("button", { type: "button", id, "aria-pressed": on, onclick }, text);
    const label = h("input", {
      id: "node-name",
      type: "text",
      maxlength: 60,
      value: names[name] ?? "",
      placeholder: "name it",
      autocomplete: "off",
    });
    label.addEventListener("change", () => {
      const { [name]: _, ...rest } = store.state.names;
      store.set({ names: label.value.trim() ? { ...rest, [name]: label.value.trim() } : rest });
    });
    const from = [];
    const into = [];
    const inputs = new Set(data.nodes[i].inputs);
    for (const e of scene.shown) {
      if (data.u[e] === i) from.push(e);
      if (inputs.has(data.v[e])) into.push(e);
    }
    const path = widestPath(data, scene.flags, i);
    return [
      this.head(scene.nodeText(i)),
      h(
        "div",
        { class: "bar" },
        toggle("node-pin", "Pin", pins.includes(i), () => scene.pin(i)),
        toggle("node-paths", "All paths from input to logits", paths, () => store.set({ paths: !paths })),
        toggle("node-centre", "Centre", false, () => graph.centre(i)),
        label,
      ),
      h("h4", {}, "Strongest path through it"),
      path
        ? h("p", { class: "path" }, ...this.pathButtons(path))
        : h("p", { class: "quiet" }, "None among the edges shown."),
      ...this.list(
        `Reads (${whole(into.length)})`,
        into,
        (e) =>
          `${data.nodes[data.u[e]].name} → ${data.receivers[data.v[e]].name.replace(name, "") || data.receivers[data.v[e]].name}`,
      ),
      ...this.list(`Writes to (${whole(from.length)})`, from, (e) => data.receivers[data.v[e]].name),
    ];
  }

  pathButtons(path) {
    const { data } = this;
    const parts = [this.nodeButton(data.u[path[0]])];
    for (const e of path) {
      parts.push(" → ", this.edgeButton(e, data.receivers[data.v[e]].name));
    }
    return parts;
  }

  list(title, edges, text) {
    const { data } = this;
    const rows = edges
      .slice(0, LISTED)
      .map((e) => h("li", {}, this.edgeButton(e, text(e)), h("span", { class: "number" }, signed(data.score[e]))));
    if (edges.length > LISTED)
      rows.push(h("li", { class: "quiet" }, `and ${whole(edges.length - LISTED)} weaker ones`));
    return [
      h("h4", {}, title),
      edges.length ? h("ul", { class: "links" }, ...rows) : h("p", { class: "quiet" }, "None among the edges shown."),
    ];
  }

  ofEdge(e) {
    const { data, scene } = this;
    const rows = [["score", signed(data.score[e])]];
    if (data.error) rows.push(["standard error", plain(data.error[e])]);
    if (data.other?.score) rows.push([`score, ${data.other.second}`, signed(data.other.score[e])]);
    if (data.other)
      rows.push(
        [data.other.first, scene.first[e] ? "has it" : "does not have it"],
        [data.other.second, scene.second[e] ? "has it" : "does not have it"],
      );
    else rows.push(["in the circuit", scene.first[e] ? "yes" : "no"]);
    const owners = data.receivers[data.v[e]].owners;
    return [
      this.head(edgeName(data, e)),
      h("dl", { class: "facts" }, ...rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
      h(
        "p",
        {},
        "from ",
        this.nodeButton(data.u[e]),
        ...(owners.length ? [" to ", ...owners.flatMap((i) => [this.nodeButton(i), " "])] : [" to logits"]),
      ),
      ...data.profiles.flatMap((profile) => this.bars(profile, e)),
    ];
  }

  /** The edge's score by example or by position, as bars beside their labels. */
  bars({ title, labels, values, edges }, e) {
    if (e >= edges)
      return [
        h("h4", {}, title),
        h("p", { class: "quiet" }, `Kept in this file only for the strongest ${whole(edges)} edges.`),
      ];
    const own = labels.map((_, i) => values[i * edges + e]);
    const largest = Math.max(...own.map(Math.abs)) || 1;
    const rows = own.map((value, i) => {
      const width = (50 * Math.abs(value)) / largest;
      const bar = h("span", {
        class: `fill ${value < 0 ? "minus" : "plus"}`,
        style: `width:${width}%;${value < 0 ? "right" : "left"}:50%`,
      });
      return h(
        "tr",
        {},
        h("th", { scope: "row" }, labels[i]),
        h("td", { class: "track" }, bar),
        h("td", { class: "number" }, signed(value)),
      );
    });
    return [
      h("h4", {}, title),
      h(
        "div",
        { class: "bars", tabindex: 0, role: "region", "aria-label": title },
        h("table", {}, h("tbody", {}, ...rows)),
      ),
    ];
  }
}
