"""Encoders, and decoders that are made like them: a norm after each sum, and one of embeddings and positions."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from .family import Family

# A norm after each sum: what follows attention, from the first norm to the last, rewrites the residual stream.
MARIAN = Family(
    name="marian",
    model_types=("marian",),
    layers="model.decoder.layers",
    final_norm="lm_head",
    attention_norm=None,
    mlp_norm=None,
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    mlp=("self_attn_layer_norm", "final_layer_norm"),
    rewrites=True,
    embedding_multiplier=lambda model: model.model.decoder.embed_scale,
    requires={"is_encoder_decoder": False, "is_decoder": True},
)
BART = replace(
    MARIAN,
    name="bart",
    model_types=("bart", "plbart", "mvp"),
    embedding_multiplier=None,
    embedding_norm="model.decoder.layernorm_embedding",
    placed=True,
)
BERT = replace(
    BART,
    name="bert",
    model_types=("bert",),
    layers="bert.encoder.layer",
    final_norm="",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    out="attention.output.dense",
    mlp=("attention.output.LayerNorm", "output.LayerNorm"),
    embedding_norm="bert.embeddings.LayerNorm",
    causal="is_decoder",
    requires={"is_encoder_decoder": False, "add_cross_attention": False},
)
ROBERTA = replace(
    BERT,
    name="roberta",
    model_types=("roberta", "xlm-roberta", "camembert"),
    layers="roberta.encoder.layer",
    embedding_norm="roberta.embeddings.LayerNorm",
)
ELECTRA = replace(
    BERT,
    name="electra",
    model_types=("electra",),
    layers="electra.encoder.layer",
    embedding_norm=("electra.embeddings_project", "electra.embeddings.LayerNorm"),
)
DISTILBERT = replace(
    BERT,
    name="distilbert",
    model_types=("distilbert",),
    layers="distilbert.transformer.layer",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    out="attention.out_lin",
    mlp=("sa_layer_norm", "output_layer_norm"),
    embedding_norm="distilbert.embeddings.LayerNorm",
    causal=False,
    requires={},
)


def _albert_layers(model: Any) -> Any:
    """One group of weights serves several layers, which the encoder finds by their configured number."""

    def twin(module: Any) -> Any:
        return copy.deepcopy(module, {id(x): x for x in (*module.parameters(), *module.buffers())})

    model = twin(model)
    encoder, n = model.albert.encoder, model.config.num_hidden_layers
    groups, encoder.config.num_hidden_groups = encoder.albert_layer_groups, n
    encoder.albert_layer_groups = nn.ModuleList(twin(groups[i * len(groups) // n]) for i in range(n))
    return model


ALBERT = replace(
    DISTILBERT,
    name="albert",
    model_types=("albert",),
    layers="albert.encoder.albert_layer_groups",
    q="albert_layers.0.attention.query",
    k="albert_layers.0.attention.key",
    v="albert_layers.0.attention.value",
    out="albert_layers.0.attention.dense",
    mlp=("albert_layers.0.attention.LayerNorm", "albert_layers.0.full_layer_layer_norm"),
    embedding_norm="albert.encoder.embedding_hidden_mapping_in",
    unshared=_albert_layers,
    requires={"inner_group_num": 1},
)
MODERNBERT = Family(
    name="modernbert",
    model_types=("modernbert",),
    layers="model.layers",
    final_norm="model.final_norm",
    attention_norm="attn_norm",
    mlp_norm="mlp_norm",
    q="attn.Wqkv",
    k="attn.Wqkv",
    v="attn.Wqkv",
    out="attn.Wo",
    embedding_norm="model.embeddings.norm",
    causal=False,
)

ENCODERS = (MARIAN, BART, BERT, ROBERTA, ELECTRA, DISTILBERT, ALBERT, MODERNBERT)
