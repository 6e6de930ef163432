"""Sphinx: strict (the Makefile turns warnings into errors), offline, its reference pages made by `generate.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402
from docutils import nodes  # noqa: E402
from docutils.utils.math.latex2mathml import tex2mathml  # noqa: E402

import mmrl_ray  # noqa: E402

project = "mmrl_ray"
copyright = "the mmrl_ray maintainers"
release = version = mmrl_ray.__version__
extensions = ["myst_parser"]
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
smartquotes = False  # it would make a dash of the two before an option
nitpicky = True
# Types in signatures of which this site has no page: those of other libraries, and of modules that are not public.
_PUBLIC = "|".join(re.escape(module) for modules in generate.PUBLIC.values() for module in modules)
nitpick_ignore_regex = [("py:class", rf"(?!({_PUBLIC})\.).*")]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "mmrl_ray"
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = False

generate.write_all(HERE / "_generated")


def setup(app: Any) -> None:
    """Formulas as MathML, which browsers draw by themselves: a page loads nothing from elsewhere."""
    app.add_html_math_renderer("mathml", (_formula, None), (_display, None))


def _formula(page: Any, node: nodes.math) -> None:
    page.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _display(page: Any, node: nodes.math_block) -> None:
    page.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode
