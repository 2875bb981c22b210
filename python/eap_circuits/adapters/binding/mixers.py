"""What mixes tokens in a layer: its heads, their output projection, and what they read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...errors import expected
from ...families import Factor, Family, Mixer
from ...modules.projections import Place, Projection, Projections, linear_shape, rows_of
from .paths import configured, factor, linear_at, maybe, site

_HEAD_DIM = ("head_dim", "head_size")
Found = tuple[nn.Module, Any, int, Projections]  # the module, its output projection, how many heads, what they read


@dataclass(frozen=True)
class Mixers:
    """Finds them in the layers of a model by its table."""

    model: Any
    config: Any
    family: Family

    def mixer(self, layer: nn.Module) -> Found:
        """That of attention, or of one of the other mixers, or of a layer that is one node."""
        family = self.family
        usual = all(maybe(layer, path or None) is not None for path in (family.q, family.k, family.v, family.out))
        for mixer in () if usual else sorted(family.mixers, key=lambda one: -present(layer, one)):
            first, last = (mixer.module, mixer.module) if isinstance(mixer.module, str) else mixer.module
            if mixer.out is None and maybe(layer, first) is not None:
                return self._whole(site(layer, first), site(layer, last))
            if mixer.out is not None and maybe(layer, mixer.out) is not None and present(layer, mixer):
                return self.with_heads(layer, mixer)
        if not family.out or family.one_block:  # the layer is one node
            return layer, Place(layer, True, self.width, 0), 0, {}
        out = linear_at(layer, family.out)
        attention = site(layer, family.out.rpartition(".")[0])
        projections = self._projections(layer, attention, linear_shape(out)[1])
        heads = projections["q"].n_heads
        for name, path in family.more.items():
            if maybe(layer, path) is not None:
                projections[name] = self._evenly(layer, path, heads)
        return attention, out, heads, self._times(projections, family.read_factor)

    def in_layer(self, layer: nn.Module) -> bool:
        """Does the table name the layer's mixer?"""
        family = self.family
        return maybe(layer, family.out or None) is not None or any(present(layer, mixer) for mixer in family.mixers)

    def _whole(self, first: nn.Module, last: nn.Module) -> Found:
        return first, Place(last, False, self.width), 1, {"in": self._as_it_is(first)}

    def _as_it_is(self, reader: nn.Module) -> Projection:
        """What a module reads of the residual stream, for all heads."""
        return Projection(Place(reader, True, self.width), slice(0, self.width), 1, self.width)

    def with_heads(self, layer: nn.Module, mixer: Mixer) -> Found:
        """That of a mixer with an output projection."""
        assert mixer.out is not None
        out, module = linear_at(layer, mixer.out), site(layer, mixer.out.rpartition(".")[0])
        found = [x for name in mixer.heads for x in (getattr(module, name, None), configured(self.config, name))]
        heads = next((n for n in found if isinstance(n, int)), 1)
        if linear_shape(out)[1] % heads:
            raise expected(
                f"{type(layer).__name__}.{mixer.out}", f"input features for {heads} heads", linear_shape(out)[1]
            )
        projections: Projections = {}
        if mixer.module:
            assert isinstance(mixer.module, str)
            projections["in"] = self._as_it_is(site(layer, mixer.module))
        for (name, path), count in [
            *((item, 1) for item in mixer.reads.items()),
            *((item, heads) for item in mixer.by_head.items()),
        ]:
            if maybe(layer, path) is not None:
                projections[name] = self._evenly(layer, path, count)
        return module, out, heads, self._times(projections, mixer.read_factor)

    def _times(self, projections: Projections, said: Factor | None) -> Projections:
        times = factor(self.model, said)
        return {name: replace(projection, factor=times) for name, projection in projections.items()}

    def _evenly(self, layer: nn.Module, path: str, heads: int) -> Projection:
        """A projection whose features are divided evenly among the heads."""
        module = linear_at(layer, path)
        features = linear_shape(module)[0]
        if not features or features % heads:
            raise expected(f"{type(layer).__name__}.{path}", f"output features for {heads} heads", features)
        return Projection(module, slice(0, features), heads, features // heads)

    def _projections(self, layer: nn.Module, attention: nn.Module, values: int) -> Projections:
        """q, k and v of a layer, where q may also give a gate for every query.

        `values` is the number of features of all heads' values together.
        """
        family, name = self.family, type(layer).__name__
        head_dim, fused = self._head_dim(attention), family.q == family.k == family.v
        own = None if fused else getattr(attention, "v_head_dim", None)  # where values have another width
        value_dim = own if isinstance(own, int) else head_dim
        heads = values // value_dim
        if heads * value_dim != values:
            raise expected(f"{name}.{family.out}", f"heads of {value_dim} input features", values)
        modules = [linear_at(layer, path) for path in (family.q, family.k, family.v)]
        features = [linear_shape(module)[0] for module in modules]
        kv_width = (features[0] - values) // 2 if fused else features[1]
        kv, queries = kv_width // head_dim, heads * head_dim
        queries = 2 * queries if not fused and features[0] == 2 * queries else queries
        right = [values + 2 * kv * head_dim] * 3 if fused else [queries, kv * head_dim, kv * value_dim]
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

    @property
    def width(self) -> int:
        """Of the embeddings, and so of the residual stream."""
        embed: Any = self.model.get_input_embeddings()
        return int(embed.weight.shape[1])


def present(layer: nn.Module, mixer: Mixer) -> int:
    """How many of the modules that the mixer reads through the layer has."""
    paths = [*mixer.reads.values(), *mixer.by_head.values()]
    if mixer.out is not None and isinstance(mixer.module, str):
        paths.append(mixer.module)
    return sum(bool(path) and maybe(layer, path) is not None for path in paths)
