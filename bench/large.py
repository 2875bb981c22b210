"""What a large model's graph costs by itself, without passes: CPU seconds and the growth of resident memory.

python -m bench.large [NAME ...]     # measures all of it or what is named, each in a process of its own, and writes
                                     # docs/results/large.json, and from it docs/scale.md
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import eap_circuits as eap
from bench import measure
from bench.circuits.passes import random_pairs
from bench.processes import ROOT, commit

RESULT = ROOT / "docs" / "results" / "large.json"
SIZES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
# (layers, query heads): 10, 17 and 50 million edges; the second is Llama-3.1-70B's graph.
GRAPHS = {"10M": (62, 64), "17M": (80, 64), "50M": (113, 80)}


def graph_of(name: str) -> eap.Graph:
    layers, heads = GRAPHS[name]
    return eap.Graph((heads,) * layers, (8,) * layers, 8192)


def scores_of(name: str, alike: bool) -> eap.EdgeScores:
    """Random scores of all edges; of nodes that are alike, or of nodes that differ by orders of magnitude."""
    graph = graph_of(name)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(graph.n_senders, graph.n_receivers, generator=generator)
    if not alike:
        for nodes in (graph.n_senders, graph.n_receivers):
            scale = torch.randn(nodes, generator=generator).mul_(2).exp_()
            values *= scale[:, None] if nodes == graph.n_senders else scale
    values.masked_fill_(~graph.edge_mask, 0)
    return eap.EdgeScores(eap.Graph(graph.n_heads, graph.n_kv_heads, 8192), values)


def cost(run: Callable[[], object]) -> dict[str, float]:
    found = []

    def timed() -> None:
        start = time.process_time()
        run()
        found.append(time.process_time() - start)

    grown = measure.peak_bytes(timed)
    return {"seconds": found[0], "bytes": grown}


def select(name: str, alike: bool) -> dict[str, float]:
    scores = scores_of(name, alike)
    n = scores.graph.n_edges // 100
    first = cost(lambda: scores.select(n))
    flat = scores.values.flatten()
    topk, again = (cost(run)["seconds"] for run in (lambda: flat.topk(n), lambda: scores.select(n)))
    return {**first, "seconds": again, "topk": topk, "ratio": again / topk}


def curve(name: str) -> dict[str, float]:
    """The circuits of a curve's ten sizes, less those of one."""
    scores = scores_of(name, alike=True)
    fractions = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    return cost(lambda: scores.select_sizes([int(f * scores.graph.n_edges) for f in fractions]))


def random_circuit(name: str) -> dict[str, float]:
    graph = graph_of(name)
    sizes = {str(share): int(share * graph.n_edges) for share in (0.001, 0.01, 0.1, 1.0)}
    return {share: cost(partial(eap.random_circuit, graph, n)) for share, n in sizes.items()}


def file(name: str) -> dict[str, float]:
    scores = scores_of(name, alike=True)
    circuit = scores.select(scores.graph.n_edges // 1000, prune=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "circuit.safetensors")
        write = cost(lambda: circuit.save(path))
        read = cost(lambda: eap.Circuit.load(path))
        assert eap.Circuit.load(path) == circuit
        return {"size": path.stat().st_size, "edges": circuit.n_edges, "write": write, "load": read}


def json_file() -> dict[str, float]:
    graph = eap.Graph((32,) * 32, (8,) * 32, 4096)  # Llama-3.1-8B's, 1.6 million edges over query heads
    values = torch.randn(graph.n_senders, graph.n_receivers).masked_fill(~graph.edge_mask, 0)
    scores = eap.EdgeScores(graph, values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scores.json")
        write = cost(lambda: scores.save(path))
        read = cost(lambda: eap.EdgeScores.load(path))
        return {"size": path.stat().st_size, "write": write, "load": read}


class _FirstPass(Exception):
    """The first pass over edges is about to run."""


def exact() -> dict[str, float]:
    """From the call to the first pass over edges, of a model with Llama-3.1-70B's graph and a tiny width."""
    from eap_circuits.intervention import PatchedEdges

    def stop(self: object, edges: object) -> None:
        raise _FirstPass

    sizes = {**SIZES["70b"], "hidden_size": 128, "intermediate_size": 64, "head_dim": 2, "vocab_size": 128}
    model = llama(**sizes)
    data = random_pairs(model, 4, 12)
    PatchedEdges.logits = stop

    def run() -> None:
        try:
            eap.attribute(model, data, method="exact", memory="8GiB")
        except _FirstPass:
            return

    eap.attribute(model, data, method="eap")  # what any first call does once
    return cost(run)


def plan(name: str, memory: str) -> dict[str, float]:
    with torch.device("meta"):
        model = llama(vocab_size=128256, **SIZES[name]).to(torch.bfloat16)
    data = random_pairs(model, 64, 64)
    found = []
    taken = cost(lambda: found.append(eap.plan(model, data, memory=memory, device="cuda", gpus=8)))
    passes = max(examples * tokens * points for examples, tokens, points in found[0].batches)
    return {**taken, "pass": passes, "planned": found[0].bytes}


def llama(**sizes: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    given = {"num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False, **sizes}
    return LlamaForCausalLM(LlamaConfig(**given)).eval()


CASES: dict[str, tuple[Callable[..., dict[str, float]], tuple[object, ...]]] = {
    "select 10M": (select, ("10M", True)),
    "select 10M unlike": (select, ("10M", False)),
    "select 50M": (select, ("50M", True)),
    "curve 10M": (curve, ("10M",)),
    "random 17M": (random_circuit, ("17M",)),
    "file 10M": (file, ("10M",)),
    "json 1.6M": (json_file, ()),
    "exact 17M": (exact, ()),
    "plan 70b": (plan, ("70b", "40GiB")),
    "plan 405b": (plan, ("405b", "40GiB")),
}


def main(names: list[str]) -> None:
    runs = json.loads(RESULT.read_text())
    found = runs["now"]["cases"]
    for name in names or CASES:
        job, arguments = CASES[name]
        found[name] = measure.in_fresh_process(job, *arguments, OMP_NUM_THREADS="1")
        print(name, json.dumps(found[name]), flush=True)
    runs["now"] = {"machine": measure.machine(), "versions": measure.versions(), "commit": commit(), "cases": found}
    RESULT.write_text(json.dumps(runs, indent=1) + "\n")
    from docs import documents

    documents.write(ROOT, ("docs/scale.md",))


if __name__ == "__main__":
    main(sys.argv[1:])
