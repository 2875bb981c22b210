"""What an architecture family is: a small table from canonical sites to Hugging Face module paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..modules.projections import Order

Paths = str | tuple[str, ...]  # of several paths, the first that leads to a module
Factor = str | float | Callable[[Any], float]
Sums = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Mixer:
    """What mixes tokens in layers that have no attention with queries, keys and values; paths start at the layer.

    Args:
        out: the output projection; its input is divided evenly among the heads. None: the heads are not told apart,
            and what `module` reads and writes is the input and the output of one.
        module: the whole mixer, if `out` is None, or the two modules (first, last). With `out`: what reads the residual
            stream for all heads, where that is nothing linear (a norm with a gate).
        reads: what reads the residual stream, a receiver each, by name; a path may be absent in some models.
        by_head: likewise, but with a receiver for each head, among which its features are divided evenly.
        heads: where their number is: attributes of the module that holds `out`, or configuration fields; without any
            there is one.
        read_factor, write_factor: what the norm's output is multiplied by before the projections, and what `out` gives
            before it is added to the residual stream (`Factor`).
    """

    out: str | None = None
    module: str | tuple[str, str] = ""
    reads: Mapping[str, str] = field(default_factory=dict)
    by_head: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    read_factor: Factor | None = None
    write_factor: Factor | None = None


@dataclass(frozen=True)
class Family:
    """Where the sites of one architecture family are; the paths of a layer's sites start at the layer.

    The number of heads is read from the weights; the kind of a norm is found by what it computes.

    Args:
        name: the family's name.
        model_types: `config.model_type` values it serves.
        layers: the list of decoder layers, from the model.
        final_norm: the norm before the head, from the model; or, if there is none, what reads the residual stream
            after the last layer; "": the head takes what the last layer gives.
        attention_norm, mlp_norm: the norms through which attention and MLP read the residual stream; the same path
            if they share one, None if they read it as it is.
        q, k, v: the projections; the same path for all three if they are one module.
        out: attention's output projection, whose input is the heads' values side by side. Without it and without
            mixers each layer is one node, `mlp`.
        mlp: the module whose input and output are the MLP's, or the two modules (first, last); None: there is none.
        one_block: a layer has attention, or one of `mixers`, or else `mlp`: no two of them.
        more: further projections that the heads of attention read, by the names of their receivers, such as a gate;
            their features are divided evenly among the heads.
        mixers: what layers without `out` have instead.
        beside_attention: what layers have beside attention: it reads through the same norm, and both are added up.
        read_factor, write_factor: those of attention, as in `Mixer`.
        mlp_reads: modules that read the residual stream beside the MLP's norm, and whose outputs the layer joins to the
            MLP's (a router, the norm of its experts). They may be absent; else the MLP reads the stream as it is.
        beside: a module that reads what the MLP reads and runs after it; the outputs are added (shared experts).
        rewrites: the MLP's modules are all that follows attention, and what the last one gives takes the place of the
            residual stream (a norm after the sum): the MLP writes how it changes the stream.
        first_norm: where `rewrites`: a norm of the stream itself with which a layer begins: it is the last module of
            the MLP of the layer before, and in the first layer the `embedding_norm`.
        v_norm: attention has a norm of each value, so that their effect is not linear; it may be absent.
        inner_norm: attention has a norm of all heads' values together, so that heads depend on each other.
        fused: the order of a fused projection's features: "concatenated": all of q, then k, then v; "grouped": for each
            key/value head its query heads, its key and its value; "sharded": in each of four equal parts, queries, then
            values, then keys.
        fused_by_query: the order in which attention takes them with a key and a value for each query head, if another.
        attention_post_norm, mlp_post_norm: norms between a block's output and the residual stream.
        key_sharing: an attribute of attention: where attention has no keys of its own, it takes keys and values of the
            last layer before it that has some and the same value of that attribute.
        layer_scale: an attribute of a layer: what the residual stream is multiplied by at the layer's end.
        residual_factors: a function of a layer: of the sum behind attention, and of that behind the MLP, what the
            residual stream and what the block's output are multiplied by; neither may be 0. If the MLP `rewrites`,
            there is no second one.
        per_layer: the first and the last module of what a layer with per-layer embeddings makes of them behind the MLP:
            the first reads the residual stream as it is. It may be absent.
        per_layer_inputs: the module that makes a part of these from the token embeddings, from the model; the one that
            holds it makes the other part of the tokens (`get_per_layer_inputs`).
        k_norm: a norm of the keys that has its own weights for each key/value head; it may be absent.
        parallel: whether attention and MLP of a layer read the same residual stream; or names of configuration fields,
            where one that is set says so.
        embedding_norm: a norm between the token embeddings and the residual stream, from the model.
        placed: that norm, or whatever module it is, reads the sum of token and position embeddings, so `input` writes
            what comes out of it.
        unshared: makes a copy of the model, with the same weights, in which each layer is a module of its own, if one
            module is several layers.
        causal: whether no token sees later ones; or the configuration field that says so.
        embedding_multiplier, residual_multiplier: factors of the embeddings and of every block's output: numbers,
            the configuration fields that hold them, or functions of the model.
        scales_given: the model also multiplies embeddings that it is given in place of tokens.
        ungrouped: attributes to set on the attention module, besides the usual counts, so that it takes one key and
            value per query head.
        requires: configuration fields and the only values that are supported.
        since: the first version of transformers whose model is supported.
        others: tables of layers that differ in more than their mixer; only their paths inside a layer count. The first
            that names the mixer of a layer describes it, else this table does.
        decoder: of an encoder-decoder, whose encoder the table itself describes: tables of the self-attention and of
            the cross-attention in each decoder layer, of which only the paths count. What is between the two is the
            first one's MLP. Keys and values of the second read through the encoder's `final_norm`.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    final_norm: str
    attention_norm: Paths | None
    mlp_norm: Paths | None
    q: str = ""
    k: str = ""
    v: str = ""
    out: str = ""
    mlp: str | tuple[str, str] | None = "mlp"
    more: Mapping[str, str] = field(default_factory=dict)
    one_block: bool = False
    mixers: tuple[Mixer, ...] = ()
    beside_attention: tuple[Mixer, ...] = ()
    read_factor: Factor | None = None
    write_factor: Factor | None = None
    mlp_reads: tuple[str, ...] = ()
    beside: str | None = None
    rewrites: bool = False
    first_norm: str | None = None
    v_norm: str | None = None
    inner_norm: str | None = None
    fused: Order = "concatenated"
    fused_by_query: Order | None = None
    attention_post_norm: Paths | None = None
    mlp_post_norm: Paths | None = None
    key_sharing: str | None = None
    layer_scale: str | None = None
    residual_factors: Callable[[Any], Sums] | None = None
    per_layer: tuple[str, str] | None = None
    per_layer_inputs: str = ""
    k_norm: str | None = None
    parallel: bool | tuple[str, ...] = False
    embedding_norm: Paths | None = None
    placed: bool = False
    unshared: Callable[[Any], Any] | None = None
    causal: bool | str = True
    embedding_multiplier: Factor | None = None
    residual_multiplier: Factor | None = None
    scales_given: bool = True
    ungrouped: Mapping[str, object] = field(default_factory=dict)
    requires: Mapping[str, object] = field(default_factory=dict)
    since: str = "5"
    others: tuple[Family, ...] = ()
    decoder: tuple[Family, Family] | None = None
