"""Find the sites of a model by its family's table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import expected, refuse_default_device
from ..families import ENCODER_DECODERS, FAMILIES, Factor, Family, Mixer, Paths, family_of
from ..modules.norms import Kinds, Norm, is_norm
from ..modules.offloading import device_of, devices_of
from ..modules.parts import is_in_parts, parts_of, unknown_parts
from ..modules.projections import Place, Projection, Projections, Together, linear_shape, rows_of
from ..ranks import form_team
from .architecture import Architecture, Layer
from .between_layers import keys_of, per_layer_part, scale_of
from .classes import classifies_prompts, head_of, is_own, may_fit
from .wrappers import unwrapped

# Attributes in which attention modules keep the query heads per key/value head, and the number of key/value heads.
_GROUPS, _KV_HEADS = ("num_key_value_groups",), ("num_key_value_heads", "num_kv_heads")
_HEADS = "a model with its head, as AutoModelForCausalLM, -MaskedLM, -Seq2SeqLM or -SequenceClassification loads it"
_HEAD_DIM = ("head_dim", "head_size")


def bind(model: nn.Module, family: Family | None = None) -> Architecture:
    """Find the sites of a Hugging Face language model (causal, masked, encoder-decoder) or of a classifier of prompts.

    Args:
        model: the model.
        family: its table; by default the one registered for its `config.model_type`.

    Raises:
        InputError: another object, an unsupported architecture, a missing head or site, or a layer on several devices.
    """
    refuse_default_device()
    model = unwrapped(model)
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or model_type is None:
        raise expected("model", "a Hugging Face language model", type(model).__name__)
    both = bool(getattr(config, "is_encoder_decoder", False))
    family = family or family_of(model_type, both)
    if family is None and both:
        wanted = f"an encoder-decoder among {', '.join(sorted(ENCODER_DECODERS))}"
        raise expected("model", wanted, f"{model_type!r} ({type(model).__name__})")
    if family is None:
        known = f"an architecture among {', '.join(sorted(FAMILIES))}, or a table of its own (eap_circuits.discover)"
        wanted = known if may_fit(model) else _HEADS
        raise expected("model", wanted, f"{model_type!r} ({type(model).__name__})")
    if Version(transformers.__version__) < Version(family.since):
        wanted = f"transformers {family.since} or later for {type(model).__name__}"
        raise expected("model", wanted, transformers.__version__)
    # Other packages' models may keep their head elsewhere; what they give is checked in their first run.
    lacks = is_own(model) and not classifies_prompts(model) and head_of(model) is None
    if lacks or (family.decoder is not None and classifies_prompts(model)):
        raise expected(
            type(model).__name__, _HEADS, "a model without one" if lacks else "an encoder-decoder that classifies"
        )
    for name, value in family.requires.items():
        if (found := _configured(config, name, value)) != value:
            raise expected(f"{type(model).__name__}.config.{name}", repr(value), repr(found))
    _check_parts(model)
    if is_in_parts(model):
        if family.decoder is not None:
            raise expected(type(model).__name__, "whole weights of an encoder-decoder", "parts of them on every rank")
        form_team()
    if torch.device("meta") in devices_of(model):
        raise expected("model", "all weights", "some on the device meta, where only eap.plan works")
    if any(weight.is_inference() for weight in model.parameters()):
        raise expected("model", "weights made outside of torch.inference_mode", "inference tensors")
    if family.unshared is not None:
        model = family.unshared(model)
    return _Binder(model, model.config, family).architecture()


def _check_parts(model: nn.Module) -> None:
    """Refuse weights in parts on several ranks, except those of `fully_shard` and of transformers' plans."""
    name = type(model).__name__
    kinds = {type(part).__name__ for part in model.modules()} & {"FullyShardedDataParallel"}
    found = next(iter(kinds), None) or unknown_parts(model)
    if found:
        wanted = "weights that are whole, on GPUs by device_map, or in parts by fully_shard (FSDP2) or a tp_plan"
        raise expected(name, wanted, found)


class _Binder:
    def __init__(self, model: Any, config: Any, family: Family) -> None:
        self.model, self.config, self.family = model, config, family
        self.kinds = Kinds()
        self.norms: dict[nn.Module, Norm] = {}  # one for each module, as runs look up norms by identity
        self.layers: list[Layer] = []  # so far
        self.unit = 1.0  # what these have multiplied the residual stream by

    def architecture(self) -> Architecture:
        family, layers = self.family, self.layers
        for layer in self._modules():
            layers.append(self._layer(layer))
            layers[-1].check_heads(parts_of(layers[-1].out))
            if family.per_layer is not None and _maybe(layer, family.per_layer[0]) is not None:
                first, last = (_site(layer, path) for path in family.per_layer)
                layers.append(per_layer_part(layers[-1], self._reads(layer, None, first, self._width), first, last))
            self.unit *= scale_of(layer, family.layer_scale)
        embed, width = self.model.get_input_embeddings(), linear_shape(layers[0].out)[0]
        said, classifies, head = family.causal, classifies_prompts(self.model), head_of(self.model)
        causal = said if isinstance(said, bool) else bool(getattr(self.config, said, False))
        if causal and classifies and head is None:
            wanted = "a classifier that reads the last token (its `score`), or whose tokens all see each other"
            raise expected(type(self.model).__name__, wanted, "another")
        if getattr(embed, "embedding_dim", width) != width and not family.placed:
            raise expected(
                f"{type(self.model).__name__}'s token embeddings", f"{width} features, the layers'", embed.embedding_dim
            )
        embedding_norm = family.embedding_norm
        inputs = family.per_layer_inputs
        holder = inputs.rpartition(".")[0]
        bound = Architecture(
            model=self.model,
            family=family,
            layers=layers,
            final_norm=self._final_norm(width, layers[-1].module),
            parallel=self._parallel(),
            embedding_norm=None if embedding_norm is None else _site(self.model, embedding_norm),
            embedding_scale=self._factor(family.embedding_multiplier),
            per_layer=(_site(self.model, holder), _site(self.model, inputs)) if layers[-1].per_layer else None,
            causal=causal,
            classifies=classifies,
            head=head,
            device=device_of(embed),
            dtype=next(p.dtype for p in self.model.parameters() if p.is_floating_point()),
        )
        return bound if family.decoder is None else self._with_decoder(bound, *family.decoder)

    def _with_decoder(self, encoder: Architecture, attention: Family, cross: Family) -> Architecture:
        """The encoder's architecture and the decoder's layers. Each of these becomes two: self- and cross-attention."""
        parts = [_Binder(self.model, self.config, part) for part in (attention, cross)]
        for part in parts:
            part.norms = self.norms
        pairs = ([part._layer(module) for part in parts] for module in parts[0]._modules())
        layers = [each for own, other in pairs for each in (own, replace(other, memory=encoder.final_norm))]
        return replace(
            encoder,
            layers=[*encoder.layers, *layers],
            final_norm=parts[1]._final_norm(encoder.d_model, layers[-1].module),
            encoder=len(encoder.layers),
        )

    def _modules(self) -> list[nn.Module]:
        """The model's layers, of an encoder-decoder the encoder's."""
        found = list(_site(self.model, self.family.layers).children())
        if not found:
            raise expected(f"{type(self.model).__name__}.{self.family.layers}", "layers", "none")
        return found

    @property
    def _width(self) -> int:
        embed: Any = self.model.get_input_embeddings()
        return int(embed.weight.shape[1])

    def _parallel(self) -> bool:
        said = self.family.parallel
        return said if isinstance(said, bool) else any(bool(getattr(self.config, name, False)) for name in said)

    def _factor(self, said: Factor | None) -> float:
        if said is None:
            return 1.0
        return float(
            getattr(self.config, said) if isinstance(said, str) else said(self.model) if callable(said) else said
        )

    def _norm(self, root: nn.Module, paths: Paths, width: int, layer: nn.Module, unit: float) -> Norm:
        module = _site(root, paths)
        return self.norms.setdefault(module, Norm(module, self.kinds(module, width), layer, unit))

    def _final_norm(self, width: int, layer: nn.Module) -> Norm:
        if not self.family.final_norm:
            return Norm(Place(layer, False, width), None, layer, self.unit)
        module = _site(self.model, self.family.final_norm)
        if is_norm(module, width):
            return self._norm(self.model, self.family.final_norm, width, layer, self.unit)
        return Norm(Place(module, True, width), None, layer, self.unit)

    def _layer(self, layer: nn.Module) -> Layer:
        family = self.family
        devices = devices_of(layer)
        if len(devices) > 1:
            raise expected(type(layer).__name__, "all of a layer on one device", ", ".join(sorted(map(str, devices))))
        attention, out, n_heads, projections = self._mixer(layer)
        width = linear_shape(out)[0]
        fused = len({p.module for p in projections.values()}) == 1 < len(projections)
        if projections:
            norm = self._reads(layer, family.attention_norm, next(iter(projections.values())).module, width)
        mlp_norm, mlp_in, mlp_out = (norm, layer, layer) if family.mlp is None else self._mlp(layer, width, family.mlp)
        if not projections:
            norm = mlp_norm
        keys = keys_of(self.layers, attention, projections, family.key_sharing)
        attended = projections if keys is None else self.layers[keys].projections
        kept = dict.fromkeys(_GROUPS, 1) | dict.fromkeys(_KV_HEADS, n_heads)
        ungrouped = {name: value for name, value in kept.items() if hasattr(attention, name)}
        post = family.attention_post_norm
        if post is not None and getattr(out, "bias", None) is not None:
            raise expected(f"{type(layer).__name__}.{family.out}", "no bias, as a norm follows it", "a bias")
        return Layer(
            module=layer,
            attention_norm=norm,
            mlp_norm=mlp_norm,
            n_heads=n_heads,
            groups=n_heads // attended["k"].n_heads if "k" in attended else 1,
            keys=keys,
            projections=projections,
            order=family.fused if fused else "concatenated",
            query_order=(family.fused_by_query or family.fused) if fused else "concatenated",
            attention=attention,
            out=out,
            post_norm=None if post is None else self._norm(layer, post, width, layer, 1.0),
            mlp_in=mlp_in,
            mlp_out=mlp_out,
            scale=self._factor(family.residual_multiplier) / self.unit,
            rewrites=family.rewrites,
            k_norm=_maybe(layer, family.k_norm),
            v_norm=_maybe(layer, family.v_norm) is not None,
            inner_norm=_maybe(layer, family.inner_norm) is not None,
            ungrouped=tuple(
                {**ungrouped, **{k: v(layer) if callable(v) else v for k, v in family.ungrouped.items()}}.items()
            ),
            bare=family.mlp is None,
        )

    def _mlp(self, layer: nn.Module, width: int, path: str | tuple[str, str]) -> tuple[Norm, nn.Module, nn.Module]:
        """The MLP's norm, and the modules at whose input it reads and at whose output it writes."""
        family = self.family
        first, last = (path, path) if isinstance(path, str) else path
        beside = _maybe(layer, family.beside)
        if beside is None or family.mlp_post_norm is not None:
            mlp_in = _site(layer, first)
            norm = self._reads(layer, family.mlp_norm, mlp_in, width)
            if beside is not None:
                mlp_in = Place(norm.module, False, width)
            return norm, mlp_in, _site(layer, family.mlp_post_norm or last)
        parts = [part for part in (_maybe(layer, last), beside) if part is not None]
        norm = self._reads(layer, family.mlp_norm, beside, width)
        if len(parts) == 1:
            return norm, beside, beside
        return norm, Place(norm.module, False, width), Together(parts)

    def _mixer(self, layer: nn.Module) -> tuple[nn.Module, Any, int, Projections]:
        """The module that mixes tokens in a layer, its output projection, how many heads it has, and what they read."""
        family = self.family
        usual = all(path and _maybe(layer, path) for path in (family.q, family.k, family.v, family.out))
        for mixer in () if usual else sorted(family.mixers, key=lambda one: -_present(layer, one)):
            first, last = (mixer.module, mixer.module) if isinstance(mixer.module, str) else mixer.module
            if mixer.out is None and _maybe(layer, first) is not None:
                return self._whole(_site(layer, first), _site(layer, last))
            if mixer.out is not None and _maybe(layer, mixer.out) is not None and _present(layer, mixer):
                return self._with_heads(layer, mixer)
        if not family.out:  # the layer is one node
            return layer, Place(layer, True, self._width, 0), 0, {}
        out = _linear(layer, family.out)
        attention = _site(layer, family.out.rpartition(".")[0])
        projections = self._projections(layer, attention, linear_shape(out)[1])
        heads = projections["q"].n_heads
        for name, path in family.more.items():
            if _maybe(layer, path) is not None:
                projections[name] = self._evenly(layer, path, heads)
        return attention, out, heads, projections

    def _whole(self, first: nn.Module, last: nn.Module) -> tuple[nn.Module, Any, int, Projections]:
        width = self._width
        reads = Projection(Place(first, True, width), slice(0, width), 1, width)
        return first, Place(last, False, width), 1, {"in": reads}

    def _with_heads(self, layer: nn.Module, mixer: Mixer) -> tuple[nn.Module, Any, int, Projections]:
        assert mixer.out is not None
        out, module = _linear(layer, mixer.out), _site(layer, mixer.out.rpartition(".")[0])
        found = [x for name in mixer.heads for x in (getattr(module, name, None), _configured(self.config, name))]
        heads = next((n for n in found if isinstance(n, int)), 1)
        if linear_shape(out)[1] % heads:
            raise expected(
                f"{type(layer).__name__}.{mixer.out}", f"input features for {heads} heads", linear_shape(out)[1]
            )
        projections: Projections = {}
        for (name, path), count in [
            *((item, 1) for item in mixer.reads.items()),
            *((item, heads) for item in mixer.by_head.items()),
        ]:
            if _maybe(layer, path) is not None:
                projections[name] = self._evenly(layer, path, count)
        return module, out, heads, projections

    def _evenly(self, layer: nn.Module, path: str, heads: int) -> Projection:
        """A projection whose features are divided evenly among the heads."""
        module = _linear(layer, path)
        features = linear_shape(module)[0]
        if features % heads:
            raise expected(f"{type(layer).__name__}.{path}", f"output features for {heads} heads", features)
        return Projection(module, slice(0, features), heads, features // heads)

    def _reads(self, layer: nn.Module, norm: Paths | None, reader: nn.Module, width: int) -> Norm:
        if norm is not None and not isinstance(_site(layer, norm), nn.Identity):
            return self._norm(layer, norm, width, layer, self.unit)
        return self.norms.setdefault(reader, Norm(reader, None, layer, self.unit))

    def _projections(self, layer: nn.Module, attention: nn.Module, values: int) -> Projections:
        """q, k and v of a layer, where q may also give a gate for every query.

        `values` is the number of features of all heads' values together.
        """
        family, name = self.family, type(layer).__name__
        head_dim = self._head_dim(attention)
        heads = values // head_dim
        if heads * head_dim != values:
            raise expected(f"{name}.{family.out}", f"heads of {head_dim} input features", values)
        modules = [_linear(layer, path) for path in (family.q, family.k, family.v)]
        features = [linear_shape(module)[0] for module in modules]
        fused = family.q == family.k == family.v
        kv_width = (features[0] - values) // 2 if fused else features[1]
        kv = kv_width // head_dim
        queries = 2 * values if not fused and features[0] == 2 * values else values
        right = [values + 2 * kv * head_dim] * 3 if fused else [queries, kv * head_dim, kv * head_dim]
        fits = kv > 0 and heads % kv == 0
        for path, found, wanted in zip((family.q, family.k, family.v), features, right, strict=True):
            if found != wanted or (path == family.k and not fits):
                raise expected(
                    f"{name}.{path}",
                    f"output features for {heads} query heads of {head_dim} and key/value heads that divide them",
                    found,
                )
        rows = rows_of(family.fused, heads, kv, head_dim) if fused else {}
        return {
            name: Projection(module, rows.get(name, slice(0, width)), count, width // count if not fused else head_dim)
            for name, module, width, count in zip("qkv", modules, features, (heads, kv, kv), strict=True)
        }

    def _head_dim(self, attention: nn.Module) -> int:
        for name in _HEAD_DIM:
            if isinstance(getattr(attention, name, None), int):
                return int(getattr(attention, name))
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _configured(config: Any, name: str, default: object = None) -> Any:
    """What a configuration says, or that of its language model."""
    text = getattr(config, "get_text_config", None)
    return getattr(config if hasattr(config, name) or text is None else text(), name, default)


def _present(layer: nn.Module, mixer: Mixer) -> int:
    """How many of the mixer's projections the layer has."""
    return sum(_maybe(layer, path) is not None for path in (*mixer.reads.values(), *mixer.by_head.values()))


def _maybe(root: nn.Module, path: str | None) -> nn.Module | None:
    try:
        return None if path is None else root.get_submodule(path)
    except AttributeError:
        return None


def _site(root: nn.Module, paths: Paths) -> nn.Module:
    paths = (paths,) if isinstance(paths, str) else paths
    for path in paths:
        module = _maybe(root, path)
        if module is not None:
            return module
    raise expected(type(root).__name__, f"a module at {' or '.join(map(repr, paths))}", "none there")


def _linear(root: nn.Module, path: str) -> Any:
    module = _site(root, path)
    # Adapters and quantised layers are not always nn.Linear, but they have in_features and out_features.
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not isinstance(module, Conv1D) and not all(isinstance(size, int) for size in sizes):
        raise expected(f"{type(root).__name__}.{path}", "a linear layer", type(module).__name__)
    return module
