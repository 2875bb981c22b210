"""The explorer inside another page, as a notebook shows it."""

from __future__ import annotations

import base64
import io
from html import escape

from matplotlib.figure import Figure
from PIL import Image

from ..graph import Circuit, EdgeScores
from .explorer import page_data
from .page import rendered

# A notebook keeps all of its outputs: so many edges of each, and no explorer of models with more nodes and inputs,
# whose names alone would take a megabyte.
EDGES, NAMES = 2_000, 8_000
_HEIGHT = 640


def inline(scores: EdgeScores, circuit: Circuit, still: Figure) -> str | None:
    """The explorer as an element of a page, of less than 1 MB, or None for models with too many nodes for that.

    It is a page of its own in a frame of another origin, which reaches neither the notebook nor the network. The frame
    covers a still picture, which stays where frames are taken out: on GitHub, and in notebooks that are not trusted.

    Args:
        scores: what the circuit was chosen by; those of single examples, positions and spans are left out.
        circuit: the one shown first. Its edges are kept before others.
        still: the picture.
    """
    graph = scores.graph.base
    if graph.n_senders + graph.n_receivers > NAMES:
        return None
    title, bare = repr(circuit), EdgeScores(scores.graph, scores.values, scores.info, scores.variance)
    page = rendered("frame.html", title, page_data(bare, circuit, None, None, None, title, kept=EDGES))
    # In single quotes the JSON's double ones need not be escaped.
    page = page.replace("&", "&amp;").replace("'", "&#39;")
    return (
        f'<div style="position: relative; min-height: {_HEIGHT}px">'
        f'<img alt="{escape(str(still.get_label()))}" src="data:image/png;base64,{_png(still)}"'
        f' style="max-width: 100%; max-height: {_HEIGHT}px">'
        f'<iframe title="explorer" sandbox="allow-scripts allow-downloads" srcdoc=\'{page}\''
        ' style="position: absolute; inset: 0; width: 100%; height: 100%; border: 0; background: white"></iframe></div>'
    )


def _png(figure: Figure) -> str:
    """The figure in few colours and no larger than it is shown, in base64."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=min(100.0, 1.5 * _HEIGHT / figure.get_figheight()), facecolor="white")
    Image.open(drawn).convert("RGB").quantize(64).save(small, format="png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()
