"""Any value for any argument of the public functions: refused, or a result that means the same as plain values'."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import eap_circuits as eap
import eap_kernels as ek
from eap_circuits.methods import METHODS
from eap_circuits.recording import ABLATIONS, RULES

from .common import Tally, circuit, difference, model, pairs, scores, tokenizer

May = Callable[[Any], bool]


def ignore(*_: object) -> None:
    """A callable that takes anything and gives nothing."""


@cache
def anything() -> list[Any]:
    """What is handed in: of every type, empty, negative, huge, not a number, of the wrong shape."""
    return [
        None, True, False, 0, 1, 2, 3, -1, -7, 2**63, 2**100, 0.5, 1.0, 2.0, -0.5, float("nan"), float("inf"), 1e-300,
        "", " ", "x", "eap", "1", "1GB", "-1GB", "nanGB", "é" * 50, b"x", [], (), {}, [1], ["x"], [0.1, 0.5],
        [0.5, 0.1], [float("nan")], (0, 1), [True], [[1, 2], [3]], {"a": 1}, {1}, object(), ignore, int,
        Exception("x"), range(3), slice(1), Path("x"), Decimal("2"), 2 + 0j, np.int64(2), np.int64(-2), np.int32(0),
        np.float32(0.5), np.bool_(True), np.str_("eap"), np.array([1, 2]), np.array(2), np.zeros((2, 2)),
        torch.tensor(2), torch.tensor(0.5), torch.tensor([]), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool),
        torch.full((3,), float("nan")), torch.zeros_like(circuit().mask), torch.ones_like(circuit().mask),
        torch.zeros(circuit().mask.shape), torch.float32, torch.ones(2, 2, 2).long(), model(), pairs(), circuit(),
        scores(), scores().graph, circuit().complement(), "logit_diff", "top", "greedy", "zero", "mean", "kv", "query",
        "relp", "variance", ("variance", "x"), "patching",
    ]  # fmt: skip


def plain(value: Any) -> Any:
    """The same in Python's own types."""
    one = (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0) or isinstance(value, np.generic)
    return value.item() if one else value


def whole(least: int, most: float = float("inf")) -> May:
    def may(value: Any) -> bool:
        return type(plain(value)) is int and least <= plain(value) <= most

    return may


def number(least: float, most: float) -> May:
    return lambda value: type(plain(value)) in (int, float) and least <= plain(value) <= most


def flag(value: Any) -> bool:
    return type(plain(value)) is bool


def one_of(*choices: Any) -> May:
    return lambda value: isinstance(value, str) and value in choices


def instance(*types: type) -> May:
    return lambda value: isinstance(value, types)


def either(*mays: May) -> May:
    return lambda value: any(may(value) for may in mays)


def numbers(least: float, most: float) -> May:
    def may(value: Any) -> bool:
        listed = value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 1 else value
        return isinstance(listed, (list, tuple, range, set)) and all(map(number(least, most), listed))

    return may


none = instance(type(None))
some_callable = either(none, flag, lambda value: value is ignore)
# Bytes, such as "1GB".
memory = either(none, whole(0), one_of("1", "1GB"))


def mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.shape == circuit().mask.shape


def like_scores(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == circuit().mask.shape


def names(*known: str) -> May:
    def may(value: Any) -> bool:
        if isinstance(value, (np.ndarray, torch.Tensor)):
            return value.ndim == 1 and not len(value)
        return isinstance(value, (list, tuple, set)) and all(isinstance(x, str) and x in known for x in value)

    return may


def plan(**arguments: Any) -> Any:
    """What does not depend on the memory that is free and measured at the moment."""
    return replace(eap.plan(**arguments), tokens=0, bytes=0, budget=0)


class Function(NamedTuple):
    """A call with arguments that are right; what each of them may be; those on which the result does not depend."""

    call: Callable[..., Any]
    right: Callable[[], dict[str, Any]]
    may: dict[str, May]
    free: tuple[str, ...] = ()
    # Operators raise what Python's own functions do, in a sentence that begins with the operator's name.
    operator: str | None = None


def _run(**more: May) -> dict[str, May]:
    return {
        "data": instance(eap.PairedDataset),
        "metric": either(none, one_of("logit_diff")),
        "ablation": one_of(*ABLATIONS),
        "batch_size": either(none, whole(1)),
        "reuse_prefix": flag,
        "memory": memory,
        "progress": some_callable,
        "ablation_data": either(none, instance(eap.PairedDataset)),
        **more,
    }


FREE = ("batch_size", "reuse_prefix", "memory", "progress")
_ATTRIBUTE = _run(
    model=lambda value: value is model(),
    method=one_of(*METHODS),
    steps=whole(1, 100),
    quadrature=one_of(),
    heads=one_of("kv", "query"),
    compat=none,
    edges=none,
    checkpoint=none,
    keep=either(none, one_of("variance"), names("variance")),
    rules=either(none, one_of(*RULES)),
)
_PLAN = {name: may for name, may in _ATTRIBUTE.items() if name not in ("edges", "checkpoint", "progress")}
FUNCTIONS: dict[str, Function] = {
    "attribute": Function(
        eap.attribute, lambda: {"model": model(), "data": pairs(), "method": "eap"}, _ATTRIBUTE, FREE
    ),
    "plan": Function(plan, lambda: {"model": model(), "data": pairs(), "method": "eap"}, _PLAN),
    "evaluate": Function(
        eap.evaluate,
        lambda: {"model": model(), "circuit": circuit(), "data": pairs()},
        _run(
            model=lambda v: v is model(),
            circuit=either(instance(eap.Circuit), lambda v: isinstance(v, (list, tuple)) and not v),
        ),
        FREE,
    ),
    "faithfulness_curve": Function(
        eap.faithfulness_curve,
        lambda: {
            "model": model(),
            "scores": scores(),
            "data": pairs(),
            "fractions": (0.2,),
            "seeds": (0,),
            "baselines": ("random",),
        },
        _run(
            scores=instance(eap.EdgeScores),
            fractions=lambda v: numbers(1e-9, 1)(v) and len(v) > 0 and list(v) == sorted(set(v)),
            how=one_of("top", "greedy"),
            signed=flag,
            baselines=names("random", "complement"),
            seeds=lambda value: (
                numbers(0, 2**63)(value) and len(value) > 0 and all(type(plain(x)) is int for x in value)
            ),
            among=either(none, mask),
        ),
        FREE,
    ),
    "select": Function(
        lambda **asked: scores().select(**asked),
        lambda: {"n_edges": 20},
        {
            "n_edges": whole(0, 10**6),
            "how": one_of("top", "greedy"),
            "signed": flag,
            "threshold": none,
            "prune": flag,
            "positive_ratio": either(none, number(0, 1)),
            "among": either(none, mask),
            "seconds": number(0, float("inf")),
        },
    ),
    "select by threshold": Function(
        lambda **asked: scores().select(how="threshold", **asked),
        lambda: {"threshold": 0.1},
        {"threshold": number(-float("inf"), float("inf")), "n_edges": none, "positive_ratio": none},
    ),
    "random_circuit": Function(
        eap.random_circuit,
        lambda: {"graph": scores().graph, "n_edges": 20},
        {"graph": instance(eap.Graph), "n_edges": whole(0, 10**6), "seed": whole(-(2**63), 2**64)},
    ),
    "edge_overlap": Function(
        eap.edge_overlap,
        lambda: {"first": circuit(), "second": circuit().complement()},
        {"first": instance(eap.Circuit), "second": instance(eap.Circuit)},
    ),
    "edge_auroc": Function(
        eap.edge_auroc,
        lambda: {"scores": scores(), "circuit": circuit()},
        {"scores": instance(eap.EdgeScores), "circuit": instance(eap.Circuit), "signed": flag},
    ),
    "score_agreement": Function(
        eap.score_agreement,
        lambda: {"first": scores(), "second": scores()},
        {"first": instance(eap.EdgeScores), "second": instance(eap.EdgeScores), "among": either(none, mask)},
    ),
    "bootstrap_confidence": Function(
        eap.bootstrap_confidence,
        lambda: {"values": scores().per_example, "draws": 10},
        {"values": lambda _: False, "draws": whole(1, 10**4), "seed": whole(-(2**63), 2**64)},
    ),
    "from_tokens": Function(
        eap.PairedDataset.from_tokens,
        lambda: {"clean": [[2, 3, 4]], "corrupted": [[2, 5, 4]], "lengths": [3], "answers": [[5, 6]]},
        {"clean": lambda _: False, "corrupted": none, "answers": lambda _: False, "lengths": numbers(1, 3)},
    ),
    "from_records": Function(
        eap.PairedDataset.from_records,
        lambda: {
            "records": [{"clean": "Ann met Bob", "corrupted": "Cy met Bob", "answers": ["Ann", "Cy"]}],
            "tokenizer": tokenizer(),
        },
        {"records": lambda _: False, "tokenizer": lambda _: False, "prepend_bos": flag, "align": flag},
    ),
    "Circuit": Function(
        eap.Circuit,
        lambda: {"graph": scores().graph, "mask": circuit().mask},
        {
            "graph": instance(eap.Graph),
            "mask": lambda v: mask(v) and not bool(v.all()),
            "values": either(none, like_scores),
        },
    ),
    "EdgeScores": Function(
        eap.EdgeScores,
        lambda: {"graph": scores().graph, "values": scores().values},
        {
            "graph": instance(eap.Graph),
            "values": lambda v: (
                isinstance(v, torch.Tensor) and v.shape == circuit().mask.shape and v.is_floating_point()
            ),
            "variance": either(none, like_scores),
            "per_example": none,
        },
    ),
    "load_task": Function(
        eap.load_task,
        lambda: {"name": "ioi", "tokenizer": tokenizer()},
        dict.fromkeys(("name", "tokenizer", "n", "seed"), lambda _: False),
    ),
    "edge_scores": Function(
        ek.edge_scores,
        lambda: {"delta": torch.ones(3, 2, 4), "grad": torch.ones(2, 2, 4), "reach": torch.tensor([1, 3])},
        {
            "delta": lambda _: False,
            "grad": lambda _: False,
            "reach": lambda _: False,
            "out": none,
            "segments": none,
            "impl": one_of("auto", "reference"),
        },
        operator="edge_scores",
    ),
    "masked_read": Function(
        ek.masked_read,
        lambda: {"base": torch.ones(2, 4), "delta": torch.ones(3, 2, 4), "mask": torch.ones(3, 2, dtype=torch.bool)},
        dict.fromkeys(("base", "delta", "mask"), lambda _: False) | {"impl": one_of("auto", "reference")},
        operator="masked_read",
    ),
    "head_space_scores": Function(
        ek.head_space_scores,
        lambda: {
            "senders": [ek.Nodes(torch.ones(2, 3, 4))],
            "receivers": [ek.Nodes(torch.ones(2, 2, 4))],
            "reach": torch.tensor([1, 3]),
        },
        dict.fromkeys(("senders", "receivers", "reach"), lambda _: False)
        | {"out": none, "impl": one_of("auto", "reference"), "workspace": either(none, whole(1))},
        operator="head_space_scores",
    ),
}


def fuzz(tally: Tally, rng: random.Random, count: int) -> None:
    right = {name: function.call(**function.right()) for name, function in FUNCTIONS.items() if name != "load_task"}
    cases = [
        (name, argument, at) for name, f in FUNCTIONS.items() for argument in f.may for at in range(len(anything()))
    ]
    for name, argument, at in rng.sample(cases, min(count, len(cases))):
        function, value = FUNCTIONS[name], anything()[at]
        may = bool(function.may[argument](value))

        def call(function: Function = function, argument: str = argument, value: Any = value) -> Any:
            return function.call(**{**function.right(), argument: value})

        def judge(
            found: Any,
            function: Function = function,
            name: str = name,
            argument: str = argument,
            value: Any = value,
            may: bool = may,
        ) -> str | None:
            if not may and not (argument in function.right() and value is function.right()[argument]):
                return "taken without a word"
            if argument in function.free:
                return difference(found, right[name])
            if plain(value) is not value:
                return difference(found, function.call(**{**function.right(), argument: plain(value)}))
            return None

        def ours(error: BaseException, operator: str | None = function.operator) -> bool:
            if operator is None:
                return isinstance(error, eap.InputError)
            return isinstance(error, (TypeError, ValueError, RuntimeError)) and str(error).startswith(f"{operator}: ")

        shown = f"{type(value).__name__} {value!r:.60}".replace("\n", " ")
        tally.run(f"{name}({argument}={shown})", call, judge, ours)
