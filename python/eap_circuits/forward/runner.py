"""Run a batch through the model: embeddings in, logits at the scored positions out, shared prefixes from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Architecture, computes_in_parts, concatenate, device_of, read, restore
from ..errors import expected
from ..graph import Graph
from .batches import Batch
from .hooks import Hooks, refuse_autocast
from .layers.fused_norms import fuse_norms
from .layers.last_mlp import Scored, ScoredMLP, at_scored
from .layers.per_layer import give_per_layer
from .layers.rescaling import Rescaling
from .layers.rewriting import Rewriting
from .layers.stacked import call_stacked, show_stacked
from .layers.two_sides import begin_streams, two_sides
from .prefixes.prefix import Prefix, WholePrompts, beginning, behind, parameters, run_by_length, run_prefixes

Register = Callable[[Hooks], None]
EVERYWHERE = slice(None)


def each(*registers: Register) -> Register:
    """Adds the hooks of each, in this order."""

    def register(hooks: Hooks) -> None:
        for one in registers:
            one(hooks)

    return register


class _Enough(Exception):
    """Ends a pass."""


class _Given(nn.Module):
    """Returns this, whatever its input."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self._given = given

    def forward(self, _: Tensor) -> Tensor:
        return self._given


class Runner:
    """The model on one batch, as a function of the suffix's embeddings.

    Args:
        arch: the bound model.
        graph: its edge graph. If its receivers are query heads that share keys and values, attention gets a copy of
            these for each query head: the same values, but each with a gradient and a mask of its own.
        tokens: int64 [U]: compute only these tokens' logits, [E, U], if the model's last module allows it.
        every_mlp: run the last layer's MLP at every token; by default it runs only where logits are scored, and
            returns 0 elsewhere.
        given: what the model's forward gets beside the embeddings, for tokens that run behind a cache of one's own.
    """

    def __init__(
        self,
        arch: Architecture,
        graph: Graph,
        batch: Batch,
        tokens: Tensor | None = None,
        every_mlp: bool = False,
        given: dict[str, Any] | None = None,
    ) -> None:
        self.arch = arch
        self.batch = batch
        self._tokens = tokens
        self._pooled = arch.classifies and arch.head is None
        last = arch.layers[-1]
        # A layer's only block may mix tokens.
        mixes = last.bare or not last.n_heads or last.mlp_runs_whole
        self._every_mlp = every_mlp or self._pooled or mixes or arch.hooked
        # Key/value copies per layer.
        self.repeat_kv = [layer.groups if graph.heads == "query" else 1 for layer in arch.layers]
        self._cached = [n for layer, n in zip(arch.layers, self.repeat_kv, strict=True) if layer.caches]
        self._model: Any = arch.model
        self._body: Any = self._model.base_model if arch.classifies else self._model  # what fills a cache
        self._place = "position_ids" in parameters(self._model)
        self._prefix: Prefix | None = None
        self._given: dict[str, Any] = {"use_cache": False} if given is None else given

    def embed(self, tokens: Tensor) -> Tensor:
        """What the tokens' embeddings write to the residual stream: int64 [E, T] -> [E, T, D], without gradient."""
        shown = self.batch.pictures
        with torch.no_grad():
            if shown is not None:
                return shown.embed(tokens, self.arch.embed)
            x = self._placed(tokens) if self.arch.family.placed or self.arch.encoder else self.arch.embed(tokens)
            return x.to(tokens.device)

    def _placed(self, tokens: Tensor) -> Tensor:
        """What a norm of token and position embeddings gives, or an encoder's first layer reads: the model runs up to
        there."""
        given: list[Tensor] = []

        def stop(y: Tensor) -> None:
            given.append(y)
            raise _Enough

        with Hooks(tokens.shape[1]) as hooks, suppress(_Enough):
            if self.arch.encoder:
                hooks.on_input(self.arch.layers[0].module, stop)
                self._model(**two_sides(self.batch, tokens), use_cache=False)
            else:
                norm = self.arch.embedding_norm
                assert norm is not None
                hooks.on_output(norm, stop)
                self._model.base_model(input_ids=tokens)
        return given[0]

    def read_at(self, device: torch.device) -> slice | Tensor:
        """The tokens of [E·T] that logits are made from: the scored ones, or all if whole prompts are classified."""
        return EVERYWHERE if self._pooled else self.batch.end.places_on(device)

    def projection_sites(self, index: int) -> Iterator[tuple[nn.Module, dict[str, slice]]]:
        """Each projection module of a layer, with its features for each name, concatenated and repeated."""
        for module, sites in self.arch.layers[index].projection_modules.items():
            columns, start = {}, 0
            for letter, projection in sites.items():
                stop = start + projection.width * (self.repeat_kv[index] if letter in ("k", "v") else 1)
                columns[letter] = slice(start, stop)
                start = stop
            yield module, columns

    def logits(
        self,
        embeddings: Tensor,
        register: Register | None = None,
        corrupted: int = 0,
        alphas: Sequence[float] | None = None,
    ) -> Tensor:
        """Logits at the scored positions: [m·E, T, D] -> [m·E, V], for m copies of the batch, one after another; or
        [m·E, P, V], where the data say which positions are scored (`Batch.by_example`).

        `register` adds hooks for this run. Hooks on a projection see its output concatenated and repeated. The first
        `corrupted` copies are the corrupted prompts, scored at their own positions. `alphas` are of copies that are
        points between the corrupted prompts, 0, and the clean ones, 1, if there are any.
        """
        batch, (rows, suffix) = self.batch, embeddings.shape[:2]
        copies, end = rows // batch.n_rows, batch.end
        scored = torch.cat([end.corrupted_scored.repeat(corrupted), end.scored.repeat(copies - corrupted)])
        given = dict(self._given)
        if self.arch.encoder:  # of these tokens only the shape counts, as its first layer reads `embeddings`
            given |= two_sides(batch, batch.clean.repeat(copies, 1))
        if not self.arch.causal and (real := batch.real_tokens(copies, corrupted)) is not None:
            given["attention_mask"] = real
        given |= batch.picture_arguments(copies, corrupted)
        if batch.prefix.shape[1]:
            if self._prefix is None:
                once = [1] * len(self._cached)
                with torch.no_grad(), self._for_cache():
                    if self.arch.keeps_states:
                        ran = run_by_length(self._body, batch)
                    else:
                        ran = run_prefixes(self._body, batch.prefix, batch.known.shared, once)
                self._prefix = Prefix(batch, ran, batch.prefix_of, once)
            given = self._prefix.arguments(self._model, suffix, copies)
            if self._place:
                offset = torch.arange(suffix, device=scored.device)
                # Padding may reach beyond the positions that a model has.
                last = batch.start + batch.last
                given["position_ids"] = (batch.start[:, None] + offset).minimum(last[:, None]).repeat(copies, 1)
        with Hooks(tokens=suffix) as hooks:
            points = alphas or [1.0] * (copies - corrupted)
            show_stacked(self.arch, batch, corrupted, points, hooks)
            if self.arch.per_layer is not None:
                given |= give_per_layer(self.arch, batch, corrupted, points, hooks)
            return self._run(embeddings, scored, given, hooks, register, hooks)

    def record(self, embeddings: Tensor, register: Register, corrupted: int = 0) -> Tensor:
        """The same without gradient, for hooks that only read.

        If every example has a prefix of its own, the first run of one copy includes the prefixes: whole prompts, in one
        pass. It leaves no states behind the prefixes, where the cache holds some.
        """
        batch = self.batch
        with torch.no_grad():
            apart = len(embeddings) != len(batch.prefix) or self.arch.per_layer is not None or self.arch.keeps_states
            if self._prefix is not None or not batch.prefix.shape[1] or apart:
                return self.logits(embeddings, register, corrupted)
            prefixes, shared = batch.prefix[batch.prefix_of], batch.known.shared
            with self._for_cache():
                cache = beginning(self._body, prefixes, shared, self._cached)
            whole = WholePrompts(batch, shared)
            joined = whole.join(self.embed(prefixes[:, shared:]), embeddings)
            begin = batch.start - shared if batch.positions is None else (batch.start - shared)[batch.positions.row]
            scored = begin + (batch.corrupted_scored if corrupted else batch.scored)
            given = behind(self._model, cache)
            tokens = joined.shape[1]
            with Hooks(tokens) as hooks, Hooks(tokens, whole.suffixes) as reading:
                logits = self._run(joined, scored, given, hooks, register, reading)
            every = torch.arange(len(prefixes), device=prefixes.device)
            self._prefix = Prefix(batch, cache, every, self._cached)
            return logits

    def _run(
        self,
        embeddings: Tensor,
        scored: Tensor,
        given: dict[str, Any],
        hooks: Hooks,
        register: Register | None,
        registered: Hooks,
    ) -> Tensor:
        """[rows, tokens, D] -> [m·E, V] or [m·E, P, V]: logits at the scored positions, int64 [m·n], of each row.

        A module's hooks run in the order in which they are added, each on the last one's result. The caller's hooks,
        `register`, come between those that bring values into the form that they expect and those that undo it.
        """
        inputs = embeddings if self.arch.given_scale == 1 else embeddings / self.arch.given_scale
        inputs = inputs.clone() if self.arch.hooked else inputs  # which hooks may change in place
        if self.arch.embedding_norm is not None:  # what comes before it is not looked at, and may have another width
            inputs = embeddings.new_zeros(*embeddings.shape[:2], self._model.get_input_embeddings().weight.shape[1])
        if not self.arch.encoder:
            given["inputs_embeds"] = inputs
        batch = self.batch
        where = batch.scored_rows(len(embeddings) // batch.n_rows), scored

        def first(rows: int) -> Scored:
            n = rows // batch.n_rows * len(batch.end.scored)
            return where[0][:n], where[1][:n]

        last = ScoredMLP(self.arch.layers[-1], first)
        views: list[Rewriting | Rescaling] = [Rescaling(norm) for norm in self.arch.norms if norm.unit != 1]
        views += [Rewriting(layer) for layer in self.arch.layers if layer.rewrites]
        with Hooks(tokens=1) as single:
            # Some turn it on themselves: a model that accelerate has prepared for mixed precision.
            hooks.on_input(self.arch.layers[0].module, lambda x: refuse_autocast(x.device.type))
            fuse_norms(self.arch, hooks)
            call_stacked(self.arch, hooks)
            for view in views:
                view.begin(hooks)
            if self.arch.encoder:
                begin_streams(self.arch, embeddings, hooks)
            self._skip_embedding_norm(embeddings, hooks)
            # Before the caller's hooks, which see queries, keys and values one after another, repeated.
            self._concatenate(hooks)
            # Before the caller's hooks, which see the last MLP's output in whole rows.
            if not self._every_mlp:
                last.put(single)
            if register is not None:
                register(registered)
            # After the caller's hooks, which see and change the last MLP's input in whole rows.
            if not self._every_mlp:
                last.take(hooks)
            for view in reversed(views):
                view.end(hooks)
            # After the caller's hooks on projections: attention expects features in its own order.
            self._restore_order(hooks)
            # Around all of these: they see all heads of a tensor parallel model, and attention those of this rank.
            for module, of_inputs, split in self.arch.splits(hooks.hooked | registered.hooked):
                add = hooks.on_input if of_inputs else hooks.on_output
                add(module, split.whole, first=True)
                add(module, split.own)
            # Last, after any of the caller's hooks on the final norm: only scored positions get logits.
            self._score(lambda x: at_scored(x, where), hooks)
            result = self._result(given)
        cut = isinstance(result, Tensor) and result.dim() == 3 and result.shape[1] == 1
        logits = self._checked(result, len(scored) if cut else len(embeddings)).to(embeddings.device)
        return batch.by_example((logits if cut else at_scored(logits, where)).squeeze(1))

    def _result(self, given: dict[str, Any]) -> object:
        """The model's logits, [rows, tokens, V], or [rows, 1, V] of whole prompts."""
        head: Any = self.arch.head
        if self.arch.classifies and head is not None:
            # The classifier itself looks for padding to find the last token, which embeddings do not tell.
            return head(self._body(**given)[0])
        logits = getattr(self._model(**given), "logits", None)
        return logits[:, None] if self._pooled and isinstance(logits, Tensor) and logits.dim() == 2 else logits

    def _skip_embedding_norm(self, embeddings: Tensor, hooks: Hooks) -> None:
        """`embed` has already applied this norm."""
        norm = self.arch.embedding_norm
        if norm is None:
            return
        if norm is not self.arch.final_norm.module:
            # No other hook is on it, so the order does not matter.
            hooks.on_output(norm, lambda _: embeddings)
            return
        # The same module is the final norm, too: until the first layer runs, the model has another in its place.
        path = next(path for path, module in self.arch.model.named_modules() if module is norm)
        parent, _, name = path.rpartition(".")
        owner = self.arch.model.get_submodule(parent)
        hooks.set_attribute(owner, name, _Given(embeddings))
        hooks.on_input(self.arch.layers[0].module, lambda _: setattr(owner, name, norm))

    def _checked(self, logits: object, rows: int) -> Tensor:
        """Logits, if they are those of a language model."""
        model = self._model
        known = self._tokens is not None or self.arch.classifies or self.arch.head is not None
        least = 1 if known else model.get_input_embeddings().weight.shape[0]
        if not isinstance(logits, Tensor) or logits.dim() != 3 or len(logits) != rows or logits.shape[2] < least:
            found = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else "none"
            raise expected(f"{type(model).__name__}'s logits", "[prompts, positions, vocabulary]", found)
        return logits

    @contextmanager
    def _for_cache(self) -> Iterator[None]:
        """For passes that only fill the key/value cache."""
        with Hooks(tokens=1) as hooks:
            fuse_norms(self.arch, hooks)
            if not self._every_mlp:
                scored = self.batch.scored
                last = ScoredMLP(
                    self.arch.layers[-1],
                    lambda rows: (torch.arange(rows, device=scored.device), scored.new_zeros(rows)),
                )
                last.put(hooks)
                last.take(hooks)
            self._score(lambda x: x[:, :1], hooks)
            yield

    def _score(self, cut: Callable[[Tensor], Tensor], hooks: Hooks) -> None:
        """Compute logits, [n, 1, V] or [n, 1, U], only at the positions that `cut` picks."""
        head = self.arch.head
        if head is not None:
            hooks.on_input(head, cut)
        if head is None or self._tokens is None or not self.arch.picks_logits:
            return
        which = self._tokens.to(device_of(head))
        if computes_in_parts(head):
            hooks.on_output(head, lambda logits: logits[..., which])
            return
        weight, bias = (None if x is None else x[which] for x in (read(head, "weight"), read(head, "bias")))
        assert weight is not None
        hooks.replace_forward(head, lambda x: nn.functional.linear(x, weight, bias))

    def _concatenate(self, hooks: Hooks) -> None:
        """Let projections return their features concatenated, with keys and values repeated."""
        for layer, repeat_kv in zip(self.arch.layers, self.repeat_kv, strict=True):
            for change in layer.per_query_head() if repeat_kv > 1 else ():
                hooks.set_attribute(*change)
            for module, projections in layer.projection_modules.items():
                repeated = repeat_kv > 1 and not {"k", "v"}.isdisjoint(projections)
                if layer.order != "concatenated" or repeated:
                    hooks.on_output(module, partial(concatenate, projections, layer.order, repeat_kv))

    def _restore_order(self, hooks: Hooks) -> None:
        """Let attention get them in the order that it expects."""
        for layer, repeat_kv in zip(self.arch.layers, self.repeat_kv, strict=True):
            order = layer.query_order if repeat_kv > 1 else layer.order
            if order != "concatenated":
                (module,) = layer.projection_modules
                hooks.on_output(module, partial(restore, layer.projections, order, repeat_kv))
