// What is said of the node or edge that is selected.

import { widestPath } from "./circuits.js";
import { edgeName } from "./data.js";
import { h, plain, signed, whole } from "./dom.js";
import { NAME } from "./state.js";

const LISTED = 12;

export class Details {
  constructor(data, store, scene, graph) {
    Object.assign(this, { data, store, scene, graph });
    this.element = h("section", { class: "details", "aria-label": "details of what is selected" });
  }

  update(changed) {
    const keys = [
      "node",
      "edge",
      "paths",
      "pins",
      "groups",
      "circuit",
      "size",
      "layers",
      "kinds",
      "sign",
      "least",
      "part",
    ];
    if (changed && !keys.some((key) => changed.has(key))) return;
    const { node, edge } = this.store.state;
    const held = document.activeElement?.id;
    this.element.replaceChildren(
      ...(node !== null
        ? this.ofNode(this.scene.places.lead[node])
        : edge !== null
          ? this.ofEdge(edge)
          : this.ofNothing()),
      ...this.pinned(),
      ...this.groups(),
    );
    if (held && this.element.querySelector(`#${CSS.escape(held)}`)) document.getElementById(held).focus();
  }

  ofNothing() {
    return [
      h(
        "p",
        { class: "quiet" },
        "Select a node or an edge, in the graph, in the table or by its name, to see what it reads and writes.",
      ),
    ];
  }

  pinned() {
    const { scene } = this;
    const { pins } = this.store.state;
    if (!pins.length) return [];
    const group = h("button", { type: "button", onclick: () => this.regroup(null) }, "Group them");
    return [
      h("h4", {}, "Pinned"),
      h("ul", { class: "links" }, ...pins.map((i) => h("li", {}, this.nodeButton(i)))),
      ...(scene.groupable().length > 1 ? [group] : []),
    ];
  }

  groups() {
    const { groups } = this.store.state;
    if (!groups.length) return [];
    const rows = groups.map(({ name, nodes }) =>
      h("li", {}, this.nodeButton(nodes[0]), this.opener(nodes[0], `ungroup ${name}`)),
    );
    return [h("h4", {}, "Groups"), h("ul", { class: "links" }, ...rows)];
  }

  opener(node, label) {
    return h("button", { type: "button", "aria-label": label, onclick: () => this.regroup(node) }, "Ungroup");
  }

  regroup(node) {
    this.graph.regroup(node);
    this.graph.element.focus(); // the button goes
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
    return h(
      "button",
      { type: "button", class: "link", onclick: () => this.store.set({ node: i, edge: null }) },
      this.scene.label(i),
    );
  }

  edgeButton(e, text) {
    return h("button", { type: "button", class: "link", onclick: () => this.store.set({ edge: e, node: null }) }, text);
  }

  ofNode(i) {
    const { data, scene, store, graph } = this;
    const { name } = data.nodes[i];
    const { pins, paths, names, groups } = store.state;
    const group = scene.groupOf(i);
    const nodes = scene.members(i);
    const toggle = (id, text, on, onclick) => h("button", { type: "button", id, "aria-pressed": on, onclick }, text);
    const label = h("input", {
      id: "node-name",
      type: "text",
      maxlength: NAME,
      value: group?.name ?? names[name] ?? "",
      placeholder: "name it",
      autocomplete: "off",
    });
    label.addEventListener("change", () => {
      const given = label.value.trim();
      const { [name]: _, ...rest } = names;
      if (!group) store.set({ names: given ? { ...rest, [name]: given } : rest });
      else if (given) store.set({ groups: groups.map((x) => (x === group ? { ...x, name: given } : x)) });
    });
    const from = [];
    const into = [];
    const inputs = new Set(nodes.flatMap((n) => data.nodes[n].inputs));
    for (const e of scene.lines) {
      if (nodes.includes(data.u[e])) from.push(e);
      if (inputs.has(data.v[e])) into.push(e);
    }
    const weakest = (path) => Math.min(...path.map((e) => Math.abs(data.score[e])));
    const [path] = nodes
      .map((n) => widestPath(data, scene.flags, n))
      .filter(Boolean)
      .sort((a, b) => weakest(b) - weakest(a));
    return [
      this.head(scene.nodeText(i)),
      h(
        "div",
        { class: "bar" },
        toggle("node-pin", "Pin", pins.includes(i), () => scene.pin(i)),
        toggle("node-paths", "All paths from input to logits", paths, () => store.set({ paths: !paths })),
        toggle("node-centre", "Centre", false, () => graph.centre(i)),
        ...(group ? [this.opener(i, "ungroup")] : []),
        label,
      ),
      ...(group ? [h("p", {}, nodes.map((n) => names[data.nodes[n].name] ?? data.nodes[n].name).join(", "))] : []),
      h("h4", {}, "Strongest path through it"),
      path
        ? h("p", { class: "path" }, ...this.pathButtons(path))
        : h("p", { class: "quiet" }, "None among the edges shown."),
      ...this.list(`Reads (${whole(into.length)})`, into, (e) =>
        group ? scene.label(data.u[e]) : `${scene.label(data.u[e])} → ${scene.end(e).replace(name, "") || name}`,
      ),
      ...this.list(`Writes to (${whole(from.length)})`, from, (e) => scene.end(e)),
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

  list(title, edges, text, amount = (e) => this.scene.amount(e)) {
    const rows = edges
      .slice(0, LISTED)
      .map((e) => h("li", {}, this.edgeButton(e, text(e)), h("span", { class: "number" }, amount(e))));
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
    const bundle = scene.bundleOf(e);
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
      ...(bundle.length > 1
        ? this.list(
            `Drawn as one line (${whole(bundle.length)})`,
            bundle,
            (i) => edgeName(data, i),
            (i) => signed(data.score[i]),
          )
        : []),
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
        h("th", { scope: "row", title: labels[i] }, labels[i]),
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
