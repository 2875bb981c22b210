"""What a model's class says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

TESTED = (5, 24)  # the newest transformers with which the tests run (tests/versions)


def runs_tested_code(model: nn.Module) -> bool:
    """Is all of its code that of transformers, in a version with which the tests run, and of torch?"""
    if Version(transformers.__version__).release[:2] > TESTED:
        return False
    libraries = ("transformers.", "torch.nn.")
    return all(type(part).__module__.startswith(libraries) and "forward" not in vars(part) for part in model.modules())


def is_own(model: nn.Module) -> bool:
    """Is its class one of transformers?"""
    return type(model).__module__.startswith("transformers.")


def may_fit(model: Any) -> bool:
    """Is it another package's, or one of transformers' kinds of models that a table can describe?"""
    if not is_own(model):
        return True
    masked = _is_one_of(model, MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    return bool(model.can_generate() or masked or classifies_prompts(model))


def classifies_prompts(model: nn.Module) -> bool:
    return _is_one_of(model, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


def _is_one_of(model: nn.Module, classes: Mapping[str, str]) -> bool:
    """Is its class, or one that it is made from, among these, by their names?"""
    return not {kind.__name__ for kind in type(model).__mro__}.isdisjoint(classes.values())


def head_of(model: Any) -> nn.Module | None:
    """What gives each token's logits; classifiers that read the last token have one, too."""
    head: nn.Module | None = (
        getattr(model, "score", None) if classifies_prompts(model) else model.get_output_embeddings()
    )
    return head
