"""What an architecture family is: a small table from canonical sites to Hugging Face module paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Paths = str | tuple[str, ...]  # of several paths, the first that leads to a module
Factor = str | float | Callable[[Any], float]
Fused = Literal["concatenated", "grouped"]


@dataclass(frozen=True)
class Family:
    """Where the sites of one architecture family are; the paths of a layer's sites start at the layer.

    The number of heads is read from the weights; the kind of a norm is found by what it computes.

    Args:
        name: the family's name.
        model_types: `config.model_type` values it serves.
        layers: the list of decoder layers, from the model.
        final_norm: the norm before the language-model head, from the model.
        attention_norm, mlp_norm: the norms through which attention and MLP read the residual stream; the same path
            if they share one, None if they read it as it is.
        q, k, v: the projections; the same path for all three if they are one module.
        out: attention's output projection, whose input is the heads' values side by side.
        mlp: the module whose input and output are the MLP's, or the two modules (first, last).
        fused: the order of a fused projection's features: "concatenated": all of q, then k, then v; "grouped": for each
            key/value head its query heads, its key and its value.
        attention_post_norm, mlp_post_norm: norms between a block's output and the residual stream.
        k_norm: a norm of the keys that has its own weights for each key/value head; it may be absent.
        parallel: whether attention and MLP of a layer read the same residual stream; or names of configuration fields,
            where one that is set says so.
        embedding_norm: a norm between the token embeddings and the residual stream, from the model.
        embedding_multiplier, residual_multiplier: factors of the embeddings and of every block's output: numbers,
            the configuration fields that hold them, or functions of the model.
        ungrouped: attributes to set on the attention module, besides the usual counts, so that it takes one key and
            value per query head.
        requires: configuration fields and the only values that are supported.
        since: the first version of transformers whose model is supported.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    final_norm: str
    attention_norm: Paths | None
    mlp_norm: Paths | None
    q: str
    k: str
    v: str
    out: str
    mlp: str | tuple[str, str] = "mlp"
    fused: Fused = "concatenated"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    k_norm: str | None = None
    parallel: bool | tuple[str, ...] = False
    embedding_norm: str | None = None
    embedding_multiplier: Factor | None = None
    residual_multiplier: Factor | None = None
    ungrouped: Mapping[str, object] = field(default_factory=dict)
    requires: Mapping[str, object] = field(default_factory=dict)
    since: str = "5"
