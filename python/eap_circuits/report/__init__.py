"""Tables, figures and the HTML report of a circuit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .curves import SavedCurve, load_curve, save_curve, smallest_faithful
    from .figures import draw_circuit, draw_curve, draw_heatmap
    from .html import write_report

# Loaded on first use: tables need neither matplotlib nor jinja2.
_HOME = {
    "SavedCurve": "curves",
    "load_curve": "curves",
    "save_curve": "curves",
    "smallest_faithful": "curves",
    "draw_circuit": "figures",
    "draw_curve": "figures",
    "draw_heatmap": "figures",
    "write_report": "html",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
