"""Count what calls ask of a GPU, on one that does not exist (bench/pretended), beside the model's own passes.

python -m docs.counts [WORD ...]     # docs/results/counts.json and the tables of docs/performance.md

Of the model's own passes, `attribute` has one forward over the corrupted prompts, and one forward and backward over all
path points; `evaluate` one forward over the corrupted prompts, and one over all circuits and the clean prompts.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import eap_circuits as eap
import eap_kernels as ek
from bench import tables
from bench.pretended import Counts, counting, pretending
from bench.processes import ROOT, commit
from eap_circuits.adapters import bind
from eap_circuits.budget import replays
from eap_circuits.checkpoint import weights
from eap_circuits.errors import InputWarning

RESULT = ROOT / "docs" / "results" / "counts.json"
EXAMPLES, TOKENS, POINTS, CIRCUITS, VOCABULARY = 16, 20, 5, 10, 512
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA, WHOLE, GPT2 = "Llama-3.1-8B, 4 layers", "Llama-3.1-8B", "GPT-2 small"
LAYERS = {LLAMA: 4, WHOLE: 32, GPT2: 12}
LONG = 128  # tokens of a prompt, 2,048 of a batch
METHODS = ("eap", "eap-ig-inputs", "eap-ig-activations", "eap-gp")
ENOUGH = "2TB"  # no pass runs only to measure what a pass takes


def model_of(name: str) -> Any:
    """Without values."""
    layers = LAYERS[name]
    with torch.device("meta"):
        if name == GPT2:
            made: Any = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_positions=LONG, **SMALL))
        else:
            made = LlamaForCausalLM(
                LlamaConfig(num_hidden_layers=layers, max_position_embeddings=LONG, **WIDE, **SMALL)
            )
            made = made.to(torch.bfloat16)
    return made.eval().requires_grad_(False).to("cuda")


def pairs(n: int = EXAMPLES, tokens: int = TOKENS) -> eap.PairedDataset:
    """All of whose tokens differ."""
    clean = torch.randint(3, VOCABULARY, (n, tokens), generator=torch.Generator().manual_seed(0))
    corrupted = (clean + 7) % VOCABULARY
    answers = torch.tensor([[5, 6]] * n)
    return eap.PairedDataset.from_tokens(clean, corrupted, torch.full((n,), tokens), answers)


def circuits_of(model: Any) -> list[eap.Circuit]:
    """The best edges of made-up scores, from one in a hundred to nine in ten."""
    graph = bind(model).graph("kv")
    values = torch.randn(graph.edge_mask.shape, generator=torch.Generator().manual_seed(1)) * graph.edge_mask
    scores = eap.EdgeScores(graph, values, {})
    shares = torch.logspace(-2, math.log10(0.9), CIRCUITS).tolist()
    return [scores.select(int(graph.n_edges * share)) for share in shares]


def counted(call: Callable[[], object]) -> Counts:
    ek.backends()  # a backend is tried once a process, which is a wait
    with counting() as found:
        call()
    return found


def attribute(model: Any, data: eap.PairedDataset, **settings: Any) -> None:
    eap.attribute(model, data, **{"steps": POINTS, "memory": ENOUGH, **settings})


def evaluate(model: Any, data: eap.PairedDataset, **settings: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # without values there is no faithfulness
        eap.evaluate(model, circuits_of(model), data, **{"memory": ENOUGH, **settings})


def own_passes(model: Any, rows: int, tokens: int, backward: bool) -> Counts:
    """A pass over a batch's corrupted prompts, and one over this many rows, perhaps with a backward pass."""

    def run() -> None:
        for prompts, gradient in ((EXAMPLES, False), (rows, backward)):
            ids = torch.zeros(prompts, tokens, dtype=torch.int64, device="cuda")
            embeddings = model.get_input_embeddings()(ids).requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1).logits
            if gradient:
                logits.backward(torch.empty_like(logits))

    return counted(run)


def beside(name: str, call: Callable[..., object], tokens: int = TOKENS, **settings: Any) -> dict[str, float]:
    """Of a call on one batch, beside the model's own passes."""
    backward = call is attribute
    runs = POINTS if backward else CIRCUITS + 1  # of the prompts, side by side
    with pretending(shapes=True, native=True):
        model = model_of(name)
        ours = counted(lambda: call(model, pairs(tokens=tokens), **settings))
        own = own_passes(model, runs * EXAMPLES, tokens, backward)
    return {
        "launches": ours.launches.total(),
        "own launches": own.launches.total(),
        "beyond": (ours.launches.total() - own.launches.total()) / LAYERS[name] / (2 if backward else runs),
        "waits": ours.own_waits,
        "bytes beside": ours.bytes / own.bytes - 1,
        "time over own": ours.seconds / own.seconds,
    }


def masked_read(dtype: torch.dtype) -> dict[str, float]:
    """The reference's, of 300 senders, every tenth of which no receiver reads."""
    mask = torch.rand(300, 49, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[::10] = False
    with pretending(shapes=True):
        base, delta = (torch.empty(*n, 40, 4096, dtype=dtype, device="cuda") for n in ((), (300,)))
        there = mask.to("cuda")
        found = counted(lambda: ek.masked_read(base, delta, there, impl="reference"))
        least = base.numel() * (270 + 49 + 1) * dtype.itemsize + mask.numel()
    return {"launches": found.launches.total(), "waits": found.own_waits, "bytes over least": found.bytes / least}


def head_space_scores(heads: int = 32, shared: int = 8, width: int = 128, layers: int = 3) -> dict[str, float]:
    """Of layers like an 8B model's in bfloat16, in two tiles. At least, operands are read once, and expanded rows are
    written and read once."""
    tokens, features = 1024, WIDE["hidden_size"]

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda")

    with pretending(shapes=True, native=True):
        senders, receivers = [ek.Nodes(new(tokens, 1, features))], []
        for _ in range(layers):
            written = ek.Nodes(new(tokens, heads, width), new(heads, width, features))
            senders += [written, ek.Nodes(new(tokens, 1, features))]
            x, y = (new(POINTS, tokens, features) for _ in range(2))
            receivers += [
                ek.Nodes(new(tokens, n, width), new(n, width, features), new(n, POINTS, tokens), x)
                for n in (heads, shared, shared)
            ]
            receivers.append(ek.Nodes(new(tokens, 1, features), None, new(1, POINTS, tokens), y))
        s, r = (sum(group.values.shape[1] for group in side) for side in (senders, receivers))
        row, reach = (s + r) * features * 2, torch.full((r,), s)
        found = counted(lambda: ek.head_space_scores(senders, receivers, reach, workspace=row * tokens // 2))
        operands = {id(x): x for group in (*senders, *receivers) for x in vars(group).values() if x is not None}
        least = sum(x.numel() * 2 for x in operands.values()) + 2 * row * tokens + 4 * s * r
    return {"launches": found.launches.total(), "waits": found.own_waits, "bytes over least": found.bytes / least}


def a_batch(call: Callable[..., object], native: bool = True) -> dict[str, float]:
    """Launches of a batch of one pair as ever, and of one that is replayed; `native` as in `pretending`."""

    def last(n: int) -> int:
        """Launches of the last of so many."""
        seen: list[int] = []
        with pretending(shapes=True, native=native), counting() as found:
            progress = lambda *_: seen.append(found.launches.total())  # noqa: E731
            call(model_of(GPT2), pairs(n), batch_size=1, progress=progress)
        return seen[-1] - seen[-2]

    plain = last(2)  # too few to be captured
    with mock.patch.object(replays, "FEWEST", 1):
        return {"launches": plain, "replayed": last(5)}


def rows() -> dict[str, dict[str, Callable[[], dict[str, float]]]]:
    """How each row of each table is counted."""
    calls = {
        f"`{call.__name__}`, {name}": partial(beside, name, call) for name in LAYERS for call in (attribute, evaluate)
    }
    for call in (attribute, evaluate):
        calls[f"`{call.__name__}`, {LLAMA}, memory estimated"] = partial(beside, LLAMA, call, memory=None)
    calls[f"`attribute`, {WHOLE}, prompts of {LONG} tokens"] = partial(beside, WHOLE, attribute, LONG)
    operators: dict[str, Callable[[], dict[str, float]]] = {
        f"`masked_read`, reference, {name}": partial(masked_read, getattr(torch, name))
        for name in ("float32", "bfloat16")
    }
    kinds = (("", True), (", by the reference", False))
    batches = {
        f"`attribute`, `{name}`{words}": partial(a_batch, partial(attribute, method=name), native)
        for words, native in kinds
        for name in METHODS
    }
    return {
        "calls": calls,
        "operators": {**operators, "`head_space_scores`": head_space_scores},
        "batches": {**batches, f"`evaluate`, {CIRCUITS} circuits": partial(a_batch, evaluate)},
    }


def run(wanted: Sequence[str]) -> None:
    """Count the rows in whose names one of these words is, or all."""
    for part, counted_rows in rows().items():
        for name, count in counted_rows.items():
            if wanted and not any(word in name for word in wanted):
                continue
            with mock.patch.object(weights, "_from_cache", return_value={}):  # weights were read before
                numbers = count()
            found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
            kept = found.get(part, {"rows": {}})["rows"] | {name: numbers}
            found[part] = {"commit": commit(), "rows": {each: kept[each] for each in counted_rows if each in kept}}
            RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    from docs import documents

    documents.write(ROOT, ["docs/performance.md"])


def calls(_: tables.Results) -> str:
    columns = ["call, one batch", "launches", "the model's own", "beyond these, by layer and pass or circuit", "waits"]
    columns += ["bytes beside those of its own", "predicted time over its own"]

    def row(each: dict[str, float]) -> list[str]:
        launches = f"{each['launches']:,}", f"{each['own launches']:,}", f"{each['beyond']:.1f}"
        beside = round(each["bytes beside"], 2) + 0.0  # no -0.00
        return [*launches, f"{each['waits']}", f"{beside:.2f}", f"{each['time over own']:.2f}"]

    return _table("calls", columns, row)


def batches(_: tables.Results) -> str:
    def row(each: dict[str, float]) -> list[str]:
        share = each["replayed"] / each["launches"]
        return [f"{each['launches']:,}", f"{each['replayed']:,}", f"{100 * share:.1f} %"]

    return _table("batches", [f"a batch of one pair, {GPT2}", "launches", "replayed", "share"], row)


def operators(_: tables.Results) -> str:
    def row(each: dict[str, float]) -> list[str]:
        return [f"{each['launches']}", f"{each['waits']}", f"{each['bytes over least']:.2f}"]

    return _table("operators", ["operator", "launches", "waits", "bytes over the least"], row)


def _table(part: str, columns: Sequence[str], row: Callable[[dict[str, float]], list[str]]) -> str:
    found = json.loads(RESULT.read_text(encoding="utf-8"))[part]
    rows = ([name, *row(each)] for name, each in found["rows"].items())
    return f"{tables.markdown(columns, rows)}\nCounted on a pretended H100, commit {found['commit'][:7]}.\n"


if __name__ == "__main__":
    run(sys.argv[1:])
