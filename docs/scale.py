"""Predict what attribution takes of large models on 1, 8 and 64 H100.

python -m docs.scale     # docs/results/scale.json, and from it the page's table

Nothing runs: plans are made on shapes, and times are operations and bytes over the rates that stand here and in
`eap_circuits.methods.gradient.plans`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.tables import Results

RESULT, MEASURED = (Path(__file__).with_name("results") / name for name in ("scale.json", "large.json"))
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
# (type, fields of the configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": ("llama", {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                               "num_attention_heads": 32}),
    "Llama-3.1-70B": ("llama", {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                                "num_attention_heads": 64}),
    "Qwen3-235B-A22B": ("qwen3_moe", {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
                                      "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_experts": 128,
                                      "num_experts_per_tok": 8, "num_attention_heads": 64, "num_key_value_heads": 4,
                                      "head_dim": 128, "norm_topk_prob": True, "tie_word_embeddings": False}),
    "Llama-3.1-405B": ("llama", {**LLAMA, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
                                 "num_attention_heads": 128}),
}  # fmt: skip
GPUS = (1, 8, 64)
PAIRS, TOKENS, STEPS = 512, 64, 5
GPU_BYTES, SPARE = 80e9, 0.05  # of an H100, and what an allocator and CUDA itself take of it
MOST_WEIGHTS = 0.8  # of the rest
# Bytes a second and GPU, in one direction: NVLink inside a machine of 8, InfiniBand between machines, and gloo, over
# which ranks exchange sums, on the CPU. The first two are the vendor's; the third is a guess.
NVLINK, INFINIBAND, GLOO, MACHINE = 450e9, 50e9, 1e9, 8
LIMITS = {"passes": "the model's passes", "contraction": "the contraction", "ranks": "exchange of sums",
          "parts": "traffic between parts"}  # fmt: skip


def model_of(kind: str, fields: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, max_position_embeddings=8192, **fields)
    experts = {"experts_implementation": "grouped_mm"} if kind == "qwen3_moe" else {}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **experts).eval()


def predict(model: Any, gpus: int) -> dict[str, Any]:
    """The plan on so many GPUs, of which as few as hold the weights share a copy by tensor parallelism; where key/value
    heads are fewer, as many as these, and `fully_shard` divides each part among the rest."""
    import torch

    import eap_circuits as eap
    from bench.large import pairs
    from eap_circuits.recording.contraction import COPIED_BYTES, NARROWEST, ON_A_GPU

    config = model.config
    width, layers = config.hidden_size, config.num_hidden_layers
    heads, kv, each = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    room = GPU_BYTES * (1 - SPARE)
    weights = sum(x.numel() * x.itemsize for x in model.parameters())
    parts = 1
    while weights / parts > MOST_WEIGHTS * room:
        parts *= 2
    if parts > gpus:
        return {"weights": weights, "parts": parts}
    team = math.gcd(parts, kv, MACHINE)  # which runs a pass
    copies, sharded = gpus // team, team < parts
    parts = gpus if sharded else parts
    # Weights of the layer that runs and of the next are put together.
    beside = weights / parts + sharded * 2 * weights / layers / team
    data = pairs(config.vocab_size, PAIRS, TOKENS)
    asked: dict[str, Any] = {"device": "cuda", "gpus": team, "memory": int(room - beside), "steps": STEPS}
    plan = eap.plan(model, data, **asked)
    if len(plan.batches) < copies:  # so that there is one for each copy
        plan = eap.plan(model, data, batch_size=PAIRS // copies, **asked)
    graph = eap.Graph((heads,) * layers, (kv,) * layers, width)
    turns, batches = math.ceil(len(plan.batches) / copies), len(plan.batches)
    assert plan.rates is not None
    # For each token and layer, as docs/distributed.md has it: a forward sums up two numbers of the stream's width over
    # the parts, a backward five; heads are put together on both ways of a path point, and in the corrupted run what
    # they write.
    sums_of = 2 * (2 * 2 + STEPS * 7) * width
    gathered = STEPS * 2 * (2 * heads + 2 * kv) * each + heads * each
    bytes_ = (sums_of + gathered) * torch.bfloat16.itemsize * layers * TOKENS * PAIRS / batches
    out = heads * each * width * torch.bfloat16.itemsize
    attention = 2 * out * layers * (heads + kv) / heads / team  # a part's weights of heads, by features for contraction
    seconds = (team - 1) / team * (bytes_ + attention) / NVLINK
    if sharded:  # all weights of a part, for the corrupted run, and for the forward and the backward of other passes
        times = 1 + 2 * math.ceil(STEPS / min(points for *_, points in plan.batches))
        at_once = ON_A_GPU * COPIED_BYTES // (attention * team / width) // NARROWEST * NARROWEST  # features
        slices = math.ceil(width / team / max(NARROWEST, at_once))
        put_together = (copies - 1) / copies * (times * weights / team + slices * attention)
        seconds += put_together / (NVLINK if gpus <= MACHINE else INFINIBAND)
    sums = 8 * graph.n_senders * graph.n_receivers
    return {
        "weights": weights,
        "parts": parts,
        "team": team,
        "copies": copies,
        "projection": out,
        "projections32": 2 * out * layers,
        "tokens": max(examples * suffix * points for examples, suffix, points in plan.batches),
        "bytes": plan.bytes,
        "fits": plan.bytes <= plan.budget,
        "batches": batches,
        "edges": graph.n_edges,
        "seconds": {
            "passes": turns * plan.passes / batches / team / plan.rates.passes,
            "contraction": turns * plan.contraction / batches / team / plan.rates.contraction,
            "parts": turns * seconds,
            "ranks": turns * (copies - 1) * sums / GLOO if copies > 1 else 0.0,
        },
        "rates": list(plan.rates),
    }


def run() -> None:
    from bench import measure
    from bench.processes import commit

    found: dict[str, Any] = {"versions": measure.versions(), "commit": commit(), "models": {}}
    for name, (kind, fields) in MODELS.items():
        model = model_of(kind, fields)
        found["models"][name] = {str(gpus): predict(model, gpus) for gpus in GPUS}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def predictions(_: Results) -> str:
    from eap_circuits.report.tables import duration

    found = json.loads(RESULT.read_text())
    rows = [
        "| model | H100 | a copy on | divided by | weights on each | tokens a pass | besides | passes | contraction "
        "| between parts | between copies | limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sizes in found["models"].items():
        for gpus, plan in sizes.items():
            each = f"{plan['weights'] / plan['parts'] / 1e9:.0f} GB"
            if "seconds" not in plan:
                rows.append(
                    f"| {name} | {gpus} | {plan['parts']} | | {each} | | | | | | | memory: weights do not fit |"
                )
                continue
            times, memory = plan["seconds"], f"{plan['bytes'] / 1e9:.0f} GB"
            shown = [
                duration(times[part]) if times[part] else "" for part in ("passes", "contraction", "parts", "ranks")
            ]
            limit = LIMITS[max(times, key=times.__getitem__)] if plan["fits"] else "memory: activations do not fit"
            team, again = plan["team"], plan["parts"] // plan["team"]
            way = f"tp {team}{f' × fsdp {again}' if again > 1 else ''}" if plan["parts"] > 1 else ""
            cells = [name, gpus, str(plan["parts"]), way, each, f"{plan['tokens']:,}", memory, *shown, limit]
            rows.append(f"| {' | '.join(cells)} |")
    versions = found["versions"]
    made = f"torch {versions['torch']}, transformers {versions['transformers']}; commit {found['commit'][:7]}."
    return "\n".join([*rows, "", made, ""])


def projections(_: Results) -> str:
    """What output projections take on each GPU of a tensor parallel model."""
    rows = [
        "| model | a pass on | one layer's, whole | in turn, at most | all layers' in float32 |",
        "|---|---|---|---|---|",
    ]
    for name, sizes in json.loads(RESULT.read_text())["models"].items():
        # The numbers are those of a team, whatever the number of copies.
        plans = [plan for plan in sizes.values() if plan.get("team", 1) > 1]
        for plan in plans[:1]:
            one = plan["projection"]
            shown = (one, 2 * one / plan["team"], plan["projections32"])
            rows.append(f"| {name} | {plan['team']} | {' | '.join(f'{x / 1e9:.2g} GB' for x in shown)} |")
    return "\n".join([*rows, ""])


_CASES = {
    "select 10M": ("`select` 1 % of 10 million edges, pruned; over `torch.topk`", "ratio"),
    "select 10M unlike": ("the same, of nodes that differ by orders of magnitude", "ratio"),
    "select 50M": ("the same of 50 million edges", "ratio"),
    "curve 10M": ("the ten circuits of a curve, 10 million edges", None),
    "random 17M": ("a random circuit of 1 % of 16.65 million edges", "0.01"),
    "exact 17M": ("exact patching: from the call to the first pass, 16.65 million edges", None),
    "file 10M": ("a circuit's file, selected from 0.1 % of 10 million edges", "size"),
    "json 1.6M write": ("EAP-IG's .json of 1.6 million edges, written", "write"),
    "json 1.6M load": ("the same, loaded", "load"),
    "plan 70b": ("`plan` of Llama-3.1-70B, 40 GiB", "pass"),
    "plan 405b": ("`plan` of Llama-3.1-405B, 40 GiB", "pass"),
}


def measured(_: Results) -> str:
    from bench import tables

    runs = json.loads(MEASURED.read_text())
    before, now = runs["before"], runs["now"]
    rows = ["| what | CPU time | memory | |", "|---|---|---|---|"]
    for name, (text, key) in _CASES.items():
        old, new = (_case(run["cases"], name, key) for run in (before, now))
        cells = (f"{a} → {b}" if a and b else b for a, b in zip(old, new, strict=True))
        rows.append(f"| {text} | {' | '.join(cells)} |")
    versions = now["versions"]
    commits = f"commits {before['commit'][:7]} → {now['commit'][:7]}"
    made = f"{tables.machine(now)}, one thread; torch {versions['torch']}; {commits}."
    return "\n".join([*rows, "", made, ""])


def _case(cases: dict[str, Any], name: str, key: str | None) -> tuple[str, str, str]:
    """Seconds, memory, and what else is told of a case."""
    case = cases.get(name) or cases.get(name.rsplit(" ", 1)[0]) or {}
    cost = case.get(key, case) if key in ("write", "load", "0.01", "size") else case
    other = ""
    if key == "ratio" and case:
        other = f"{case['ratio']:.1f} × topk"
    elif key == "size" and case:
        cost, other = case["write"], f"{case['size'] / 1e6:.3g} MB"
    elif key == "pass" and key in case:
        other = f"{case['pass']:,} tokens a pass"
    return (f"{cost['seconds']:.2g} s", f"{cost['bytes'] / 1e9:.2g} GB", other) if cost else ("", "", "")


if __name__ == "__main__":
    run()
    from docs import documents

    documents.write(documents.models.DOCS.parent, ("docs/scale.md",))
