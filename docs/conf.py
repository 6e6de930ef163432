"""Sphinx: strict (the Makefile turns warnings into errors), offline, its reference pages made by `generate.py`."""

from __future__ import annotations

import re
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
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
smartquotes = False  # it would make a dash of the two before an option
nitpicky = True
# Types in signatures of which this site has no page: those of other libraries, and of modules that are not public.
_PUBLIC = "|".join(re.escape(module) for modules in generate.PUBLIC.values() for module in modules)
nitpick_ignore_regex = [("py:class", rf"(?!({_PUBLIC})\.).*")]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "mmrl_ray"
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = False

generate.write_all(HERE / "_generated")
