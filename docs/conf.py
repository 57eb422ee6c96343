"""How Sphinx builds the site: `python cleanup.py docs`."""

from __future__ import annotations

import opero

project = "opero"
author = "opero contributors"
copyright = author  # noqa: A001 - the name that Sphinx reads
release = version = opero.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "py:obj"  # docstrings name objects in single backquotes

html_theme = "furo"
html_title = "opero"
html_static_path = ["_static"]
html_css_files = ["opero.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "source_repository": "https://github.com/twardoch/opero/",
    "source_branch": "main",
    "source_directory": "docs/",
}

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say in words what comes in; the signatures would be longer than they
napoleon_google_docstring = True
napoleon_use_ivar = True  # attributes stay within their class, and are no second description of a property
napoleon_use_rtype = False
add_module_names = False
