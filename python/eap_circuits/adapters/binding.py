"""Find the sites of a model by its family's table."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import expected, refuse_default_device
from .architecture import Architecture, Layer
from .families import FAMILIES, Factor, Family, Paths, family_of
from .norms import Kinds, Norm
from .offloading import device_of, devices_of
from .projections import Projection, grouped_rows, linear_shape
from .wrappers import unwrapped

# Attributes in which attention modules keep the query heads per key/value head, and the number of key/value heads.
_GROUPS, _KV_HEADS = ("num_key_value_groups",), ("num_key_value_heads", "num_kv_heads")
_CAUSAL = "a causal language model with its head, as AutoModelForCausalLM loads it"
_HEAD_DIM = ("head_dim", "head_size")


def bind(model: nn.Module, family: Family | None = None) -> Architecture:
    """Find the sites of a Hugging Face causal language model.

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
        raise expected("model", "a Hugging Face causal language model", type(model).__name__)
    family = family or family_of(model_type)
    if family is None:
        known = f"an architecture among {', '.join(sorted(FAMILIES))}, or a table of its own (eap_circuits.discover)"
        wanted = known if _may_be_causal(model) else _CAUSAL
        raise expected("model", wanted, f"{model_type!r} ({type(model).__name__})")
    if Version(transformers.__version__) < Version(family.since):
        wanted = f"transformers {family.since} or later for {type(model).__name__}"
        raise expected("model", wanted, transformers.__version__)
    for name, value in family.requires.items():
        if getattr(config, name, value) != value:
            raise expected(f"{type(model).__name__}.config.{name}", repr(value), repr(getattr(config, name)))
    if torch.device("meta") in devices_of(model):
        raise expected("model", "all weights", "some on the device meta, where only eap.plan works")
    if any(weight.is_inference() for weight in model.parameters()):
        raise expected("model", "weights made outside of torch.inference_mode", "inference tensors")
    # Other packages' models may keep their head elsewhere; what they give is checked in their first run.
    if type(model).__module__.startswith("transformers.") and _head(model) is None:
        raise expected(type(model).__name__, _CAUSAL, "a model without one")
    return _Binder(model, config, family).architecture()


def _may_be_causal(model: Any) -> bool:
    """Is it another package's, or one that transformers generates text with, one token after the other?"""
    if not type(model).__module__.startswith("transformers."):
        return True
    config = model.config
    both = getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_decoder", True)
    return bool(model.can_generate()) and not both


def _head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


class _Binder:
    def __init__(self, model: Any, config: Any, family: Family) -> None:
        self.model, self.config, self.family = model, config, family
        self.kinds = Kinds()
        self.norms: dict[nn.Module, Norm] = {}  # one for each module, as runs look up norms by identity

    def architecture(self) -> Architecture:
        family = self.family
        layers = [self._layer(layer) for layer in _site(self.model, family.layers).children()]
        if not layers:
            raise expected(f"{type(self.model).__name__}.{family.layers}", "decoder layers", "none")
        embed, width = self.model.get_input_embeddings(), linear_shape(layers[0].out)[0]
        if getattr(embed, "embedding_dim", width) != width:
            raise expected(
                f"{type(self.model).__name__}'s token embeddings", f"{width} features, the layers'", embed.embedding_dim
            )
        embedding_norm = family.embedding_norm
        return Architecture(
            model=self.model,
            family=family,
            layers=layers,
            final_norm=self._norm(self.model, family.final_norm, width, layers[-1].module),
            parallel=self._parallel(),
            embedding_norm=None if embedding_norm is None else _site(self.model, embedding_norm),
            embedding_scale=self._factor(family.embedding_multiplier),
            device=device_of(embed),
            dtype=next(p.dtype for p in self.model.parameters() if p.is_floating_point()),
        )

    def _parallel(self) -> bool:
        said = self.family.parallel
        return said if isinstance(said, bool) else any(bool(getattr(self.config, name, False)) for name in said)

    def _factor(self, said: Factor | None) -> float:
        if said is None:
            return 1.0
        return float(
            getattr(self.config, said) if isinstance(said, str) else said(self.model) if callable(said) else said
        )

    def _norm(self, root: nn.Module, paths: Paths, width: int, layer: nn.Module) -> Norm:
        module = _site(root, paths)
        return self.norms.setdefault(module, Norm(module, self.kinds(module, width), layer))

    def _layer(self, layer: nn.Module) -> Layer:
        family = self.family
        devices = devices_of(layer)
        if len(devices) > 1:
            raise expected(type(layer).__name__, "all of a layer on one device", ", ".join(sorted(map(str, devices))))
        out = _linear(layer, family.out)
        attention = _site(layer, family.out.rpartition(".")[0])
        width, values = linear_shape(out)
        q, k, v = self._projections(layer, attention, values)
        first, last = (family.mlp, family.mlp) if isinstance(family.mlp, str) else family.mlp
        mlp_in, mlp_out = _site(layer, first), _site(layer, family.mlp_post_norm or last)
        counts = dict.fromkeys(_GROUPS, 1) | dict.fromkeys(_KV_HEADS, q.n_heads)
        ungrouped = {name: value for name, value in counts.items() if hasattr(attention, name)}
        post = family.attention_post_norm
        if post is not None and getattr(out, "bias", None) is not None:
            raise expected(f"{type(layer).__name__}.{family.out}", "no bias, as a norm follows it", "a bias")
        return Layer(
            module=layer,
            attention_norm=self._reads(layer, family.attention_norm, q.module, width),
            mlp_norm=self._reads(layer, family.mlp_norm, mlp_in, width),
            q=q,
            k=k,
            v=v,
            grouped=not isinstance(q.rows, slice),
            attention=attention,
            out=out,
            post_norm=None if post is None else self._norm(layer, post, width, layer),
            mlp_in=mlp_in,
            mlp_out=mlp_out,
            scale=self._factor(family.residual_multiplier),
            k_norm=_maybe(layer, family.k_norm),
            ungrouped=tuple({**ungrouped, **family.ungrouped}.items()),
        )

    def _reads(self, layer: nn.Module, norm: Paths | None, reader: nn.Module, width: int) -> Norm:
        if norm is not None:
            return self._norm(layer, norm, width, layer)
        return self.norms.setdefault(reader, Norm(reader, None, layer))

    def _projections(self, layer: nn.Module, attention: nn.Module, values: int) -> tuple[Projection, ...]:
        """q, k and v of a layer; `values` is the number of features of all heads' values together."""
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
        right = [values + 2 * kv * head_dim] * 3 if fused else [values, kv * head_dim, kv * head_dim]
        fits = kv > 0 and heads % kv == 0
        for path, found, wanted in zip((family.q, family.k, family.v), features, right, strict=True):
            if found != wanted or (path == family.k and not fits):
                raise expected(
                    f"{name}.{path}",
                    f"output features for {heads} query heads of {head_dim} and key/value heads that divide them",
                    found,
                )
        rows: list[slice | Tensor]
        if fused and family.fused == "grouped":
            rows = list(grouped_rows(heads, kv, head_dim).values())
        else:
            starts = [0, values, values + kv * head_dim] if fused else [0, 0, 0]
            widths = (values, kv * head_dim, kv * head_dim)
            rows = [slice(start, start + width) for start, width in zip(starts, widths, strict=True)]
        counts = (heads, kv, kv)
        return tuple(Projection(*site, head_dim) for site in zip(modules, rows, counts, strict=True))

    def _head_dim(self, attention: nn.Module) -> int:
        for name in _HEAD_DIM:
            if isinstance(getattr(attention, name, None), int):
                return int(getattr(attention, name))
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


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
