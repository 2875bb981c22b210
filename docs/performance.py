"""Measure how the cost of attribution grows and where its time goes; draw docs/img/performance.png from that.

python -m docs.performance [--draw-only]     # docs/results/performance.json, the picture, the page's table
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import eap_circuits as eap
from bench import measure
from bench.circuits import passes
from bench.processes import ROOT, commit
from docs import documents
from eap_kernels.testing import timing

RESULT = ROOT / "docs" / "results" / "performance.json"
STEPS, EXAMPLES, LAYERS, EDGES = (1, 5, 15, 30), (8, 16, 32), (10, 20, 30), (100, 200, 400)
# The profiled operators that each row of the table counts.
KINDS = {
    "products of weights and activations": ("aten::mm", "aten::addmm", "aten::bmm"),
    "contraction of edges (`head_space_scores`)": ("eap_kernels::head_space_scores",),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}


def both(model: Any, data: Any, steps: int) -> dict[str, float]:
    """The seconds of attribution and of its floor."""
    return {
        "attribute": timing.seconds(lambda: eap.attribute(model, data, steps=steps), 1, "cpu"),
        "floor": timing.seconds(lambda: passes.floor(model, data, steps), 1, "cpu"),
    }


def shares(model: Any, data: Any) -> dict[str, float]:
    """The share of each kind of operator in the processor time of attribution with 5 steps."""
    from torch.profiler import ProfilerActivity, profile

    eap.attribute(model, data)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        eap.attribute(model, data)
    events = {event.key: event for event in found.key_averages()}
    whole = sum(event.self_cpu_time_total for event in events.values())
    times = {
        kind: sum(event.self_cpu_time_total for key, event in events.items() if key.startswith(names))
        for kind, names in KINDS.items()
    }
    return {kind: value / whole for kind, value in times.items()} | {"all else": 1 - sum(times.values()) / whole}


def run() -> None:
    model, data = passes.model_and_data()
    graph = eap.attribute(model, data, method="eap").graph
    edges = graph.edge_mask.nonzero()
    order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))
    exact = {}
    for count in EDGES:
        mask = torch.zeros_like(graph.edge_mask)
        mask[tuple(edges[order[:count]].T)] = True
        exact[count] = timing.seconds(
            lambda mask=mask: eap.attribute(model, data, method="exact", edges=mask), 1, "cpu"
        )
    more = data[[i % len(data) for i in range(max(EXAMPLES))]]
    found = {
        "steps": {steps: both(model, data, steps) for steps in STEPS},
        "examples": {count: both(model, more[:count], 5) for count in EXAMPLES},
        "layers": {},
        "edges": exact,
        "shares": shares(model, data),
    }
    stack = model.model.layers
    for layers in LAYERS:
        # Only the time matters here, not what a model without its last layers predicts.
        model.model.layers, model.config.num_hidden_layers = stack[:layers], layers
        found["layers"][layers] = both(model, data, 5)
    found |= {"machine": measure.machine(), "versions": measure.versions(), "commit": commit()}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def draw(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    titles = {
        "steps": "path points M",
        "examples": "prompt pairs",
        "layers": "layers",
        "edges": "edges patched exactly",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        x = [int(value) for value in found[name]]
        for kind, color in (("floor", "0.6"), ("attribute", "C0")):
            if name != "edges":
                y = [values[kind] for values in found[name].values()]
            elif kind == "attribute":
                y = list(found[name].values())
            else:
                continue
            axis.plot(x, y, "o-", color=color, label="the model's own passes" if kind == "floor" else "attribute")
        axis.set(xlabel=title, xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.savefig(ROOT / "docs" / "img" / "performance.png", dpi=100, facecolor="white")


if __name__ == "__main__":
    if "--draw-only" not in sys.argv:
        run()
    draw(json.loads(RESULT.read_text()))
    documents.write(ROOT)
