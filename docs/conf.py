"""The documentation site: `make docs` builds it from the pages, the docstrings and the tutorials.

The repository's root is the source folder, so that a link is right on the site and in the repository alike. Sphinx,
furo and MyST are well kept, and MyST-NB runs the tutorials; MkDocs had its last release in 2024.
"""

from __future__ import annotations

import importlib
import os
import re
from typing import Any

import eap_kernels

project, author, version = "eap-kernels", "the authors of eap-kernels", eap_kernels.__version__
project_copyright = "the authors of eap-kernels; Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**"]
exclude_patterns = ["docs/**/*.py", "docs/site", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = f"eap-kernels {version}"
html_extra_path = ["site/index.html"]
html_static_path = ["site/site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

# A name in a docstring's backticks becomes a link if it is one of ours, and else stays code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
myst_heading_anchors = 4

# Notebooks are committed without outputs. Here they run, those that have run before only if they have changed.
nb_execution_mode = "cache"
nb_execution_cache_path = "build/tutorials"
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True

# A page has no progress bars, nor advice on them.
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}

PACKAGES = ("eap_circuits", "eap_kernels")


def undocumented(app: Any, env: Any) -> None:
    """A warning, and so an error, for each public name that is on no page."""
    from sphinx.util import logging

    documented = env.domains["py"].objects
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            if name != "__version__" and f"{package}.{name}" not in documented:
                logging.getLogger(__name__).warning("no page documents %s.%s", package, name)


def readable(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make links of the pages and the names in a docstring; |x| is an absolute value in it, not a substitution."""
    for i, line in enumerate(lines):
        line = re.sub(r"docs/([\w/-]+)\.md", r":doc:`/docs/\1`", line.replace("|", "\\|"))
        lines[i] = re.sub(r"`eap\.(\w+)`", r"`eap.\1 <eap_circuits.\1>`", line)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", readable)
    app.connect("env-check-consistency", undocumented)
