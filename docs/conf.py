"""Sphinx: `bash scripts/docs.sh` makes the pages that are not written (scripts/docs.py) and calls it on all of them."""

import re
from typing import Any

from sphinx.application import Sphinx

from mmssl.version import __version__

project = "mmssl"
release = __version__
copyright = "the mmssl authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["readme.md"]  # is part of index.md

# A heading of a page is an anchor by the name that GitHub gives it; one that is missing fails the build.
myst_heading_anchors = 3

# Docstrings are Google's, and a name between single backticks is code there.
default_role = "code"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
autodoc_typehints_format = "short"
# What is public has a page; types of torch and of rooms below are named in signatures without one.
nitpick_ignore_regex = [("py:.*", r"(?!mmssl\.\w+$).*")]

html_theme = "furo"
html_title = f"mmssl {release}"
html_copy_source = False
html_show_sphinx = False


def shorten(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returned: str) -> Any:
    """Types of dataclasses by their last part, as elsewhere: Sphinx gives up on defaults that are made by a factory."""
    return (re.sub(r"~(?:\w+\.)*", "", signature), returned) if what == "class" and signature else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", shorten)
