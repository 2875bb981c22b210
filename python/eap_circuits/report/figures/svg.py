"""Figures as SVG elements of a page."""

from __future__ import annotations

import html
import io
import re

import matplotlib
from matplotlib.figure import Figure

from .style import PAGE_COLOURS, RC


def to_svg(figure: Figure, label: str | None = None) -> str:
    """The figure as one self-contained `<svg>` element.

    Its colours are the page's CSS variables, with the figure's own colours as the fallback. Its width follows the page,
    and an edge shows its name and score when pointed at.

    Args:
        figure: what `draw_circuit` or `draw_curve` returned.
        label: a description for readers who cannot see the figure, by default its own label; each figure of a page
            needs another.
    """
    label = str(figure.get_label()) if label is None else label
    file = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({**RC, "svg.hashsalt": label}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="edge ([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figures of one page may not share ids
    for name, colour in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    width = 96 * figure.get_figwidth()
    head = head.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
    return f'{head} style="max-width: {width:.0f}px">{rest}'
