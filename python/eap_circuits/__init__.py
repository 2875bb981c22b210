"""Find circuits in Hugging Face language models by edge attribution patching, and measure how faithful they are."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_COMMAND = Path(sys.argv[0]).stem == "eap"
# Of the extra `circuits`, what the imports below need, and the command besides.
_NEEDED = ("numpy", "packaging", "safetensors", "transformers", *(("rich", "typer") if _COMMAND else ()))


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


_missing = [name for name in _NEEDED if not _found(name)]
if not _missing and int(metadata.version("transformers").split(".")[0]) < 5:
    _missing = [f"transformers >= 5 (found {metadata.version('transformers')})"]
if _missing:
    _problem = f"eap_circuits needs {', '.join(_missing)}: pip install 'eap-kernels[circuits]' brings what is missing."
    if _COMMAND:  # no traceback in a terminal
        sys.exit(f"eap: {_problem}")
    raise ImportError(_problem)

if TYPE_CHECKING:
    from .adapters import Family, Mixer, register_family
    from .cards import FaithfulnessCard, faithfulness_card
    from .errors import InputError
    from .evaluation import (
        Comparison,
        Curve,
        EvaluationResult,
        compare,
        evaluate,
        faithfulness_curve,
        optimal_constants,
        summarise,
    )
    from .graph import (
        Circuit,
        EdgeScores,
        Graph,
        NodeScores,
        bootstrap_confidence,
        diff,
        edge_auroc,
        edge_overlap,
        ensemble,
        node_overlap,
        normal_confidence,
        random_circuit,
        score_agreement,
    )
    from .learning import acdc, attribute_circuit, ibcircuit, learn_mask, prune_gradually, refine
    from .methods import Plan, attribute, plan
    from .metrics import METRICS
    from .request import image_pairs, image_pairs_from_file
    from .selfcheck import check_model, discover
    from .standalone import CircuitModel, circuit_model, export_model
    from .tasks import PairedDataset, load_task

# Public names are loaded on first use, so that graphs load without transformers.
_NAMES = {
    "adapters": ("Family", "Mixer", "register_family"),
    "cards": ("FaithfulnessCard", "faithfulness_card"),
    "errors": ("InputError",),
    "evaluation": (
        *("Comparison", "Curve", "EvaluationResult"),
        *("compare", "evaluate", "faithfulness_curve", "optimal_constants", "summarise"),
    ),
    "graph": (
        *("Circuit", "EdgeScores", "Graph", "NodeScores"),
        *("bootstrap_confidence", "diff", "edge_auroc", "edge_overlap", "ensemble", "node_overlap"),
        *("normal_confidence", "random_circuit", "score_agreement"),
    ),
    "learning": ("acdc", "attribute_circuit", "ibcircuit", "learn_mask", "prune_gradually", "refine"),
    "methods": ("Plan", "attribute", "plan"),
    "metrics": ("METRICS",),
    "request": ("image_pairs", "image_pairs_from_file"),
    "selfcheck": ("check_model", "discover"),
    "standalone": ("CircuitModel", "circuit_model", "export_model"),
    "tasks": ("PairedDataset", "load_task"),
}
_HOME = {name: room for room, names in _NAMES.items() for name in names}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
