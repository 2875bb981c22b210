"""What layers take over from others, or from the tokens, beside the residual stream, and how they scale that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...errors import expected
from ...modules.norms import Norm
from ...modules.offloading import read
from ...modules.projections import Place, Projections, linear_shape
from ...modules.shapes import Shape
from ..architecture import Layer


def keys_of(layers: Sequence[Layer], attention: nn.Module, projections: Projections, alike: str | None) -> int | None:
    """The index of the layer whose keys and values a new layer's heads attend to; None: its own.

    If it has only queries, it is the last of the layers that has keys and the same value of the attribute `alike`.
    """
    if alike is None or set(projections) != {"q"}:
        return None
    kind = getattr(attention, alike)
    found = [i for i, layer in enumerate(layers) if layer.caches and getattr(layer.attention, alike) == kind]
    if not found:
        raise expected(type(attention).__name__, "keys and values of its own, or of a layer before it", "none")
    return found[-1]


def scale_of(layer: nn.Module, name: str | None) -> float:
    """What the residual stream is multiplied by at a layer's end: its attribute of this name, or 1."""
    number = None if name is None else read(layer, name)
    if number is None or isinstance(number, Shape):  # of a model without weights
        return 1.0
    if not float(number):
        raise expected(f"{type(layer).__name__}.{name}", "a number other than 0", 0)
    return float(number)


class Stacked(nn.Module):
    """Adds what pictures write behind a layer. It stands for no module of the model's, and runs call it themselves."""

    shown: Tensor | None = None  # [E, T, D], in a run with pictures

    def forward(self, x: Tensor) -> Tensor:
        return x if self.shown is None else x + self.shown


def stacked_part(layer: Layer) -> Layer:
    """What pictures write behind a layer, as one that follows it: to all hooks it reads the residual stream, too."""
    added = Stacked()
    return replace(per_layer_part(layer, Norm(added, None, layer.module), added, added), rewrites=True, scale=1.0)


def per_layer_part(layer: Layer, norm: Norm, first: nn.Module, last: nn.Module) -> Layer:
    """What a layer makes of per-layer embeddings, as a layer without heads that follows it."""
    out: Any = Place(layer.module, True, linear_shape(layer.out)[0], 0)
    return replace(
        layer,
        attention_norm=norm,
        mlp_norm=norm,
        n_heads=0,
        groups=1,
        keys=None,
        projections={},
        order="concatenated",
        query_order="concatenated",
        out=out,
        post_norm=None,
        mlp_in=first,
        mlp_out=last,
        k_norm=None,
        per_layer=True,
    )
