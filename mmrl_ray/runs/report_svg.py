"""The pictures of a report as SVG, readable on light and dark paper.

Colours are CSS variables inside the picture, so that one picture follows the reader's light or dark setting. Text
stays text. Nothing in a picture points outside it.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

INK, GRID = 16, 17
"""Numbers of the colours of text and of lines; 0 to 7 are for what is drawn."""
_LIGHT = ("#0b62a8", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#be185d", "#0f766e", "#475569")
_DARK = ("#6cb6ff", "#ff9d5c", "#5fd68a", "#c3a6ff", "#f2c14e", "#ff8cc6", "#4fd6c4", "#a9b6c9")


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture with the words that stand for it."""

    title: str
    data_uri: str
    alt: str
    """For those who cannot see it: what is drawn, and first, last, smallest and largest value of each curve."""
    caption: str
    """First and last values."""
    wide: bool = False


def quiet_axes(axes: Axes, *, legend: bool) -> None:
    """Thin lines on two sides, small figures, and a legend beside the plot, where it hides nothing."""
    ink, grid = colour(INK), colour(GRID)
    axes.tick_params(colors=ink, labelcolor=ink, labelsize=8, length=2, width=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=grid, linewidth=0.8)
    if legend:
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7, labelcolor=ink, handlelength=1.8
        )


def colour(index: int) -> str:
    """A stand-in that `svg_data_uri` turns into the CSS variable of that number."""
    return f"#0000{index + 1:02x}"


def svg_data_uri(figure: Figure) -> str:
    """The picture as a data URI."""
    for text in figure.findobj(Text):  # a name of somebody's may hold a dollar sign, and is no formula
        text.set_parse_math(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmrl"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # text stays text: the reader's fonts draw it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the doctype, which names a host
    svg = re.sub(r"#0000([0-9a-f]{2})", lambda m: f"var(--c{int(m[1], 16) - 1})" if m[1] != "00" else m[0], svg)
    head, _, rest = svg.partition(">")
    return "data:image/svg+xml;base64," + base64.b64encode(f"{head}>{_stylesheet()}{rest}".encode()).decode()


def _stylesheet() -> str:
    def variables(series: Sequence[str], ink: str, grid: str) -> str:
        pairs = [*enumerate(series), (INK, ink), (GRID, grid)]
        return "svg{" + "".join(f"--c{i}:{value};" for i, value in pairs) + "}"

    light = variables(_LIGHT, "#374151", "#d5dae1")
    dark = variables(_DARK, "#c5cdd8", "#3a424e")
    fonts = "text{font-family:system-ui,sans-serif!important}"
    return f"<style>{light}@media screen and (prefers-color-scheme:dark){{{dark}}}{fonts}</style>"
