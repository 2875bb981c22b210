"""The model without the heads and MLPs that a circuit does not use, as a Hugging Face checkpoint.

First their weights become zero, so that they write nothing. Then the checkpoint is made as small as a configuration of
the same class can say: with fewer layers, fewer heads in all of them, MLPs of one feature. Each step is taken only if
the class makes of the new configuration, as it comes back from a file, exactly the weights that are left.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from ..adapters import Architecture, Layer, bind, is_in_parts, linear_shape, sender_sites
from ..edges import check_one_stream
from ..errors import expected, known_arguments, warn
from ..files import check_folder, write_folder
from ..forward import Hooks, borrowed, logit_distance, logit_tolerance
from ..graph import Circuit
from ..modules.loans import gives_back
from ..modules.projections import feature_dim, is_at_hand
from ..ranks import together
from ..request import check_circuit
from ..texts.encoding import check_tokenizer

_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")  # what configurations call the number of an MLP's features
_PROMPT = (1, 16)  # of random tokens, on which the checkpoint is compared with the model


@together
@gives_back
@known_arguments
def export_model(model: nn.Module, circuit: Circuit, folder: str | os.PathLike[str], tokenizer: Any = None) -> Any:
    """Write a checkpoint of the model without the heads and MLPs that a circuit does not use.

    `from_pretrained` loads it without other code. It computes what the model does if each head and MLP on no path of
    the circuit writes zero, and reads and writes of all others are whole. That is not the circuit, of whose nodes it
    has every edge: `circuit.node_circuit()`, whose faithfulness under zero ablation says how much is kept.

    Layers without used nodes are left out. Of heads as many remain in every layer, with whole key/value groups, as the
    layer that uses most needs, if the configuration can say how many there are. All else that is not used stays, with
    weights of zero; MLPs stay with one feature if none is used. A bias that attention adds whatever its heads do
    is no head's, and stays. Where a norm follows attention, its scale is that of the heads that remain.

    Args:
        model: a Hugging Face model of a class of transformers, with plain weights; it is not changed.
        circuit: a circuit of this model.
        folder: where the checkpoint is written: a new or an empty folder.
        tokenizer: the model's, written with it.

    Returns:
        The smaller model, on the model's device and in its dtype. A warning says if it is not smaller.

    Raises:
        InputError: a folder with files; a circuit of another graph; a model in parts, offloaded, quantised or with
            adapters; one whose layers share modules or keys or do not add to the residual stream; or one that computes
            something else without these parts, as is tried on random prompts before anything is written.

    Example:
        >>> small = eap.export_model(model, circuit, "smaller", tokenizer)
        >>> kept = eap.evaluate(model, circuit.node_circuit(), data, ablation="zero").faithfulness
    """
    path = check_folder(folder)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    arch = bind(model)
    check_circuit(circuit, arch)
    check_one_stream("export", circuit.graph)
    _check(arch)
    kept = circuit.pruned().mask.any(1)
    checkpoint = _Checkpoint(arch, kept)
    checkpoint.silence()
    checkpoint.drop_layers()
    checkpoint.cut_heads()
    checkpoint.narrow_mlps()
    small = checkpoint.model(path)
    _compare(arch, kept, small)
    if len({sum(x.numel() for x in each.parameters()) for each in (small, arch.model)}) == 1:
        warn("export_model: the checkpoint is as large as the model; unused parts only have weights of zero.")

    def write(place: Path) -> None:
        small.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)

    write_folder(path, write)
    return small


def _check(arch: Architecture) -> None:
    """Refuse a model whose weights are not all its own class's, in memory and in layers of their own."""
    model, name = arch.model, type(arch.model).__name__
    if not type(model).__module__.startswith("transformers."):
        raise expected("model", "a class of transformers, which from_pretrained loads without other code", name)
    if is_in_parts(model) or any(x.is_meta for x in model.state_dict().values()):
        raise expected("model", "all weights in this process's memory", "some that are elsewhere")
    if arch.family.unshared is not None or any(layer.rewrites or not layer.caches for layer in arch.layers):
        wanted = "layers that are modules of their own, with keys of their own, whose blocks add to the residual stream"
        raise expected(name, wanted, "others, which cannot be left out")


def _compare(arch: Architecture, kept: Tensor, small: Any) -> None:
    """Refuse a checkpoint that does not compute what the model does if only some senders, bool [S], write."""
    drawn = torch.Generator().manual_seed(0)
    vocabulary = len(small.get_input_embeddings().weight)
    tokens = torch.randint(vocabulary, _PROMPT, generator=drawn).to(arch.device)
    with borrowed(arch.model), torch.no_grad(), Hooks(tokens=tokens.shape[1]) as hooks:
        for site in sender_sites(arch)[1:]:
            hooks.on_senders(site, partial(_only, kept[site.senders]))
        right, found = (each(input_ids=tokens).logits.flatten(0, -2) for each in (arch.model, small))
    apart = float(logit_distance(found, right).max())
    if not apart <= logit_tolerance(arch):
        wanted = "an architecture that computes the same without the parts that the circuit does not use"
        raise expected(type(small).__name__, wanted, f"logits that then differ by {apart:.2g} of their size")


def _only(kept: Tensor, x: Tensor) -> Tensor:
    """What some of a group's senders write, bool [n], of the values of all, [..., n·K]."""
    return x.unflatten(-1, (len(kept), -1)).masked_fill(~kept.to(x.device)[:, None], 0).flatten(-2)


@dataclass(frozen=True, eq=False)
class _Used:
    """What a circuit uses of a layer: of its heads, bool [H], and whether its MLP."""

    layer: Layer
    heads: Tensor
    mlp: bool

    @property
    def idle(self) -> bool:
        return not self.mlp and not bool(self.heads.any())


class _Checkpoint:
    """A configuration and its weights, by name; and the layers, whose modules' names are those in `weights`."""

    def __init__(self, arch: Architecture, kept: Tensor) -> None:
        self._original: Any = arch.model
        self._device = arch.device
        self.config: Any = copy.deepcopy(self._original.config)
        self.weights = {name: x.detach().to("cpu", copy=True) for name, x in self._original.state_dict().items()}
        self.names = {module: name for name, module in self._original.named_modules()}
        graph = arch.graph("kv")  # "query" has the same senders
        self.layers = [
            _Used(layer, kept[graph.head_senders(index)], not layer.bare and bool(kept[graph.mlp_sender(index)]))
            for index, layer in enumerate(arch.layers)
        ]
        if not self._fits(self.config, self.weights):
            wanted = "the weights that its configuration says (quantised ones dequantised, adapters merged)"
            raise expected(type(self._original).__name__, wanted, "others")

    def model(self, path: Path) -> Any:
        """The model that `from_pretrained` makes of these."""
        given = {}
        for name in ("attn_implementation", "experts_implementation"):
            if (value := getattr(self._original.config, f"_{name}", None)) is not None:
                given[name] = value
        small = type(self._original).from_pretrained(
            None, config=self.config, state_dict=dict(self.weights), dtype=self._original.dtype, **given
        )
        small.config.name_or_path = str(path)
        if small.can_generate():
            small.generation_config = copy.deepcopy(self._original.generation_config)
        return small.to(self._device)

    def silence(self) -> None:
        """What is not used writes zero."""
        for each in self.layers:
            layer = each.layer
            if not each.heads.all():
                if not is_at_hand(layer.out):
                    wanted = "a plain linear layer that writes what heads give"
                    raise expected(type(layer.module).__name__, wanted, type(layer.out).__name__)
                columns = (~each.heads).repeat_interleave(linear_shape(layer.out)[1] // layer.n_heads)
                weight = self.weights[f"{self.names[layer.out]}.weight"]
                weight.index_fill_(feature_dim(layer.out, out=False), columns.nonzero()[:, 0], 0)
            if not each.mlp and not layer.bare:
                # Without weights anywhere in it an MLP, or a mixture of them, gives zero, and so does a norm behind it.
                for part in (layer.mlp_in, *getattr(layer.mlp_out, "parts", (layer.mlp_out,))):
                    for name, _ in part.named_parameters():
                        self.weights[f"{self.names[part]}.{name}"].zero_()

    def drop_layers(self) -> None:
        """Leave out layers that are not used; what one adds whatever its heads do moves to the MLP before it.

        One of each kind stays: where a model mixes kinds, its class looks for each in its cache.
        """
        kept: list[int] = []
        moved: list[tuple[nn.Module, Tensor]] = []
        kinds = {type(each.layer.attention) for each in self.layers if not each.idle}
        for index, each in enumerate(self.layers):
            kind, fixed = type(each.layer.attention), _fixed(each.layer)
            place = _last_bias(self.layers[kept[-1]].layer) if kept else None
            if not each.idle or kind not in kinds or (fixed is not None and place is None):
                kept.append(index)
                kinds.add(kind)
            elif fixed is not None and place is not None:
                moved.append((place, fixed))
        if len(kept) == len(self.layers):
            return
        by_layer = {
            name: [value[index] for index in kept]
            for name, value in vars(self.config.get_text_config()).items()
            if "layer" in name and isinstance(value, (list, tuple)) and len(value) == len(self.layers)
        }
        config = self._changed({**by_layer, "num_hidden_layers": len(kept)})
        paths = [self.names[each.layer.module] for each in self.layers]
        place_of = {paths[index]: paths[place] for place, index in enumerate(kept)}

        def renamed(name: str) -> str | None:
            """The name in a model of the layers that are kept; None: it is in none."""
            path = next((path for path in paths if f"{name}.".startswith(f"{path}.")), None)
            if path is None:
                return name
            return place_of[path] + name[len(path) :] if path in place_of else None

        weights = {new: x for name, x in self.weights.items() if (new := renamed(name)) is not None}
        names = {module: new for module, name in self.names.items() if (new := renamed(name)) is not None}
        for module, fixed in moved:
            bias = f"{names[module]}.bias"
            weights[bias] = weights[bias] + fixed.to(weights[bias])
        if self._take(config, weights):
            self.names, self.layers = names, [self.layers[index] for index in kept]

    def cut_heads(self) -> None:
        """Leave as many key/value groups in every layer as the one that uses most of them needs, and as many query
        heads in every group."""
        first = self.layers[0].layer
        if any(not _in_heads(each.layer, first.n_heads, first.groups) for each in self.layers):
            return
        used = [each.heads.view(-1, first.groups) for each in self.layers]  # [G, H / G] each
        least = max(int(x.any(1).sum()) for x in used), max(int(x.sum(1).max()) for x in used)
        if least == used[0].shape:
            return
        sizes = product(*(range(max(1, n), most + 1) for n, most in zip(least, used[0].shape, strict=True)))
        for groups, each_has in sorted(sizes, key=math.prod):
            fields = {"num_attention_heads": groups * each_has, "num_key_value_heads": groups}
            config = self._changed({**fields, "head_dim": linear_shape(first.out)[1] // first.n_heads})
            if self._shapes(config) is not None:  # many want a number of heads that divides another
                self._take(config, self._cut(used, groups, each_has))
                return

    def _cut(self, used: list[Tensor], n_groups: int, each_has: int) -> dict[str, Tensor]:
        """The weights with this many groups of this many query heads, those that are used among them."""
        weights = dict(self.weights)
        for layer, x in ((each.layer, x) for each, x in zip(self.layers, used, strict=True)):
            groups = _first(x.any(1), n_groups)
            heads = (groups[:, None] * layer.groups + _first(x[groups], each_has)).flatten()
            for module, projections in layer.projection_modules.items():
                every = torch.arange(linear_shape(module)[0])
                rows = [
                    every[p.rows].view(p.n_heads, -1)[heads if p.n_heads == layer.n_heads else groups].flatten()
                    for p in projections.values()
                ]
                # In the order that they have there, whatever it is.
                self._pick(weights, module, torch.cat(rows).sort().values, out=True)
            columns = torch.arange(linear_shape(layer.out)[1]).view(layer.n_heads, -1)[heads].flatten()
            self._pick(weights, layer.out, columns, out=False)
        return weights

    def _pick(self, weights: dict[str, Tensor], module: nn.Module, features: Tensor, out: bool) -> None:
        """Leave only some of the features that come out of a linear module, or that go in."""
        weight, bias = (f"{self.names[module]}.{name}" for name in ("weight", "bias"))
        weights[weight] = weights[weight].index_select(feature_dim(module, out), features)
        if out and bias in weights:
            weights[bias] = weights[bias][features]

    def narrow_mlps(self) -> None:
        """Leave one feature in the MLPs, or a few in experts, if none is used."""
        if any(each.mlp for each in self.layers):
            return
        text = self.config.get_text_config()
        # The product for all experts at once wants rows of whole 16 bytes.
        experts = [x.element_size() for x in self.weights.values() if x.ndim == 3]
        few = 16 // min(experts) if experts else 1
        config = self._changed({name: few for name in _WIDTHS if hasattr(text, name)})
        shapes = self._shapes(config) or {}
        weights = {
            name: x.new_zeros(shapes[name]) if name in shapes and not x.any() else x for name, x in self.weights.items()
        }
        self._take(config, weights)

    def _changed(self, fields: dict[str, Any]) -> Any:
        """A copy of the configuration with other values; None if it does not take them."""
        config = copy.deepcopy(self.config)
        try:
            for name, value in fields.items():
                setattr(config.get_text_config(), name, value)
        except Exception:  # some compute a field, and some check every value
            return None
        return config

    def _take(self, config: Any, weights: dict[str, Tensor]) -> bool:
        """Take a smaller checkpoint, if the model's class has a place for it."""
        fits = self._fits(config, weights)
        if fits:
            self.config, self.weights = config, weights
        return fits

    def _fits(self, config: Any, weights: dict[str, Tensor]) -> bool:
        return self._shapes(config) == {name: x.shape for name, x in weights.items()}

    def _shapes(self, config: Any) -> dict[str, Size] | None:
        """Of the weights of a model made of a configuration as it comes back from a file; None if none is made."""
        try:
            again = type(config).from_dict(config.to_dict())
            with torch.device("meta"):
                return {name: x.shape for name, x in type(self._original)(again).state_dict().items()}
        except Exception:  # whatever a class may raise of what it has no place for
            return None


def _fixed(layer: Layer) -> Tensor | None:
    """What attention adds to the residual stream whatever its heads do, unless that is nothing."""
    norm = layer.post_norm
    bias: Tensor | None = getattr(layer.out, "bias", None) if norm is None else norm.bias
    return bias.detach().cpu() if bias is not None and bool(bias.any()) else None


def _last_bias(layer: Layer) -> nn.Module | None:
    """The module whose bias is added to what the MLP writes, if that is all that it does."""
    width = linear_shape(layer.out)[0]
    found = [part for part in layer.mlp_out.modules() if is_at_hand(part) and linear_shape(part)[0] == width]
    return found[0] if len(found) == 1 and found[0].bias is not None else None


def _in_heads(layer: Layer, heads: int, groups: int) -> bool:
    """Has a layer so many query heads in each group, all of whose weights are each head's own, or each group's?"""
    if not heads or (layer.n_heads, layer.groups) != (heads, groups) or layer.inner_norm or layer.mixes_heads:
        return False
    return is_at_hand(layer.out) and all(
        is_at_hand(module)
        and sum(p.width for p in projections.values()) == linear_shape(module)[0]
        and all(p.n_heads in (heads, heads // groups) for p in projections.values())
        for module, projections in layer.projection_modules.items()
    )


def _first(wanted: Tensor, n: int) -> Tensor:
    """n places along the last dimension of flags, those of True first, in order."""
    return wanted.long().argsort(dim=-1, descending=True, stable=True)[..., :n].sort(-1).values
