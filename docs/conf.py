"""Sphinx: strict (the Makefile turns warnings into errors), offline, its reference pages made by `generate.py`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import mmrl_ray  # noqa: E402

project = "mmrl_ray"
copyright = "the mmrl_ray maintainers"
release = version = mmrl_ray.__version__
extensions = ["myst_parser"]
exclude_patterns = ["_build", "_generated", "requirements.txt"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nitpicky = True
# Types in signatures: those of other libraries have no page here, and our own carriers are explained where they pass.
nitpick_ignore_regex = [("py:class", r".*")]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "mmrl_ray"
html_show_sourcelink = False
html_copy_source = False

generate.write_all(HERE / "_generated")
