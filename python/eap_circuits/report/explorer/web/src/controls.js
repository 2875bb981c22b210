// Filters, the search for a node, zoom buttons, the legend, and what can be saved.

import { framed, h, plain, whole } from "./dom.js";
import { toCanvas, toSvg } from "./drawing.js";
import { initial } from "./state.js";

let ids = 0;
function labelled(text, control) {
  control.id ||= `control-${ids++}`;
  return h("label", { for: control.id }, `${text} `, control);
}

export function choice(options, set) {
  const element = h("select", {}, ...options.map(([value, text]) => h("option", { value }, text)));
  element.addEventListener("change", () => set(element.value));
  return element;
}

export class Controls {
  constructor(data, store, scene, graph) {
    Object.assign(this, { data, store, scene, graph });
    this.kinds = data.kinds.map(({ kind, title }) => {
      const box = h("input", { type: "checkbox" });
      box.addEventListener("change", () => {
        const kinds = new Set(store.state.kinds);
        if (box.checked) kinds.add(kind);
        else kinds.delete(kind);
        store.set({ kinds });
      });
      return { kind, box, label: h("label", { class: `check kind-${kind}` }, box, ` ${title}`) };
    });
    const layer = (end) => {
      const box = h("input", {
        type: "number",
        min: 0,
        max: data.nLayers - 1,
        "aria-label": end ? "last layer" : "first layer",
      });
      box.addEventListener("change", () => {
        const layers = [...store.state.layers];
        layers[end] = Math.max(0, Math.min(data.nLayers - 1, Math.round(Number(box.value)) || 0));
        if (layers[0] > layers[1]) layers[1 - end] = layers[end];
        store.set({ layers });
      });
      return box;
    };
    this.layers = [layer(0), layer(1)];
    this.sign = choice(
      [
        ["0", "both"],
        ["1", "raises the metric"],
        ["-1", "lowers it"],
      ],
      (x) => store.set({ sign: Number(x) }),
    );
    this.least = h("input", { type: "number", min: 0, step: "any" });
    this.least.addEventListener("change", () => store.set({ least: Math.max(0, Number(this.least.value) || 0) }));
    this.part =
      data.other &&
      choice(
        [
          ["all", "either"],
          ["first", `only ${data.other.first}`],
          ["both", "both"],
          ["second", `only ${data.other.second}`],
        ],
        (part) => store.set({ part }),
      );
    this.clear = h("button", { type: "button", onclick: () => this.reset() }, "Show all");
    this.search = h("input", {
      type: "search",
      list: "node-names",
      placeholder: "a5.h3",
      autocomplete: "off",
      spellcheck: "false",
    });
    this.names = h("datalist", { id: "node-names" }, ...data.nodes.map((node) => h("option", { value: node.name })));
    this.search.addEventListener("change", () => this.find());
    this.overlap = h("div", { class: "overlap" });
    this.filters = h(
      "details",
      { class: "filters" },
      h("summary", {}, "Filter"),
      h(
        "div",
        { class: "bar" },
        ...(this.part ? [labelled("Circuits", this.part)] : []),
        h("fieldset", {}, h("legend", {}, "Edges into"), ...this.kinds.map((k) => k.label)),
        h("fieldset", {}, h("legend", {}, "Layers"), this.layers[0], " to ", this.layers[1]),
        labelled("Sign", this.sign),
        labelled("Least |score|", this.least),
        this.clear,
      ),
    );
    this.filters.open = !framed && matchMedia("(min-width: 821px)").matches;
    const button = (text, label, onclick) =>
      h("button", { type: "button", "aria-label": label, title: label, onclick }, text);
    this.tools = h(
      "div",
      { class: "bar tools" },
      labelled("Find a node", this.search),
      this.names,
      button("+", "zoom in", () => graph.zoomBy(1.5)),
      button("−", "zoom out", () => graph.zoomBy(1 / 1.5)),
      button("Fit", "show the whole graph", () => graph.reset()),
      button("SVG", "save the graph as SVG", () => this.saveSvg()),
      button("PNG", "save the view as PNG", () => this.savePng()),
      ...(framed ? [] : [button("Link", "copy a link to this view", () => this.copy())]),
    );
    this.said = h("output", { class: "quiet" });
    this.tools.append(this.said);
    this.legend = this.makeLegend();
  }

  makeLegend() {
    const { other, kinds } = this.data;
    const lines = other
      ? [
          ["positive", `only ${other.first}`],
          ["both", "both"],
          ["negative", `only ${other.second}`],
        ]
      : [
          ["positive", "raises the metric"],
          ["negative", "lowers it"],
        ];
    const tips = { q: ["query", "into query"], k: ["key", "into key"], v: ["value", "into value"] };
    return h(
      "p",
      { class: "legend" },
      ...lines.map(([name, text]) => h("span", { class: `line ${name}` }, text)),
      ...kinds
        .filter((k) => tips[k.kind])
        .map((k) => h("span", { class: `tip-of ${tips[k.kind][0]}` }, tips[k.kind][1])),
    );
  }

  reset() {
    const { layers, kinds, sign, least, part } = initial(this.data);
    this.store.set({ layers, kinds, sign, least, part, node: null, edge: null, paths: false });
  }

  find() {
    const wanted = this.search.value.trim().toLowerCase();
    const { names, groups } = this.store.state;
    const group = groups.find(({ name }) => name.toLowerCase() === wanted);
    const node = group
      ? group.nodes[0]
      : this.data.nodes.findIndex((x) => x.name.toLowerCase() === wanted || names[x.name]?.toLowerCase() === wanted);
    if (!wanted) return;
    this.said.textContent = node < 0 ? `no node ${this.search.value}` : "";
    if (node < 0) return;
    this.store.set({ node, edge: null });
    this.graph.centre(node);
  }

  save(blob, ending) {
    const link = h("a", { href: URL.createObjectURL(blob), download: `circuit.${ending}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  saveSvg() {
    this.save(new Blob([toSvg(this.graph, this.data.title)], { type: "image/svg+xml" }), "svg");
  }

  savePng() {
    toCanvas(this.graph).toBlob((blob) => this.save(blob, "png"));
  }

  async copy() {
    this.store.save();
    try {
      await navigator.clipboard.writeText(location.href);
      this.said.textContent = "copied";
    } catch {
      this.said.textContent = "the address of this page is the link";
    }
  }

  update() {
    const { state } = this.store;
    for (const { kind, box } of this.kinds) box.checked = state.kinds.has(kind);
    this.layers.forEach((box, i) => {
      box.value = state.layers[i];
    });
    this.sign.value = state.sign;
    this.least.value = state.least;
    if (!this.part) return;
    this.part.value = state.part;
    const { first, second } = this.data.other;
    const { edges, nodes } = this.scene.overlap();
    const share = ([a, both, b]) => `${plain((100 * both) / Math.max(a + both + b, 1))} % shared`;
    const row = (title, found) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, title),
        ...found.map((n) => h("td", { class: "number" }, whole(n))),
        h("td", { class: "number" }, share(found)),
      );
    const head = ["", `only ${first}`, "both", `only ${second}`, "of either"].map((text, i) =>
      h("th", { scope: "col", class: i ? "number" : "" }, text),
    );
    this.overlap.replaceChildren(
      h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, row("edges", edges), row("nodes", nodes))),
    );
  }
}
