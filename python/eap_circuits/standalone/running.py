"""A circuit as a module: forward and generate with every other edge ablated."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ..adapters import Architecture, bind, foreign_hooks
from ..errors import expected, instance, known_arguments, number, shown
from ..evaluation import optimal_constants
from ..forward import Constants, Hooks, Runner, batch_of, borrowed, parameters
from ..graph import Circuit
from ..intervention import run_circuits
from ..modules.loans import gives_back
from ..ranks import together
from ..recording import record_run
from ..request import check_ablation, check_circuit, check_tokens, prepare, try_model
from ..tasks import PairedDataset, different_throughout

Factors = dict[tuple[str, str], float]


class CircuitModel(nn.Module):
    """A module that runs a circuit of a model; `circuit_model` makes one.

    It shares the model's weights, and leaves the model as it was after every call: its hooks, modes and attention
    functions. Forward hooks of one's own on the model's modules stay in place and see what the circuit computes, and
    before that the ablated run. Calls compute no gradients.

    Attributes:
        model: the model.
        circuit: the circuit.
        ablation: the name of the ablation.
        constants: what ablated edges carry; None for patching.
    """

    def __init__(
        self, model: nn.Module, circuit: Circuit, ablation: str, constants: Constants | None, mask: Tensor
    ) -> None:
        super().__init__()
        self.model, self.circuit, self.ablation, self.constants, self._mask = model, circuit, ablation, constants, mask
        self._tried: list[Any] | None = None  # the modules and hooks of others with which it was

    @together
    @gives_back
    @known_arguments
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, corrupted_ids: Tensor | None = None
    ) -> CausalLMOutput:
        """The circuit's logits at every token.

        Args:
            input_ids: int [E, T].
            attention_mask: [E, T], 1 for real tokens, which stand side by side; None: all are real. Padding may be on
                either side; positions count from a prompt's first real token.
            corrupted_ids: int [E, T], the corrupted prompts, padded alike: under patching, and only then.

        Returns:
            A CausalLMOutput with `logits` [E, T, V], 0 at padding.

        Raises:
            InputError: tokens that the model does not have, a mask with gaps, or corrupted prompts that are missing,
                not wanted or of another shape.
        """
        arch = bind(self.model)
        data = self._data(arch, input_ids, attention_mask, corrupted_ids)
        with borrowed(arch.model), torch.no_grad():
            logits = self._run(arch, data)
        every = logits.new_zeros(*input_ids.shape, logits.shape[2])
        real = torch.ones_like(every[..., 0], dtype=torch.bool)
        if attention_mask is not None:
            real = torch.as_tensor(attention_mask, device=every.device).bool()
        assert data.scored is not None
        every[real] = logits[(data.scored[:, : logits.shape[1]] >= 0).to(every.device)]
        return CausalLMOutput(logits=every)

    @together
    @gives_back
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        corrupted_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """What the model's own `generate` makes of the circuit: greedy, sampled or by beams.

        Under patching the corrupted prompts go on with the tokens that are generated. The cache is the circuit's own.
        There is none, and each token runs all those before it again, under patching, in models whose forward takes no
        positions or whose embeddings pass a norm with them, and for padded prompts where layers mix tokens by other
        means than attention.

        Args:
            input_ids, attention_mask, corrupted_ids: as in `forward`, with padding on the left.
            options: those of `generate` in transformers, such as max_new_tokens, do_sample, num_beams.

        Returns:
            What `generate` in transformers returns: by default int64 [E, T + new].

        Raises:
            InputError: as `forward`, padding on the right, a model that cannot generate, embeddings in place of tokens,
                a cache, or another kind than "dynamic"; or, once it comes to them, tokens beyond the positions for
                which there are constants.
        """
        arch = bind(self.model)
        model: Any = arch.model
        if not getattr(model, "can_generate", bool)():
            raise expected("model", "one that can generate", type(model).__name__)
        data = self._data(arch, input_ids, attention_mask, corrupted_ids)
        for name in ("inputs_embeds", "cache", "past_key_values"):
            if options.get(name) is not None:
                raise expected(name, "none, as circuits begin with tokens and keep a cache of their own", "some")
        kind = options.get("cache_implementation", model.generation_config.cache_implementation)
        if kind not in (None, "dynamic"):
            raise expected("cache_implementation", "'dynamic' or none", shown(kind))
        mask = torch.ones_like(input_ids) if attention_mask is None else torch.as_tensor(attention_mask)
        if (mask[:, -1] == 0).any():
            raise expected("attention_mask", "padding on the left, to generate", "padding on the right")
        if not self._caches(arch, bool((mask == 0).any())):
            options["use_cache"] = False
        with borrowed(model), torch.no_grad(), Hooks(tokens=1) as hooks:
            self._try(arch, data)
            theirs = model.forward

            @wraps(theirs)
            def step(**given: Any) -> Any:
                tokens = given.pop("input_ids", None)
                if tokens is None:  # a pass of ours
                    return theirs(**given)
                last = given.pop("logits_to_keep", 0) == 1
                if given.get("use_cache"):
                    return self._behind(arch, tokens, given, last)
                other = None
                if corrupted_ids is not None:
                    copies = len(tokens) // len(corrupted_ids)  # beams
                    before = corrupted_ids.to(tokens.device).repeat_interleave(copies, 0)
                    other = torch.cat([before, tokens[:, before.shape[1] :]], 1)
                data = self._data(arch, tokens, given.get("attention_mask"), other, last=True)
                return CausalLMOutput(logits=self._run(arch, data))

            hooks.replace_forward(model, step)
            return model.generate(input_ids, attention_mask=mask, **options)

    def _caches(self, arch: Architecture, padded: bool) -> bool:
        """Can tokens run behind a cache of the circuit's own, each at its own position?"""
        if self.constants is None or arch.family.placed:
            return False
        if padded and any(layer.n_heads and layer.reads for layer in arch.layers):
            return False  # what a circuit puts in place of a mixer's inputs is put at padding, too, where mixers see it
        alike = len(self.constants.embedding) == 1 and not any(layer.n_heads for layer in arch.layers)
        return alike or "position_ids" in parameters(arch.model)

    def _data(self, arch: Architecture, tokens: Any, mask: Any, corrupted: Any, last: bool = False) -> PairedDataset:
        """The prompts, scored at each real token, or at the last."""
        if (corrupted is None) is (self.constants is None):
            wanted = "none under this ablation" if corrupted is not None else "the corrupted prompts, which patch edges"
            raise expected("corrupted_ids", f"{wanted} ({self.ablation!r})", "none" if corrupted is None else "some")
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not tokens.numel():
            found = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise expected("input_ids", "a tensor of shape [prompts, tokens]", found)
        for name, other in (("attention_mask", mask), ("corrupted_ids", corrupted)):
            if other is not None and getattr(other, "shape", None) != tokens.shape:
                found = shown(getattr(other, "shape", type(other).__name__))
                raise expected(name, f"a tensor of input_ids' shape {list(tokens.shape)}", found)
        mask = torch.ones_like(tokens) if mask is None else mask
        lengths = mask.sum(1, keepdim=True).cpu()
        if not lengths.all():
            raise expected("attention_mask", "a real token or more in each row", mask.tolist()[int(lengths.argmin())])
        place = torch.arange(tokens.shape[1])
        scored = lengths - 1 if last else torch.where(place < lengths, place, -1)
        data = PairedDataset.from_tokens(tokens, corrupted, attention_mask=mask, scored=scored)
        check_tokens(arch, data)
        if self.constants is None:
            return data
        self._check_positions(int(lengths.max()))
        return different_throughout(data)

    def _check_positions(self, tokens: int) -> None:
        assert self.constants is not None
        covered = len(self.constants.embedding)
        if 1 < covered < tokens:
            raise expected("input_ids", f"at most {covered} tokens, for whose positions there are constants", tokens)

    def _run(self, arch: Architecture, data: PairedDataset) -> Tensor:
        """Logits [E, P, V] at the scored positions, without a cache."""
        self._try(arch, data)
        batch = batch_of(data, torch.arange(len(data)), False, arch.device)
        runner = Runner(arch, self.circuit.graph, batch, every_mlp=True)
        return self._circuit(arch, runner, runner)

    def _try(self, arch: Architecture, data: PairedDataset) -> None:
        """Once, and again with other modules or hooks: what `evaluate` tries, except for prefixes."""
        now = [each for module in arch.model.modules() for each in (module, *foreign_hooks(module))]
        if self._tried != now:
            try_model(arch, self.circuit.graph.heads, data, reuse_prefix=False)
            self._tried = now

    def _circuit(self, arch: Architecture, ablating: Runner, runner: Runner) -> Tensor:
        ablated = record_run(ablating, True, self.constants and self.constants.on(arch))
        (logits,) = run_circuits(runner, self.circuit.graph, ablated, [self._mask])
        return logits

    def _behind(self, arch: Architecture, tokens: Tensor, given: dict[str, Any], last: bool) -> Any:
        """What the model's forward returns for tokens that follow those in its cache, which gets the circuit's."""
        model, (rows, width), mask = arch.model, tokens.shape, given.get("attention_mask")
        start = torch.zeros(rows, dtype=torch.int64)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # Position of a row's first column: less than 0 where it begins with padding.
            real = mask.cpu().bool()
            position, first = (real.cumsum(1) - 1)[:, -width:], real[:, -width:].int().argmax(1, keepdim=True)
            start = (position.gather(1, first) - first)[:, 0]
        elif given.get("position_ids") is not None:  # there is no padding
            start = given["position_ids"].cpu().expand(rows, -1)[:, 0]
        self._check_positions(int(start.max()) + width)
        scored = torch.arange(width).expand(rows, -1)[:, -1 if last else 0 :]
        data = PairedDataset.from_tokens(tokens, None, torch.full((rows,), width), scored=scored)
        batch = batch_of(different_throughout(data), torch.arange(rows), False, arch.device)
        batch = replace(batch, start=start.to(arch.device), host={**batch.host, "start": start})
        given = {name: x for name, x in given.items() if name != "inputs_embeds"}
        alone: dict[str, Any] = {"use_cache": False}
        if "position_ids" in parameters(model):
            there = (start[:, None] + torch.arange(width)).clamp(min=0).to(arch.device)
            alone["position_ids"] = given["position_ids"] = there
        results: list[Any] = []
        with Hooks(tokens=width) as hooks:
            hooks.on_result(model, results.append)
            ablating, runner = (
                Runner(arch, self.circuit.graph, batch, every_mlp=True, given=each) for each in (alone, given)
            )
            logits = self._circuit(arch, ablating, runner)
        return replace(results[-1], logits=logits)


def _mask(circuit: Circuit, factors: Factors | None) -> Tensor:
    """How much of each edge is kept, [S, R]."""
    graph, mask = circuit.graph, circuit.mask
    for edge, factor in instance("factors", factors or {}, dict).items():
        named = isinstance(edge, tuple) and len(edge) == 2 and edge[0] in graph.senders and edge[1] in graph.receivers
        where = (graph.senders.index(edge[0]), graph.receivers.index(edge[1])) if named else None
        if where is None or not graph.edge_mask[where]:
            raise expected("factors", "edges of the graph, as (sender, receiver)", shown(edge))
        mask = mask.double()
        mask[where] = number("factors", factor, "finite numbers", -1e308, 1e308)
    return mask


@together
@gives_back
@known_arguments
def circuit_model(
    model: nn.Module,
    circuit: Circuit,
    ablation: str | Constants = "patching",
    ablation_data: PairedDataset | None = None,
    *,
    factors: Factors | None = None,
) -> CircuitModel:
    """A module that runs a circuit: every edge outside it carries an ablated contribution, as in `evaluate`.

    Args:
        model: a Hugging Face causal language model; the module shares its weights.
        circuit: a circuit of this model.
        ablation: as in `evaluate`. Under "patching" each call gets corrupted prompts. "optimal" learns constants that
            keep the model's predictions on the ablation data; those of `optimal_constants` can be given, too.
        ablation_data: whose clean prompts are used to compute means or learn constants; only then needed.
        factors: by (sender, receiver), as in `circuit.edges`, how strongly an edge's contribution counts, less what
            ablation puts in its place: 0 is outside the circuit, 1 inside, 2 twice as strong. By default 1 for the
            circuit's edges and 0 for all others.

    Returns:
        A module with forward and generate; see `CircuitModel`.

    Raises:
        InputError: a circuit of another graph, an ablation without the data that it needs, a factor of no edge, or
            anything else that `evaluate` refuses.

    Example:
        >>> runs = eap.circuit_model(model, circuit, ablation="mean", ablation_data=data)
        >>> prompt = data.clean[:1, : data.lengths[0]]
        >>> tokens = runs.generate(prompt, max_new_tokens=3)
    """
    arch = bind(model)
    if arch.classifies:
        raise expected("model", "one that predicts tokens", f"{type(arch.model).__name__}, which scores whole prompts")
    if arch.encoder:
        raise expected("model", "one that is no encoder-decoder, for circuit_model", type(arch.model).__name__)
    check_circuit(circuit, arch)
    entry, mask = check_ablation(arch, ablation, ablation_data), _mask(circuit, factors)
    if entry.from_data and ablation_data is None:
        raise expected("ablation_data", f"prompts, from which {ablation!r} takes its constants", "none")
    constants: Constants | None = None
    if entry.learned:
        assert ablation_data is not None
        constants = optimal_constants(model, circuit, ablation_data, "kl_divergence")
    elif ablation_data is not None:
        request = prepare(model, ablation_data, None, ablation, compares=False)
        with borrowed(request.arch.model), torch.no_grad():
            constants = request.with_constants().constants
    elif entry.constants is not None:
        constants = entry.constants(arch, None)  # type: ignore[arg-type]
    return CircuitModel(model, circuit, entry.name, constants, mask)
