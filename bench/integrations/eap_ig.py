"""The published EAP-IG package, and its runs."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from bench import measure
from bench.integrations.inputs import PROMPTS, SMALL, STEPS, Runs, prompts, random_model
from eap_kernels.integrations import eap_ig


class EapIg:
    """The published package on prompts that are strings of token ids, of two lengths."""

    patch = staticmethod(eap_ig.patch)

    def __init__(self, path: Path, shape: str) -> None:
        self._copy = tempfile.TemporaryDirectory()
        sys.path.insert(0, _for_cpu(path, self._copy.name) if measure.DEVICE == "cpu" else str(path))
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
        seconds = [0.0]

        def timed(einsum):
            def call(*args):
                start = time.perf_counter()
                result = einsum(*args)
                if measure.DEVICE == "cuda":
                    torch.cuda.synchronize()
                seconds[0] += time.perf_counter() - start
                return result

            return call

        with contextlib.ExitStack() as stack:
            for name in ("utils", "evaluate"):
                module = importlib.import_module(f"eap.{name}")
                stack.enter_context(mock.patch.object(module, "einsum", timed(module.einsum)))
            yield seconds


def _for_cpu(path: Path, folder: str) -> str:
    """A copy that runs without a GPU: the package's source fixes the device of its score matrices."""
    for file in shutil.copytree(path / "eap", Path(folder) / "eap").glob("*.py"):
        file.write_text(file.read_text().replace("device='cuda'", "device='cpu'"))
    return folder
