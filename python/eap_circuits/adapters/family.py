"""What an architecture family is: a small table from canonical sites to Hugging Face module paths."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where the sites of one architecture family are; the paths of a layer's sites start at the layer.

    Args:
        name: the family's name.
        model_types: `config.model_type` values it serves.
        layers: the list of decoder layers, from the model.
        final_norm: the norm before the language-model head, from the model.
        attention_norm, mlp_norm: the norms through which attention and MLP read the residual stream.
        q, k, v: the projections; where all three are one module its output is the concatenation [q, k, v].
        out: attention's output projection, whose input is the heads' values side by side.
        mlp: the module whose input and output are the MLP's.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    final_norm: str
    attention_norm: str
    mlp_norm: str
    q: str
    k: str
    v: str
    out: str
    mlp: str
