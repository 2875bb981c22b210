"""auto-circuit, and its runs."""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import torch
from torch import Tensor

from bench import measure
from bench.integrations.inputs import POSITIONS, PROMPTS, SMALL, TINY, Runs, prompts, random_model
from eap_kernels.integrations import auto_circuit


class AutoCircuit:
    """auto-circuit with separate edges to queries, keys and values; `tokens` gives every position its own edges."""

    patch = staticmethod(auto_circuit.patch)

    def __init__(self, shape: str) -> None:
        # The package uses torch.optim.adam, which `import torch` no longer loads.
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

    def stopwatch(self):
        """Measures nothing: the patch changes what is differentiated, so no part of the time is comparable."""
        return nullcontext([])
