"""Attribution methods by name."""

from __future__ import annotations

from .exact import ExactMethod
from .flow import FlowMethod
from .gradient import ActivationsMethod, AdaptiveMethod, ConductanceMethod, InputsMethod
from .quadrature import QUADRATURES, right
from .spec import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        InputsMethod(
            "eap",
            "edge attribution patching: the gradient at the clean prompt",
            "2 forwards, 1 forward and backward",
            "stable",
            lambda steps: [(1.0, 1.0)],
        ),
        InputsMethod(
            "eap-ig-inputs",
            "EAP with integrated gradients along the path between the two prompts' embeddings",
            "2 forwards, M forwards and backwards",
            "stable",
            QUADRATURES,
        ),
        ActivationsMethod(
            "eap-ig-activations",
            "EAP with integrated gradients along a path of each sender group's own activations",
            "3 forwards, about (L + 2)·M forwards and backwards",
            "stable",
            QUADRATURES,
        ),
        InputsMethod(
            "clean-corrupted",
            "the mean of the gradients at the clean and at the corrupted prompt",
            "2 forwards, 2 forwards and backwards",
            "stable",
            lambda steps: [(0.0, 0.5), (1.0, 0.5)],
        ),
        ConductanceMethod(
            "eap-conductance",
            "along the path between the embeddings, each sender's own change times the gradients there",
            "2 forwards, M + 1 forwards and backwards",
            "experimental",
            right,
        ),
        AdaptiveMethod(
            "eap-gp",
            "along a path from the clean prompt down the distance from the corrupted prompt's logits",
            "3 forwards, 2·M forwards and backwards",
            "experimental",
            right,
        ),
        FlowMethod(
            "information-flow-routes",
            "what share of a receiver's input each sender brings, without metric and gradients",
            "1 forward of the clean prompts",
            "stable",
        ),
        ExactMethod(
            "exact",
            "patching each edge alone: what the gradient methods approximate",
            "2 forwards, and for each edge a forward from its receiver's layer on",
            "stable",
        ),
    )
}
