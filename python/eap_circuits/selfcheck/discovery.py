"""A table for an architecture without one: proposed from one forward pass, accepted if the self-check passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..adapters import ENCODER_DECODERS, Family, propose, whole_layers
from ..errors import InputError, expected, known_arguments
from ..forward import borrowed, parameters
from ..modules.loans import gives_back
from ..ranks import together
from .model import ONLY_STREAM, Check, StayDouble, check_model, exact_copy
from .tracing import trace

# What models raise that cannot run as they are asked to.
_OF_MODELS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@together
@gives_back
@known_arguments
def discover(model: nn.Module) -> tuple[Family, list[Check]]:
    """Find a model's sites by what its modules compute.

    It needs memory for two float64 copies of the weights and a few short passes. Nothing is registered: to use the
    model, pass the table to `register_family`.

    Args:
        model: a Hugging Face causal or masked language model, or a classifier.

    Returns:
        The table, and the checks that it passed.

    Raises:
        InputError: no table passes the self-check; the message says what did not hold.

    Example:
        >>> family, checks = eap.discover(model)
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        wanted = f"an encoder-decoder with a table ({', '.join(sorted(ENCODER_DECODERS))}), as none is discovered"
        raise expected(type(model).__name__, wanted, repr(config.model_type))
    exact = exact_copy(model)
    embed = exact.get_input_embeddings()
    if not hasattr(embed, "weight"):
        raise expected(type(model).__name__, "one table of token embeddings, as Llama's", "none")
    order = torch.randperm(embed.weight.shape[0], generator=torch.Generator().manual_seed(0))
    tokens = order[: 2 * min(5, len(order) // 2)].view(2, -1).to(embed.weight.device)
    try:
        with borrowed(exact), StayDouble(), torch.no_grad():
            calls, embeddings, causal = trace(exact, tokens), embed(tokens), _is_causal(exact, tokens)
    except InputError:
        raise
    except _OF_MODELS as error:
        wanted = "a model that runs on token ids alone, in float64, as Llama does"
        raise expected(type(model).__name__, wanted, f"that its {_place(error)} does not") from error
    if not isinstance(embeddings, torch.Tensor):
        raise expected(type(model).__name__, "token embeddings that are one tensor, as Llama's", "others")
    failed: list[Check] = []
    refusal: InputError | None = None
    proposals: list[Family] = []
    try:
        proposals = propose(exact, calls, embeddings)
    except InputError as error:
        refusal = error
    for family in [*proposals, *whole_layers(exact, calls, embeddings)]:
        family = replace(family, causal=causal)
        try:
            checks = check_model(model, family=family)
        except InputError as error:
            checks = [Check("self-check", False, str(error))]
        except _OF_MODELS as error:
            checks = [Check("runs from embeddings, with gradients", False, f"its {_place(error)} fails")]
        if all(check.passed for check in checks):
            return family, checks
        failed = failed or [check for check in checks if not check.passed]
    if any(check.name == ONLY_STREAM for check in failed):
        found = "layers that also read the tokens or their embeddings by another way"
        raise expected(type(model).__name__, "layers that read nothing but the residual stream, as Jamba's", found)
    if refusal is not None:
        raise refusal
    what = "; ".join(f"{check.name} ({check.detail})" for check in failed)
    raise expected(type(model).__name__, "an architecture whose self-check passes", f"failures: {what}")


def _is_causal(model: Any, tokens: torch.Tensor) -> bool:
    """Does the first token stay what it is if the last one is another?"""
    body = model.base_model
    given = {"use_cache": False} if "use_cache" in parameters(body) else {}
    before, after = (
        body(input_ids=ids, **given)[0][:, 0] for ids in (tokens, torch.cat([tokens[:, :-1], tokens[:, :1]], 1))
    )
    return bool((before - after).norm() <= 1e-8 * before.norm())


def _place(error: BaseException) -> str:
    """The class of the innermost module of the model that was running, and the kind of error."""
    place, at = "forward", error.__traceback__
    while at is not None:
        module = at.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and not type(module).__module__.startswith("torch."):
            place = type(module).__name__
        at = at.tb_next
    return f"{place} ({type(error).__name__})"
