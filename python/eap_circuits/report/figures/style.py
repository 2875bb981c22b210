"""Colours and text of the figures."""

from __future__ import annotations

from typing import Any

INK, MUTED, FAINT, PAPER, NODE = "#1f2329", "#68717d", "#d9dee5", "#fefefe", "#eef2f7"
POSITIVE, NEGATIVE = "#2565ae", "#d1571b"
LETTERS = {"q": "#8a4fc7", "k": "#15866a", "v": "#b0850f"}

# The page's CSS variable for each colour, so that figures follow its light and dark themes.
PAGE_COLOURS = {
    "ink": INK,
    "muted": MUTED,
    "faint": FAINT,
    "paper": PAPER,
    "node": NODE,
    "positive": POSITIVE,
    "negative": NEGATIVE,
    "query": LETTERS["q"],
    "key": LETTERS["k"],
    "value": LETTERS["v"],
}

RC: Any = {  # for `matplotlib.rc_context`, whose own type lists every key
    "font.family": ["sans-serif"],
    "font.size": 9.0,
    "svg.fonttype": "none",  # text stays text, so that it can be searched and takes the page's colours
    "path.simplify": False,
}
