// Faithfulness by circuit size, and the slider that follows it.

import uPlot from "uplot";
import { colour, h, onScheme, plain, whole } from "./dom.js";

const STEPS = 1000;
const SAID = 100; // milliseconds between two texts
const SNAP = 7; // steps within which the slider holds to a circuit that was measured

/** Powers of ten within a range. */
function powers(low, high) {
  const found = [];
  for (let x = 10 ** Math.ceil(Math.log10(low) - 1e-9); x <= high; x *= 10) found.push(x);
  return found;
}

export class Sizes {
  constructor(data, store, scene) {
    Object.assign(this, { data, store, scene });
    this.measured = data.circuits.map((c, i) => ({ ...c, i })).filter((c) => c.n_edges > 0);
    this.slider = h("input", {
      type: "range",
      min: 0,
      max: STEPS,
      step: 1,
      id: "size",
      "aria-describedby": "size-said",
    });
    this.said = h("output", { id: "size-said", for: "size" });
    this.slider.addEventListener("input", () => this.slide());
    this.chart = h("div", { class: "chart" });
    this.line = h("div", { class: "at" });
    this.spoken = 0;
    const bySize = [...data.circuits.keys()].sort((a, b) => data.circuits[a].n_edges - data.circuits[b].n_edges);
    this.buttons = bySize.map((i) => {
      const circuit = data.circuits[i];
      const button = h(
        "button",
        { type: "button", onclick: () => store.set({ circuit: i, size: null }) },
        `${whole(circuit.n_edges)}${i ? "" : " (chosen)"}`,
      );
      button.title =
        circuit.faithfulness === null ? circuit.label : `${circuit.label}, faithfulness ${plain(circuit.faithfulness)}`;
      return { i, button };
    });
    this.element = h(
      "section",
      { class: "sizes", "aria-label": "size of the circuit" },
      h("label", { for: "size" }, "Edges taken"),
      this.slider,
      h(
        "div",
        { class: "stops", role: "group", "aria-label": "circuits of the report, by edges" },
        ...this.buttons.map((b) => b.button),
      ),
      this.said,
      this.chart,
    );
    if (data.curve) {
      onScheme(() => this.plot());
      new ResizeObserver(() => this.chart.clientWidth !== this.width && this.plot()).observe(this.chart);
    }
  }

  position(n) {
    return Math.round((STEPS * Math.log(Math.max(n, 1))) / Math.log(Math.max(this.data.n, 2)));
  }

  slide() {
    const at = Number(this.slider.value);
    const stop = this.measured.find((c) => Math.abs(this.position(c.taken ?? c.n_edges) - at) <= SNAP);
    if (stop) this.store.set({ circuit: stop.i, size: null });
    else this.store.set({ circuit: null, size: Math.max(1, Math.round(this.data.n ** (at / STEPS))) });
  }

  update() {
    const { circuit, size } = this.store.state;
    const shown = circuit === null ? null : this.data.circuits[circuit];
    if (document.activeElement !== this.slider)
      this.slider.value = this.position(shown ? (shown.taken ?? shown.n_edges) : size);
    this.mark();
    // Text is laid out anew when it changes.
    const wait = this.spoken + SAID - performance.now();
    if (wait > 0) this.waiting ??= setTimeout(() => this.say(), wait);
    else this.say();
  }

  /** Say what is shown. */
  say() {
    const said = this.scene.summary();
    clearTimeout(this.waiting);
    this.waiting = null;
    this.spoken = performance.now();
    this.slider.setAttribute("aria-valuetext", said);
    this.said.textContent = said;
    for (const { i, button } of this.buttons) button.setAttribute("aria-pressed", i === this.store.state.circuit);
  }

  /** Move the line in the chart to the size shown. */
  mark() {
    if (!this.drawn) return;
    const x = this.drawn.valToPos(this.scene.kept, "x");
    this.line.hidden = !(x >= 0 && x <= this.drawn.over.clientWidth);
    this.line.style.transform = `translateX(${x}px)`;
  }

  plot() {
    const { curve } = this.data;
    const { clientWidth: width } = this.chart;
    if (!width) return;
    this.width = width;
    this.drawn?.destroy();
    const order = curve.n_edges.map((_, i) => i).sort((a, b) => curve.n_edges[a] - curve.n_edges[b]);
    const sorted = (values) => order.map((i) => values[i]);
    const xs = sorted(curve.n_edges.map((n) => Math.max(n, 0.5)));
    const series = [
      { label: "edges" },
      {
        label: "circuit",
        stroke: colour("positive"),
        width: 2,
        points: { show: true, size: 7, fill: colour("paper") },
      },
    ];
    const values = [xs, sorted(curve.faithfulness)];
    const bands = [];
    for (const baseline of curve.baselines) {
      const line = baseline.drawn ? colour("muted") : colour("negative");
      series.push({
        label: baseline.title,
        stroke: line,
        width: 1.5,
        dash: baseline.drawn ? [2, 3] : [7, 4],
        points: { show: false },
      });
      values.push(sorted(baseline.faithfulness));
      if (baseline.high) {
        const quiet = { stroke: "transparent", points: { show: false }, width: 0 };
        series.push({ ...quiet, label: "" }, { ...quiet, label: "" });
        values.push(sorted(baseline.high), sorted(baseline.low));
        bands.push({ series: [series.length - 2, series.length - 1], fill: `${line}33` });
      }
    }
    const axis = {
      stroke: colour("ink"),
      grid: { stroke: colour("faint"), width: 1 },
      ticks: { stroke: colour("faint") },
      font: "11px system-ui, sans-serif",
    };
    const lines = (u) => this.guides(u);
    this.drawn = new uPlot(
      {
        width,
        height: 240,
        legend: { show: false },
        cursor: { drag: { x: false, y: false }, y: false, points: { size: 9 } },
        scales: {
          x: { time: false, distr: 3, log: 10 },
          y: { range: (_, low, high) => [Math.min(low, 0) - 0.06, Math.max(high, 1) + 0.06] },
        },
        axes: [
          {
            ...axis,
            label: "edges kept",
            labelSize: 22,
            size: 34,
            splits: (_u, _axis, low, high) => powers(low, high),
            values: (_u, ticks) => ticks.map(whole),
          },
          { ...axis, label: "faithfulness", labelSize: 20, size: 40 },
        ],
        series,
        bands,
        hooks: { setCursor: [(u) => this.hover(u, order)], drawClear: [lines], draw: [() => this.mark()] },
      },
      values,
      this.chart,
    );
    this.drawn.over.append(this.line);
    this.chart.append(this.legend(series));
    this.drawn.over.addEventListener("click", () => this.take());
    this.drawn.over.addEventListener("pointerleave", () => this.previewing(null));
  }

  legend(series) {
    this.chart.querySelector(".legend")?.remove();
    const named = series.slice(1).filter((s) => s.label);
    return h(
      "p",
      { class: "legend" },
      ...named.map((s, i) => h("span", { class: i ? (s.dash[0] === 2 ? "dotted" : "dashed") : "line" }, s.label)),
    );
  }

  guides(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.strokeStyle = colour("muted");
    ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
    const line = (...ends) => {
      ctx.beginPath();
      ctx.moveTo(ends[0], ends[1]);
      ctx.lineTo(ends[2], ends[3]);
      ctx.stroke();
    };
    for (const level of [0, 1]) {
      const y = u.valToPos(level, "y", true);
      line(bbox.left, y, bbox.left + bbox.width, y);
    }
    ctx.restore();
  }

  /** The measured circuit under the pointer appears, and goes when the pointer leaves. */
  hover(u, order) {
    const { idx, left } = u.cursor;
    this.previewing(left < 0 || idx === null || idx === undefined ? null : this.data.curve.circuits[order[idx]]);
  }

  previewing(circuit) {
    const found = circuit === -1 ? null : circuit;
    if (found === this.scene.preview) return;
    this.scene.preview = found;
    this.store.set({ preview: found });
  }

  take() {
    if (this.scene.preview !== null) this.store.set({ circuit: this.scene.preview, size: null });
  }
}
