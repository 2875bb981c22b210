"""A family's table bound to one model: its modules and weights under canonical names.

Nothing is copied at binding; weights are read in canonical layout when they are asked for.
Shape letters: H query heads, G key/value heads, K head dim, D d_model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..edges import Reads
from ..errors import expected
from ..families import Family, is_built_in
from ..graph import Graph, Heads
from ..modules.norms import Norm
from ..modules.offloading import device_of, is_offloaded, read
from ..modules.parts import Shares, Split, add_up, computes_in_parts, own_features, run_whole, team
from ..modules.projections import Order, Projections, Together, Weight, linear_shape
from ..ranks import Team
from .classes import runs_tested_code
from .hooks_of_others import foreign_hooks


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer's sites."""

    module: nn.Module
    attention_norm: Norm
    mlp_norm: Norm
    n_heads: int
    groups: int  # query heads per key/value head; 1 for heads without
    keys: int | None  # the index of the layer whose keys and values the heads attend to; None: this one
    projections: Projections  # what the heads read, by name: of attention "q", "k" and "v", and perhaps more
    order: Order  # of the features of one module that computes several of them
    query_order: Order  # the order in which attention takes them with a key and a value for each query head
    attention: nn.Module
    out: nn.Module  # its input is the heads' values side by side
    post_norm: Norm | None  # between attention's output and the residual stream
    mlp_in: nn.Module
    mlp_out: nn.Module  # its output, times `scale`, is added to the residual stream
    scale: float
    rewrites: bool  # what `mlp_out` gives takes the place of the residual stream, and the MLP writes the change
    k_norm: nn.Module | None  # a norm of the keys that has its own weights for each key/value head
    v_norm: bool  # a norm of each value
    inner_norm: bool  # of all heads' values together, before `out`
    ungrouped: tuple[tuple[str, object], ...]  # attributes of `attention` that make it take k and v per query head
    # No layer, but what the module of the one before makes of per-layer embeddings, or pictures write behind it.
    per_layer: bool = False
    bare: bool = False  # there is no MLP: nothing looks at `mlp_norm`, `mlp_in` and `mlp_out`
    beside: bool = False  # no layer, but heads beside those of the one before
    heads_scale: float = 1.0  # what heads write is also multiplied by this
    memory: Norm | None = None  # of cross-attention: through which k and v read the encoder's residual stream

    @property
    def projection_modules(self) -> dict[nn.Module, Projections]:
        """The projections by the module that computes them."""
        modules: dict[nn.Module, Projections] = {}
        for letter, projection in self.projections.items():
            modules.setdefault(projection.module, {})[letter] = projection
        return modules

    @cached_property
    def device(self) -> torch.device:
        """The device on which the whole layer computes."""
        return device_of(self.module)

    @property
    def caches(self) -> bool:
        """May the model's cache hold something of it?"""
        return self.keys is None and not self.per_layer and not self.beside

    @property
    def reads(self) -> Reads | None:
        """The graph's `reads` of the layer."""
        if list(self.projections) == ["q", "k", "v"]:
            return None
        return tuple((name, projection.n_heads) for name, projection in self.projections.items())

    @property
    def mlp_runs_whole(self) -> bool:
        """Does the MLP run at all tokens of all rows, as the layer itself puts together what several modules give?"""
        return isinstance(self.mlp_in, Together)

    def read_through(self, name: str) -> Norm:
        """The norm in front of a receiver: one of `projections`, or "mlp"."""
        if name == "mlp":
            return self.mlp_norm
        return self.memory if self.memory is not None and name in ("k", "v") else self.attention_norm

    def check_heads(self, ranks: int) -> None:
        """Raises InputError if so many tensor parallel ranks cannot have equally many heads each."""
        counts = [self.n_heads, *(each.n_heads for name, each in self.projections.items() if name in ("k", "v"))]
        if any(heads % ranks for heads in counts):
            raise expected(f"{type(self.module).__name__}'s heads", f"as many on each of {ranks} ranks", min(counts))

    @property
    def mixes_heads(self) -> bool:
        """Does one norm of all heads' queries or keys together make the heads depend on each other?"""
        weight = getattr(self.k_norm, "weight", None)
        return weight is not None and weight.dim() == 1 and weight.numel() == self.projections["k"].width

    def written(self, z: Tensor) -> Tensor:
        """The heads' values [..., H·K] as `out_weight` expects them.

        A norm after attention scales all heads' contributions by its r in this very run, so the values carry r.
        """
        if self.post_norm is None:
            return z
        parts = (z[..., some] @ weight.T.to(z.dtype) for some, weight in self._out_weight.in_turn())
        return z * self.post_norm.scale(reduce(torch.add, parts))[..., None]

    def out_weight(self, dtype: torch.dtype, features: slice = slice(None)) -> Tensor:
        """Each head's linear map from `written` to the residual stream, [H, K, D], or to some of its D features."""
        if self.post_norm is not None and self.post_norm.centred:
            return self._by_head(self._out_weight.at(), dtype)[..., features]
        return self._by_head(self._out_weight.at(features), dtype, features)

    def out_weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(Heads, their `out_weight`): all at once, or of a tensor parallel model one rank's after another's."""
        width = linear_shape(self.out)[1] // self.n_heads
        for some, weight in self._out_weight.in_turn():
            yield slice(some.start // width, some.stop // width), self._by_head(weight, dtype)

    def _by_head(self, weight: Tensor, dtype: torch.dtype, features: slice = slice(None)) -> Tensor:
        """`out_weight` from the projection's own weight [features, heads' features]."""
        norm = self.post_norm
        # Rounded once, where there is more to it than the projection.
        scale = self.scale * self.heads_scale
        weight = weight.to(dtype if norm is None and scale == 1 else torch.promote_types(dtype, torch.float32)).T
        weight = weight if norm is None else norm.forwards(weight, features)
        weight = weight if scale == 1 else weight * scale
        return weight.to(dtype).unflatten(0, (-1, linear_shape(self.out)[1] // self.n_heads))

    @cached_property
    def _out_weight(self) -> Weight:
        return Weight(self.out, 0)

    def per_query_head(self) -> list[tuple[nn.Module, str, object]]:
        """(module, attribute, value) to set so that attention takes one key and one value per query head."""
        changes: list[tuple[nn.Module, str, object]] = [(self.attention, *item) for item in self.ungrouped]
        if self.k_norm is not None:
            (name,) = [name for name, child in self.attention.named_children() if child is self.k_norm]
            changes.append((self.attention, name, self._repeat_k_norm(self.k_norm)))
        return changes

    def _repeat_k_norm(self, norm: nn.Module) -> nn.Module:
        """A copy of a norm of the keys in which each query head has the weights of its key head."""
        twin, keys = copy.copy(norm), self.projections["k"]
        for name in ("_hf_hook", "forward"):  # they fetch offloaded weights
            vars(twin).pop(name, None)
        twin._parameters = dict(norm._parameters)
        for name, _ in norm.named_parameters(recurse=False):
            weight = read(norm, name)
            assert weight is not None
            if weight.numel() == keys.width:
                shape = (self.n_heads, *weight.shape[1:]) if weight.dim() > 1 else (-1,)
                weight = weight.view(keys.n_heads, -1).repeat_interleave(self.groups, 0).reshape(shape)
            twin._parameters[name] = nn.Parameter(weight, requires_grad=False)
        twin._modules = dict(norm._modules)
        for name, child in norm.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == keys.n_heads:
                twin._modules[name] = nn.ModuleList([child[head // self.groups] for head in range(self.n_heads)])
        # Where there is one key head, weights are of its width in either case.
        return _ByWidth(norm, twin, keys.width) if keys.n_heads == 1 else twin


class _ByWidth(nn.Module):
    """A norm of each key by itself; or, of all keys together, its `twin` for a key for each query head."""

    def __init__(self, norm: nn.Module, twin: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.twin, self._width = norm, twin, width

    def forward(self, keys: Tensor) -> Tensor:
        found: Tensor = (self.norm if keys.shape[-1] == self._width else self.twin)(keys)
        return found


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model's sites under canonical names.

    `device` holds the embeddings, prompts, logits and scores; layers may compute on other devices. `planned_for` is the
    kind of device for which a run is planned, if not for this one.
    """

    model: nn.Module
    family: Family
    layers: list[Layer]
    final_norm: Norm
    parallel: bool
    embedding_norm: nn.Module | None  # between the token embeddings and the residual stream
    embedding_scale: float
    given_scale: float  # what the model multiplies embeddings by that it is given
    per_layer: tuple[Any, nn.Module] | None  # what gives per-layer embeddings, and what makes their part of the others
    causal: bool  # does no token see later ones?
    classifies: bool  # logits are one row of classes for each prompt
    head: nn.Module | None  # gives each token's logits; None if that is not known, or logits are of whole prompts
    device: torch.device
    dtype: torch.dtype
    planned_for: str | None = None
    around: Any = None  # the PEFT model that it was handed in as, whose forward may do more; None: it was not
    picks: bool = True  # are the logits that the model gives those of its head, each token's by itself?
    after_norms: bool = True  # is what leaves a norm after attention what heads contribute, and not what enters it?
    encoder: int = 0  # how many of the layers, the first ones, are an encoder's; 0: it is no encoder-decoder

    @cached_property
    def stacked(self) -> list[Layer]:
        """What pictures write behind the first layers, if anything (`Stacked`)."""
        return [layer for layer in self.layers if layer.per_layer and layer.rewrites]

    @cached_property
    def team(self) -> Team:
        """Which ranks run each pass together: one, or those that have parts of the model's weights."""
        return team(self.model)

    @cached_property
    def devices(self) -> list[torch.device]:
        """Every device on which the model computes, without repetition."""
        found = [self.device, *(layer.device for layer in self.layers), self.final_norm.device]
        return list(dict.fromkeys(found))

    @property
    def device_kind(self) -> str:
        """ "cpu" or "cuda": where it runs, or would."""
        return self.planned_for or self.device.type

    @cached_property
    def hooked(self) -> bool:
        """Has the model hooks of others? They may go by a token's place. So every prompt runs as in a plain run: whole,
        beside others of its length, through every module."""
        return any(map(foreign_hooks, self.model.modules()))

    @property
    def tested(self) -> bool:
        """Is all that it runs, and its table, what the package's own tests run?"""
        return is_built_in(self.family) and not self.hooked and self.around is None and runs_tested_code(self.model)

    @property
    def picks_logits(self) -> bool:
        """Can some tokens' logits be computed by themselves? Only a plain linear layer's can, which in encoder-decoders
        a bias may follow."""
        return self.picks and not self.encoder and type(self.head) is nn.Linear and not is_offloaded(self.head)

    def vocabulary(self, decoder: bool = False) -> int:
        """How many token embeddings the model has, or its decoder, which may have its own: of several tables, those of
        the smallest, as per-layer embeddings may be fewer."""
        model: Any = self.model
        tables = [(model.get_decoder() if decoder else model).get_input_embeddings()]
        if self.per_layer is not None:
            tables += [each for each in self.per_layer[0].children() if isinstance(each, nn.Embedding)]
        return min(len(table.weight) for table in tables)

    @property
    def predicted(self) -> int:
        """How many tokens, or classes, have logits; some models embed more, or fewer."""
        return int(getattr(self.head, "out_features", 0)) or self.vocabulary(decoder=self.encoder > 0)

    @property
    def d_model(self) -> int:
        return linear_shape(self.layers[0].out)[0]

    @cached_property
    def features(self) -> slice:
        """The residual stream's features in which this rank contracts senders and receivers: all of them, or of a
        tensor parallel model a part."""
        return own_features(self.layers[0].out, self.d_model)

    @property
    def width(self) -> int:
        """How many `features` there are."""
        return len(range(self.d_model)[self.features])

    @cached_property
    def shares(self) -> Shares:
        """What ranks send each other where circuits store and read this rank's `features`."""
        return Shares(None if self.features == slice(None) else self.layers[0].out)

    def add_up(self, scores: Tensor) -> None:
        """Let sums over this rank's `features` be sums over all of them."""
        if self.features != slice(None):
            add_up(self.layers[0].out, scores)

    def splits(self, modules: set[nn.Module]) -> Iterator[tuple[nn.Module, bool, Split]]:
        """(module, whether it is divided by heads in its inputs or in its outputs, what puts these together) of those
        among some modules that are."""
        for layer in self.layers if self.team.size > 1 else ():
            for module in filter(computes_in_parts, modules.intersection([layer.out, *layer.projection_modules])):
                name = f"{type(module).__name__} of {type(layer.attention).__name__}"
                yield module, module is layer.out, Split(module, linear_shape(module)[module is layer.out], name)

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype in which scores are accumulated: float32, or float64 for a float64 model."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def contraction_dtype(self) -> torch.dtype:
        """The dtype in which senders are multiplied with receivers; sums are in `accumulate` all the same.

        For a low-precision model on a GPU it is bfloat16, which tensor cores multiply an order of magnitude faster than
        float32. Rounding to it changes scores by a twentieth of what running the model in bfloat16 does (the demo's
        on IOI: 0.1 % against 2.1 %). It is never float16, as gradients leave its range.
        """
        low = self.dtype in (torch.bfloat16, torch.float16)
        return torch.bfloat16 if low and self.device_kind == "cuda" else self.accumulate

    def graph(self, heads: Heads) -> Graph:
        return Graph(
            tuple(layer.n_heads for layer in self.layers),
            tuple(layer.n_heads // layer.groups for layer in self.layers),
            self.d_model,
            parallel=self.parallel,
            heads=heads,
            reads=tuple(layer.reads for layer in self.layers),
            keys=tuple(index if layer.keys is None else layer.keys for index, layer in enumerate(self.layers)),
            per_layer=tuple(layer.per_layer for layer in self.layers),
            encoder=self.encoder,
            mlps=tuple(not layer.bare for layer in self.layers),
            beside=tuple(layer.beside for layer in self.layers),
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """The token embeddings' contribution to the residual stream: int64 [E, T] -> [E, T, D]."""
        model: Any = self.model
        x = run_whole(model.get_input_embeddings(), tokens)
        if self.embedding_norm is not None:
            x = run_whole(self.embedding_norm, x)
        return x if self.embedding_scale == 1 else x * self.embedding_scale

    @cached_property
    def keeps_states(self) -> bool:
        """Does the cache that transformers makes for the model hold states, not only keys and values?"""
        model: Any = self.model
        try:
            layers = DynamicCache(config=model.config).layers
        except Exception:  # of a configuration that says too little
            return False
        return any(hasattr(layer, "recurrent_states") for layer in layers)

    def before_post_norms(self) -> Architecture:
        """The published EAP-IG package's definition: a head's contribution is what enters a norm after attention."""
        return replace(self, after_norms=False, layers=[replace(layer, post_norm=None) for layer in self.layers])

    @cached_property
    def norms(self) -> list[Norm]:
        """Every norm that receivers read through, in order of depth, without repetition."""
        names = ((layer, name) for layer in self.layers for name in (*layer.projections, "mlp"))
        return list(dict.fromkeys([*(layer.read_through(name) for layer, name in names), self.final_norm]))
