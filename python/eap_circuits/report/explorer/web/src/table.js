// All edges of the file as a table, of which only the rows in view exist.

import { edgeName } from "./data.js";
import { h, ofBrowser, signed, whole } from "./dom.js";

const ROW = 28; // pixels
const SPARE = 8; // rows above and below those in view

export class Table {
  constructor(data, store, scene) {
    Object.assign(this, { data, store, scene, sort: { key: "rank", down: false }, words: [] });
    this.rank = new Uint32Array(data.n);
    scene.order.forEach((e, i) => {
      this.rank[e] = i + 1;
    });
    this.columns = [
      { key: "rank", title: "rank", value: (e) => this.rank[e], show: (e) => whole(this.rank[e]) },
      { key: "sender", title: "sender", value: (e) => data.u[e], show: (e) => data.nodes[data.u[e]].name, text: true },
      {
        key: "receiver",
        title: "receiver",
        value: (e) => data.v[e],
        show: (e) => data.receivers[data.v[e]].name,
        text: true,
      },
      { key: "score", title: "score", value: (e) => data.score[e], show: (e) => signed(data.score[e]), first: true },
      {
        key: "size",
        title: "|score|",
        value: (e) => Math.abs(data.score[e]),
        show: (e) => signed(Math.abs(data.score[e])).slice(1) || "0",
        first: true,
      },
    ];
    if (data.error)
      this.columns.push({
        key: "error",
        title: "standard error",
        value: (e) => data.error[e],
        show: (e) => signed(data.error[e]).slice(1) || "0",
        first: true,
      });
    if (data.other?.score)
      this.columns.push({
        key: "other",
        title: data.other.second,
        value: (e) => data.other.score[e],
        show: (e) => signed(data.other.score[e]),
        first: true,
      });
    this.columns.push({
      key: "in",
      title: data.other ? "circuits" : "in circuit",
      value: (e) => this.where(e),
      show: (e) => this.said(e),
      first: true,
      text: true,
    });
    this.search = h("input", {
      type: "search",
      id: "table-search",
      placeholder: "a5.h3, <q>, m2 → logits",
      autocomplete: "off",
      spellcheck: "false",
    });
    this.search.addEventListener("input", () => this.refresh());
    this.only = h("input", { type: "checkbox", id: "table-shown" });
    this.only.addEventListener("change", () => this.refresh());
    this.count = h("output", { for: "table-search table-shown" });
    this.heads = this.columns.map((c) =>
      h(
        "th",
        { scope: "col", class: c.text ? "" : "number" },
        h("button", { type: "button", onclick: () => this.sortBy(c) }, c.title),
      ),
    );
    this.body = h("tbody");
    this.table = h(
      "table",
      { "aria-label": "edges", "aria-colcount": this.columns.length },
      h("thead", {}, h("tr", {}, ...this.heads)),
      this.body,
    );
    this.window = h("div", { class: "rows", tabindex: 0, role: "region", "aria-label": "table of edges" }, this.table);
    this.window.addEventListener("scroll", () => this.render(), { passive: true });
    this.body.addEventListener("click", (event) => this.choose(event.target));
    this.window.addEventListener("keydown", (event) => this.key(event));
    this.element = h(
      "section",
      { class: "edge-table" },
      h(
        "div",
        { class: "bar" },
        h("label", { for: "table-search" }, "Search ", this.search),
        h("label", { class: "check" }, this.only, " only those in the graph"),
        this.count,
      ),
      this.window,
    );
  }

  where(e) {
    return this.scene.first[e] + (this.data.other ? 2 * this.scene.second[e] : 0);
  }

  said(e) {
    const { other } = this.data;
    const place = this.where(e);
    if (!other) return place ? "yes" : "no";
    return ["neither", `only ${other.first}`, `only ${other.second}`, "both"][place];
  }

  sortBy({ key, first }) {
    this.sort = this.sort.key === key ? { key, down: !this.sort.down } : { key, down: Boolean(first) };
    this.refresh();
  }

  /** Find and sort the rows anew. */
  refresh() {
    const { data, scene } = this;
    this.words = this.search.value.toLowerCase().replaceAll("->", "→").split(/\s+/).filter(Boolean);
    const { words } = this;
    const matches = (e) => {
      const name = `${edgeName(data, e)} `.toLowerCase();
      return words.every((word) => name.includes(word));
    };
    let rows = this.only.checked ? scene.shown : scene.order;
    if (words.length) rows = rows.filter(matches);
    const { value } = this.columns.find((c) => c.key === this.sort.key);
    if (this.sort.key !== "rank" || this.only.checked) {
      const keys = new Float64Array(data.n);
      for (const e of rows) keys[e] = value(e);
      rows = rows.slice().sort((a, b) => keys[a] - keys[b] || this.rank[a] - this.rank[b]);
    }
    this.rows = this.sort.down ? rows.slice().reverse() : rows;
    this.heads.forEach((head, i) => {
      const own = this.columns[i].key === this.sort.key;
      head.setAttribute("aria-sort", own ? (this.sort.down ? "descending" : "ascending") : "none");
    });
    const missing = data.total - data.n;
    this.count.textContent = `${whole(this.rows.length)} of ${whole(data.n)} edges${missing ? `; the ${whole(missing)} weakest of the model are not in this file` : ""}`;
    this.table.setAttribute("aria-rowcount", this.rows.length + 1);
    this.window.scrollTop = 0;
    this.render();
  }

  render() {
    if (!this.rows) return;
    const { scrollTop, clientHeight } = this.window;
    const first = Math.max(0, Math.floor(scrollTop / ROW) - SPARE);
    const last = Math.min(this.rows.length, Math.ceil((scrollTop + (clientHeight || 400)) / ROW) + SPARE);
    const filler = (n) => h("tr", { class: "filler", style: `height:${n * ROW}px`, "aria-hidden": true });
    const rows = [];
    for (let i = first; i < last; i++) {
      const e = this.rows[i];
      const chosen = e === this.store.state.edge;
      const cells = this.columns.map((c) => h("td", { class: c.text ? "" : "number" }, c.show(e)));
      rows.push(
        h(
          "tr",
          { "data-edge": e, "aria-rowindex": i + 2, class: chosen ? "chosen" : "", "aria-selected": chosen },
          ...cells,
        ),
      );
    }
    this.body.replaceChildren(filler(first), ...rows, filler(this.rows.length - last));
  }

  choose(target) {
    const row = target.closest("tr[data-edge]");
    if (row) this.store.set({ edge: Number(row.dataset.edge), node: null });
  }

  key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || event.target !== this.window || ofBrowser(event)) return;
    event.preventDefault();
    const at = this.rows.indexOf(this.store.state.edge ?? -1);
    const next = Math.max(0, Math.min(this.rows.length - 1, at + step));
    if (this.rows.length) this.store.set({ edge: this.rows[next], node: null });
    const top = next * ROW;
    const room = this.window.clientHeight - 3 * ROW;
    this.window.scrollTop = Math.max(top - room, Math.min(top, this.window.scrollTop));
  }

  update(changed) {
    const rows = ["circuit", "size", "preview", "layers", "kinds", "sign", "least", "part"];
    const sorted = this.only.checked || this.sort.key === "in";
    if (!this.rows || (sorted && rows.some((key) => changed?.has(key)))) this.refresh();
    else this.render();
  }
}
