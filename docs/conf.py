"""Sphinx's settings for the site; `build.py` stages the pages."""

from megatron_prealign import __version__

project = "megatron-prealign"
author = "the megatron-prealign authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
# Docstrings write `code` with single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
napoleon_use_rtype = False
napoleon_use_ivar = True
# Fields such as `Fertility.bytes` make the annotation `bytes` of every other module an ambiguous reference.
suppress_warnings = ["ref.python"]
