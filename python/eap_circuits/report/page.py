"""Pages that hold the explorer: the report, and the small one inside a notebook."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from .explorer import asset, policy


def rendered(template: str, title: str, data: str, **parts: Any) -> str:
    """A page that needs nothing else, in which only the explorer's script runs.

    Args:
        template: a file of this folder, `frame.html` or one that extends it.
        title: the page's title.
        data: what the explorer shows, from `page_data`.
        parts: what else the template names; texts are escaped.
    """
    loader = jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    script = asset("explorer.js")
    return environment.get_template(template).render(
        title=title,
        data=Markup(data),
        script=Markup(script),
        style=Markup(asset("explorer.css")),
        policy=policy(script),
        **parts,
    )
