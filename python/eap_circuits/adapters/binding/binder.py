"""Find the sites of a model by its family's table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

from ...errors import expected, refuse_default_device
from ...families import ENCODER_DECODERS, FAMILIES, Family, Paths, Sums, family_of
from ...modules.norms import Kinds, Norm, is_norm, norm_inside
from ...modules.offloading import device_of, devices_of
from ...modules.parts import is_in_parts, parts_of, unknown_parts
from ...modules.projections import Place, Together, linear_shape
from ...ranks import form_team
from ..architecture import Architecture, Layer
from ..classes import classifies_prompts, head_of, is_own, may_fit
from ..hooks_of_others import refuse_hooks_of_all
from ..wrappers import around, unwrapped
from .between_layers import keys_of, per_layer_part, scale_of, stacked_part
from .mixers import Mixers, present
from .paths import configured, factor, maybe, site

# Attributes in which attention modules keep the query heads per key/value head, and the number of key/value heads.
_GROUPS, _KV_HEADS = ("num_key_value_groups",), ("num_key_value_heads", "num_kv_heads")
_PLAIN: Sums = (1.0, 1.0), (1.0, 1.0)  # without factors
_HEADS = "a model with its head, as AutoModelForCausalLM, -MaskedLM, -Seq2SeqLM or -SequenceClassification loads it"


def bind(model: nn.Module, family: Family | None = None) -> Architecture:
    """Find the sites of a Hugging Face language model (causal, masked, encoder-decoder) or of a classifier of prompts.

    Args:
        model: the model.
        family: its table; by default the one registered for its `config.model_type`.

    Raises:
        InputError: another object, an unsupported architecture, a missing head or site, or a layer on several devices.
    """
    refuse_default_device()
    refuse_hooks_of_all()
    if torch._C._functorch.maybe_current_level() is not None:
        raise expected("the call", "one outside of torch.func's transforms (grad, vmap)", "one inside of them")
    outside, model = around(model), unwrapped(model)
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
        if (found := configured(config, name, value)) != value:
            wanted = f"{value!r}, or a table of its own (eap_circuits.discover)"
            raise expected(f"{type(model).__name__}.config.{name}", wanted, repr(found))
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
    return replace(_Binder(model, model.config, family).architecture(), around=outside)


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
        self.mixers, self.kinds = Mixers(model, config, family), Kinds()
        self.norms: dict[nn.Module, Norm] = {}  # one for each module, as runs look up norms by identity
        self.layers: list[Layer] = []  # so far
        self.unit = 1.0  # what these have multiplied the residual stream by
        self.others = [_Binder(model, config, other) for other in family.others]
        for other in self.others:
            other.kinds, other.norms, other.layers = self.kinds, self.norms, self.layers

    def architecture(self) -> Architecture:
        family, layers = self.family, self.layers
        stacked = 0 if family.stacked is None else len(reduce(getattr, family.stacked[0].split("."), self.config))
        for index, layer in enumerate(self._modules()):
            part = next((other for other in self.others if other.mixers.in_layer(layer)), self)
            part.unit = self.unit
            found = list(part._side_by_side(layer, part._layer(layer)))
            self.unit = part.unit
            for each in found:
                each.check_heads(parts_of(each.out))
            layers += found
            if family.per_layer is not None and maybe(layer, family.per_layer[0]) is not None:
                first, last = (site(layer, path) for path in family.per_layer)
                layers.append(
                    per_layer_part(layers[-1], self._reads(layer, None, first, self.mixers.width), first, last)
                )
            if index < stacked:
                layers.append(stacked_part(layers[-1]))
            self.unit *= scale_of(layer, family.layer_scale)
        if family.first_norm is not None:
            ends = [site(layer.module, family.first_norm) for layer in layers[1:]]
            layers[:-1] = [replace(layer, mlp_out=end) for layer, end in zip(layers[:-1], ends, strict=True)]
        embed, width = self.model.get_input_embeddings(), linear_shape(layers[0].out)[0]
        said, classifies, head = family.causal, classifies_prompts(self.model), head_of(self.model)
        causal = said if isinstance(said, bool) else bool(getattr(self.config, said, False))
        if causal and classifies and head is None:
            wanted = "a classifier that reads the last token (its `score`), or whose tokens all see each other"
            raise expected(type(self.model).__name__, wanted, "another")
        if not isinstance(getattr(embed, "weight", None), torch.Tensor):
            name = f"{type(self.model).__name__}'s token embeddings"
            raise expected(name, "a module with a weight [tokens, features]", type(embed).__name__)
        if getattr(embed, "embedding_dim", width) != width and family.embedding_norm is None:
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
            embedding_norm=None if embedding_norm is None else site(self.model, embedding_norm),
            embedding_scale=factor(self.model, family.embedding_multiplier),
            given_scale=factor(self.model, family.embedding_multiplier) if family.scales_given else 1.0,
            per_layer=(site(self.model, holder), site(self.model, inputs)) if inputs and layers[-1].per_layer else None,
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
        name = f"{type(self.model).__name__}.{self.family.layers}"
        # Not children(), which names a module that is there twice once.
        found = [each for each in site(self.model, self.family.layers)._modules.values() if each is not None]
        if not found:
            raise expected(name, "layers", "none")
        seen: set[nn.Module] = set()
        for number, layer in enumerate(found):
            # What only holds weights runs nothing.
            held = (nn.ParameterDict, nn.ParameterList)
            weighted = {part for part in layer.modules() if part._parameters and not isinstance(part, held)}
            if shared := next(iter(weighted & seen), None):
                wanted = "layers that share no module (a copy may share its weights)"
                raise expected(name, wanted, f"a {type(shared).__name__} of layer {number} in one before it, too")
            seen |= weighted
        return found

    def _parallel(self) -> bool:
        said = self.family.parallel
        return said if isinstance(said, bool) else any(bool(getattr(self.config, name, False)) for name in said)

    def _norm(self, root: nn.Module, paths: Paths, width: int, layer: nn.Module, unit: float) -> Norm:
        module = norm_inside(site(root, paths), width)
        return self.norms.setdefault(module, Norm(module, self.kinds(module, width), layer, unit))

    def _final_norm(self, width: int, layer: nn.Module) -> Norm:
        if not self.family.final_norm:
            if self.family.mlp == ("", ""):  # whose hooks are where the logits would read
                raise expected(f"{self.family.name}'s table", "a `final_norm`, as each layer is one node", "none")
            return Norm(Place(layer, False, width), None, layer, self.unit)
        module = norm_inside(site(self.model, self.family.final_norm), width)
        if is_norm(module, width):
            return self._norm(self.model, self.family.final_norm, width, layer, self.unit)
        return Norm(Place(module, True, width), None, layer, self.unit)

    def _layer(self, layer: nn.Module) -> Layer:
        family = self.family
        devices = devices_of(layer)
        if len(devices) > 1:
            raise expected(type(layer).__name__, "all of a layer on one device", ", ".join(sorted(map(str, devices))))
        attention, out, n_heads, projections = self.mixers.mixer(layer)
        width = linear_shape(out)[0]
        fused = len({p.module for p in projections.values()}) == 1 < len(projections)
        if projections:
            norm = self._reads(layer, family.attention_norm, next(iter(projections.values())).module, width)
        (keep, heads_write), (keep_next, mlp_writes) = (
            _PLAIN if family.residual_factors is None else family.residual_factors(layer)
        )
        self.unit *= keep
        of_heads = heads_write / self.unit
        path = None if family.one_block and n_heads else family.mlp
        mlp_norm, mlp_in, mlp_out = (norm, layer, layer) if path is None else self._mlp(layer, width, path)
        if not projections:
            norm = mlp_norm
        self.unit = 1.0 if family.rewrites else self.unit * keep_next
        of_mlp = mlp_writes / self.unit
        keys = keys_of(self.layers, attention, projections, family.key_sharing)
        attended = projections if keys is None else self.layers[keys].projections
        kept = dict.fromkeys(_GROUPS, 1) | dict.fromkeys(_KV_HEADS, n_heads)
        ungrouped = {name: value for name, value in kept.items() if hasattr(attention, name)}
        post = family.attention_post_norm
        post = None if post is None or isinstance(site(layer, post), nn.Identity) else post
        if post is not None and getattr(out, "bias", None) is not None:
            (name,) = (name for name, module in layer.named_modules() if module is out)
            raise expected(f"{type(layer).__name__}.{name}", "no bias, as a norm follows it", "a bias")
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
            scale=factor(self.model, family.residual_multiplier) * of_mlp,
            rewrites=family.rewrites,
            k_norm=maybe(layer, family.k_norm),
            v_norm=maybe(layer, family.v_norm) is not None,
            inner_norm=maybe(layer, family.inner_norm) is not None,
            ungrouped=tuple(
                {**ungrouped, **{k: v(layer) if callable(v) else v for k, v in family.ungrouped.items()}}.items()
            ),
            bare=path is None,
            heads_scale=factor(self.model, family.write_factor) * (of_heads / of_mlp),
        )

    def _side_by_side(self, layer: nn.Module, first: Layer) -> Iterator[Layer]:
        """A layer, and those of further mixers beside its own. What follows them all is the last one's MLP."""
        for mixer in self.family.beside_attention:
            if not present(layer, mixer):
                continue
            yield replace(first, bare=True)
            attention, out, n_heads, projections = self.mixers.with_heads(layer, mixer)
            first = replace(
                first,
                beside=True,
                n_heads=n_heads,
                groups=1,
                projections=projections,
                order="concatenated",
                query_order="concatenated",
                attention=attention,
                out=out,
                heads_scale=factor(self.model, mixer.write_factor),
                k_norm=None,
                v_norm=False,
                ungrouped=(),
            )
        yield first

    def _mlp(self, layer: nn.Module, width: int, path: str | tuple[str, str]) -> tuple[Norm, nn.Module, nn.Module]:
        """The MLP's norm, and the modules at whose input it reads and at whose output it writes."""
        family = self.family
        first, last = (path, path) if isinstance(path, str) else path
        more = [module for name in family.mlp_reads if (module := maybe(layer, name)) is not None]
        if more and family.mlp_norm is not None:
            readers = Together([site(layer, family.mlp_norm), *more])
            return self._reads(layer, None, readers, width), readers, site(layer, family.mlp_post_norm or last)
        beside = maybe(layer, family.beside)
        if beside is None or family.mlp_post_norm is not None:
            mlp_in = site(layer, first)
            norm = self._reads(layer, family.mlp_norm, mlp_in, width)
            if beside is not None:
                mlp_in = Place(norm.module, False, width)
            return norm, mlp_in, site(layer, family.mlp_post_norm or last)
        parts = [part for part in (maybe(layer, last), beside) if part is not None]
        norm = self._reads(layer, family.mlp_norm, beside, width)
        if len(parts) == 1:
            return norm, beside, beside
        return norm, Place(norm.module, False, width), Together(parts)

    def _reads(self, layer: nn.Module, norm: Paths | None, reader: nn.Module, width: int) -> Norm:
        if norm is not None and not isinstance(site(layer, norm), nn.Identity):
            return self._norm(layer, norm, width, layer, self.unit)
        return self.norms.setdefault(reader, Norm(reader, None, layer, self.unit))
