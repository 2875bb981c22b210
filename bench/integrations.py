"""Other circuit codebases as published against the same with our operators: scores, time and peak memory.

git clone https://github.com/hannamw/EAP-IG eap-main && git -C eap-main checkout 795f560
git clone https://github.com/hannamw/EAP-IG eap-mib && git -C eap-mib checkout 7af394a
pip install "transformer-lens>=2.15,<3" matplotlib auto-circuit==1.0.1    # not beside eap_circuits: older transformers
python -m bench.integrations --eap-ig 795f560=eap-main/src --eap-ig 7af394a=eap-mib/src --auto-circuit

On models with random weights: the scores of every run at a tiny shape and of some at GPT-2 small's; there the time and
memory too, of the first revision alone. Times are taken in turns in one process, memory in fresh ones. Writes
bench/results/integrations.json, or with the GPU's name, and the table of docs/integrations.md. A difference above
ALLOWED is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from bench import measure, record
from bench.processes import commit
from eap_kernels.integrations import auto_circuit, eap_ig

# Published and patched scores may differ by this share of the largest one.
ALLOWED = 1e-5
TINY, SMALL = "tiny", "gpt2-small"
SHAPES = {
    TINY: {"n_layers": 2, "d_model": 24, "n_heads": 3, "d_head": 8, "d_mlp": 64, "d_vocab": 61},
    SMALL: {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072, "d_vocab": 50257},
}
# Prompts a batch, and in all.
PROMPTS = {TINY: (4, 8), SMALL: (4, 4)}
POSITIONS, STEPS = 16, 3
Runs = dict[str, Callable[[], Tensor]]


def random_model(shape: str):
    """A HookedTransformer with random weights, in the configuration that both packages ask for."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        **SHAPES[shape],
        n_ctx=64,
        act_fn="gelu_new",
        normalization_type="LN",
        seed=0,
        device=measure.DEVICE,
        use_attn_result=True,
        use_split_qkv_input=True,
        use_attn_in=True,
        use_hook_mlp_in=True,
    )
    return HookedTransformer(config).eval()


def prompts(shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and corrupted token ids, differing in two places, and the ids of a right and a wrong answer."""
    generator = torch.Generator().manual_seed(0)
    _, count = PROMPTS[shape]

    def ids(*size: int) -> Tensor:
        return torch.randint(1, SHAPES[shape]["d_vocab"], size, generator=generator)

    clean = ids(count, POSITIONS)
    corrupted = clean.clone()
    corrupted[:, 5:7] = ids(count, 2)
    return clean, corrupted, ids(count, 2)


class EapIg:
    """The published package on prompts that are strings of token ids, of two lengths."""

    patch = staticmethod(eap_ig.patch)

    def __init__(self, path: str, shape: str) -> None:
        self._copy = tempfile.TemporaryDirectory()
        sys.path.insert(0, _for_cpu(path, self._copy.name) if measure.DEVICE == "cpu" else path)
        self.model, self.shape = random_model(shape), shape
        self.model.to_tokens = self._to_tokens
        self.model.tokenizer = SimpleNamespace(padding_side="right", pad_token_id=0, bos_token_id=0)
        batches = zip(*(x.split(PROMPTS[shape][0]) for x in prompts(shape)), strict=True)
        self.data = [(self._text(x), self._text(y), labels) for x, y, labels in batches]

    def _text(self, tokens: Tensor) -> list[str]:
        """The last prompt of each batch is shorter, so that there is padding."""
        return [" ".join(map(str, row.tolist()))[: None if i < len(tokens) - 1 else 24] for i, row in enumerate(tokens)]

    def _to_tokens(self, texts: list[str], **_: object) -> Tensor:
        rows = [torch.tensor([int(word) for word in text.split()]) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(measure.DEVICE)

    @staticmethod
    def _metric(logits: Tensor, _clean_logits: Tensor, lengths: Tensor, answers: Tensor) -> Tensor:
        last = logits[torch.arange(len(logits)), lengths - 1].gather(1, answers.to(logits.device))
        return last[:, 1] - last[:, 0]

    def _loss(self, *args: Tensor) -> Tensor:
        return self._metric(*args).mean()

    def _attribute(self, method: str, **options: object) -> Tensor:
        from eap.attribute import attribute
        from eap.graph import Graph

        graph = Graph.from_model(self.model)
        attribute(self.model, graph, self.data, self._loss, method, quiet=True, **options)
        return graph.scores.clone()

    def _nodes(self, neuron: bool) -> Tensor:
        from eap.attribute_node import attribute_node
        from eap.graph import Graph

        graph = Graph.from_model(self.model, neuron_level=True, node_scores=True)
        options = {"ig_steps": STEPS, "quiet": True, "neuron": neuron}
        attribute_node(self.model, graph, self.data, self._loss, "EAP-IG-inputs", **options)
        return (graph.neurons_scores if neuron else graph.nodes_scores).nan_to_num().clone()

    def _circuit(self, share: float) -> Tensor:
        from eap.evaluate import evaluate_graph
        from eap.graph import Graph

        graph = Graph.from_model(self.model)
        graph.scores[:] = torch.randn(graph.scores.shape, generator=torch.Generator().manual_seed(0))
        graph.apply_greedy(int(share * len(graph.edges)))
        return evaluate_graph(self.model, graph, self.data, self._metric, quiet=True)

    def runs(self) -> Runs:
        timed: Runs = {
            f"EAP-IG (inputs), {STEPS} steps": lambda: self._attribute("EAP-IG-inputs", ig_steps=STEPS),
            "circuit of a tenth of the edges": lambda: self._circuit(0.1),
        }
        if self.shape == SMALL:
            return timed
        means = {"intervention_dataloader": self.data}
        return timed | {
            "EAP": lambda: self._attribute("EAP"),
            "EAP, mean": lambda: self._attribute("EAP", intervention="mean", **means),
            "EAP, mean per position": lambda: self._attribute("EAP", intervention="mean-positional", **means),
            "EAP-IG (activations)": lambda: self._attribute("EAP-IG-activations", ig_steps=STEPS),
            "clean-corrupted": lambda: self._attribute("clean-corrupted"),
            "exact": lambda: self._attribute("exact"),
            "circuit of nearly all edges": lambda: self._circuit(0.95),
            "information flow routes": lambda: self._attribute("information-flow-routes").nan_to_num(),
            "node scores": lambda: self._nodes(neuron=False),
            "neuron scores": lambda: self._nodes(neuron=True),
        }

    @contextlib.contextmanager
    def stopwatch(self):
        """The time spent in the contractions and reads that the patch takes over, in seconds[0]."""
        modules = [importlib.import_module(f"eap.{name}") for name in ("utils", "evaluate")]
        originals, seconds = [module.einsum for module in modules], [0.0]

        def timed(einsum):
            def call(*args):
                start = time.perf_counter()
                result = einsum(*args)
                if measure.DEVICE == "cuda":
                    torch.cuda.synchronize()
                seconds[0] += time.perf_counter() - start
                return result

            return call

        for module, einsum in zip(modules, originals, strict=True):
            module.einsum = timed(einsum)
        yield seconds
        for module, einsum in zip(modules, originals, strict=True):
            module.einsum = einsum


def _for_cpu(path: str, folder: str) -> str:
    """A copy that runs without a GPU: the package names the device of its score matrices in the source."""
    for file in shutil.copytree(Path(path) / "eap", Path(folder) / "eap").glob("*.py"):
        file.write_text(file.read_text().replace("device='cuda'", "device='cpu'"))
    return folder


class AutoCircuit:
    """auto-circuit with separate edges to queries, keys and values; `tokens` gives every position its own edges."""

    patch = staticmethod(auto_circuit.patch)

    def __init__(self, _path: str, shape: str) -> None:
        # The package names torch.optim.adam, which `import torch` no longer brings along.
        torch.optim.adam = importlib.import_module("torch.optim.adam")
        self.shape = shape
        self.wide = self._model()
        self.tokens = self._model(POSITIONS) if shape == TINY else None

    def _model(self, positions: int | None = None):
        from auto_circuit.data import PromptDataLoader, PromptDataset
        from auto_circuit.utils.graph_utils import patchable_model

        model = random_model(self.shape).requires_grad_(False)
        clean, corrupted, answers = (x.to(measure.DEVICE) for x in prompts(self.shape))
        data = PromptDataset(clean, corrupted, list(answers[:, :1]), list(answers[:, 1:]))
        loader = PromptDataLoader(data, seq_len=positions, diverge_idx=0, batch_size=PROMPTS[self.shape][0])
        options = {"slice_output": "last_seq", "seq_len": positions, "separate_qkv": True, "device": measure.DEVICE}
        return patchable_model(model, factorized=True, **options), loader

    @staticmethod
    def _flat(scores: dict[str, Tensor]) -> Tensor:
        return torch.cat([scores[name].flatten() for name in sorted(scores)])

    def _gradient(self, pair, **options: object) -> Tensor:
        from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores

        return self._flat(mask_gradient_prune_scores(*pair, None, "logprob", "avg_diff", **options))

    def _circuit(self, pair, share: float) -> Tensor:
        from auto_circuit.prune import run_circuits

        model, loader = pair
        generator = torch.Generator().manual_seed(0)
        masks = sorted(model.patch_masks.items())
        scores = {name: torch.randn(mask.shape, generator=generator).to(mask.device) for name, mask in masks}
        (by_batch,) = run_circuits(model, loader, [int(share * model.n_edges)], scores).values()
        return torch.cat(list(by_batch.values()))

    def _masked(self, pair, function: str) -> Tensor:
        from auto_circuit.utils.graph_utils import mask_fn_mode

        torch.manual_seed(0)
        with mask_fn_mode(pair[0], function, dropout_p=0.1):
            return self._gradient(pair, mask_val=0.3)

    def _probing(self, pair) -> Tensor:
        from auto_circuit.prune_algos.subnetwork_probing import subnetwork_probing_prune_scores

        torch.manual_seed(0)
        options = {"learning_rate": 0.01, "epochs": 2, "mask_fn": "hard_concrete", "dropout_p": 0.1}
        return self._flat(subnetwork_probing_prune_scores(*pair, None, **options))

    def _per_example(self, pair) -> Tensor:
        from auto_circuit.utils.graph_utils import set_mask_batch_size

        with set_mask_batch_size(pair[0], PROMPTS[self.shape][0]):
            return self._gradient(pair, mask_val=0.3)

    def runs(self) -> Runs:
        wide, tokens = self.wide, self.tokens
        timed: Runs = {
            "mask gradient": lambda: self._gradient(wide, mask_val=0.0),
            "mask gradient at 1/2": lambda: self._gradient(wide, mask_val=0.5),
            "circuit of a tenth of the edges": lambda: self._circuit(wide, 0.1),
        }
        if self.shape == SMALL:
            return timed
        return timed | {
            "mask gradient, 3 IG points": lambda: self._gradient(wide, integrated_grad_samples=2),
            "mask gradient per position": lambda: self._gradient(tokens, integrated_grad_samples=2),
            "mask gradient per example": lambda: self._per_example(wide),
            "circuit per position": lambda: self._circuit(tokens, 0.1),
            "mask gradient, sigmoid": lambda: self._masked(wide, "sigmoid"),
            "mask gradient, hard concrete": lambda: self._masked(wide, "hard_concrete"),
            "mask gradient, hard concrete per position": lambda: self._masked(tokens, "hard_concrete"),
            "subnetwork probing": lambda: self._probing(wide),
        }

    @contextlib.contextmanager
    def stopwatch(self):
        """The patch changes what is differentiated, so no part of the time is comparable alone."""
        yield []


PACKAGES = {"EAP-IG": EapIg, "auto-circuit": AutoCircuit}


def difference(published: Tensor, patched: Tensor) -> float:
    """The largest one, relative to the largest score."""
    return float((patched - published).abs().max() / published.abs().max())


def scores(package: EapIg | AutoCircuit) -> dict[str, float]:
    """How much the scores of each run differ."""
    found = {}
    for name, run in package.runs().items():
        published = run().cpu()
        with package.patch():
            found[name] = difference(published, run().cpu())
    return found


def times(package: EapIg | AutoCircuit, rounds: int) -> dict[str, dict]:
    """Per run: medians of the seconds of a call, whole and in what is replaced, and of the ratios of rounds."""
    rows = {}
    for name, run in package.runs().items():
        taken: dict[str, list[list[float]]] = {"published": [], "patched": []}
        for how in ("published", "patched", "patched", "published") * rounds:
            with package.patch() if how == "patched" else contextlib.nullcontext(), package.stopwatch() as inside:
                start = time.perf_counter()
                run().cpu()
                taken[how].append([time.perf_counter() - start, *inside])
        # [rounds, parts]
        published, patched = (torch.tensor(x).unflatten(0, (rounds, 2)).mean(1) for x in taken.values())
        parts = ("time", "replaced")[: published.shape[1]]
        row = rows.setdefault(name, {"ratios": _medians(parts, published / patched)})
        row["seconds"] = {"published": _medians(parts, published), "patched": _medians(parts, patched)}
    return rows


def _medians(parts: tuple[str, ...], rounds: Tensor) -> dict[str, float]:
    return dict(zip(parts, rounds.median(0).values.tolist(), strict=True))


def worker(job: str, kind: str, path: str, *arguments: str) -> object:
    if job == "scores":
        return scores(PACKAGES[kind](path, *arguments))
    package = PACKAGES[kind](path, SMALL)
    if job == "times":
        return times(package, int(arguments[0]))
    name, how = arguments
    with package.patch() if how == "patched" else contextlib.nullcontext():
        return measure.peak_bytes(package.runs()[name])


def in_fresh_process(*arguments: str) -> object:
    command = [sys.executable, "-m", "bench.integrations", "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compared(kind: str, label: str, path: str) -> dict[str, dict]:
    """A package's scores at both shapes."""
    benches = {}
    for shape in SHAPES:
        found = in_fresh_process("scores", kind, path, shape)
        benches[f"integrations_scores[{label}, {shape}]"] = {
            **{"package": label, "model": shape, "differences": found, "ratios": {}},
        }
        print(label, shape, found, flush=True)
        for name, each in found.items():
            if not each <= ALLOWED:
                raise RuntimeError(f"{label}, {shape}, {name}: scores differ by {each:.1e}")
    return benches


def measured(kind: str, label: str, path: str, rounds: int) -> dict[str, dict]:
    """The cost of each run of a package at the larger shape."""
    benches = {}
    for name, row in in_fresh_process("times", kind, path, str(rounds)).items():
        row["bytes"] = {how: in_fresh_process("memory", kind, path, name, how) for how in ("published", "patched")}
        row["ratios"]["memory"] = row["bytes"]["published"] / row["bytes"]["patched"]
        benches[f"integrations_cost[{label}, {name}]"] = {"package": label, "run": name, **row}
        print(label, name, row, flush=True)
    return benches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eap-ig", action="append", default=[], metavar="REVISION=PATH")
    parser.add_argument("--auto-circuit", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(*options.worker)))
        return
    benches = {}
    revisions = [revision.split("=", 1) for revision in options.eap_ig]
    packages = [("EAP-IG", f"EAP-IG {label}", str(Path(path).resolve())) for label, path in revisions]
    timed = packages[:1]
    if options.auto_circuit:
        timed.append(("auto-circuit", f"auto-circuit {version('auto-circuit')}", ""))
    for package in [*timed, *packages[1:]]:
        benches |= compared(*package)
    for package in timed:
        benches |= measured(*package, options.rounds)
    result = {"machine": measure.machine(), "commit": commit(), "date": date.today().isoformat()}
    result["versions"] = measure.versions() | {"transformer-lens": version("transformer-lens")}
    result |= {"threads": torch.get_num_threads(), "rounds": options.rounds, "benches": benches}
    name = f"integrations-{measure.slug(result['machine'])}" if "gpu" in result["machine"] else "integrations"
    (record.RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    record.write_tables()


if __name__ == "__main__":
    main()
