"""The curves of a report: metrics lines in, small SVG pictures out, readable on light and dark paper.

Colours are CSS variables inside the picture, so that one picture follows the reader's light or dark setting. Text
stays text. Nothing in a picture points outside it.
"""

from __future__ import annotations

import base64
import difflib
import io
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from mmrl_ray.algorithms.base import Panel
from mmrl_ray.algorithms.registry import FAMILIES
from mmrl_ray.config.reward import RESERVED_NAMES
from mmrl_ray.errors import ConfigError
from mmrl_ray.telemetry.terminal import visible

Metrics = Sequence[Mapping[str, Any]]
Curve = list[tuple[float, float]]
"""(step, value)."""

MAX_POINTS = 300
"""Points of one curve; longer runs are drawn as means of equal stretches of steps."""

_SERIES = 8
_SLIVER = 0.01
"""Share of all the seconds below which a phase is not drawn by itself."""
_ROUNDING = 1e-6
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


_NOT_PHASES = ("seconds/total", "seconds/step", "seconds/wait_plan", "seconds/workers_idle")
"""The step as a whole, and time that others spent meanwhile."""

PANELS: tuple[Panel, ...] = (
    Panel("Reward, mean ± standard deviation", ("reward/mean",), band=("reward/mean", "reward/std")),
    Panel(
        "Reward parts",
        ("reward/",),
        exclude=tuple(f"reward/{name}" for name in RESERVED_NAMES),
    ),
    Panel("Importance of each modality, share", ("importance/",)),
    Panel("Importance of each modality, RMS", ("importance_rms/",), unit="nats a unit of embedding"),
    Panel("Reward less its uncertainty, and that", ("reward/adjusted", "reward/sigma")),
    Panel("Spread of reward parts within groups", ("reward_group_std/",)),
    Panel("Weights and risk of the reward", ("reward_weight/", "reward/risk", "reward/normalized")),
    Panel("Loss and its terms", ("loss", "loss/")),
    *(panel for family in FAMILIES for panel in family.panels),
    Panel("KL to the reference policy, or to the teacher", ("kl", "kl/"), unit="nats a token"),
    Panel("Entropy", ("entropy", "entropy/"), unit="nats a token"),
    Panel("Gradient norm", ("grad_norm",)),
    Panel("Importance ratios", ("ratio_mean", "behaviour_ratio_mean", "effective_samples")),
    Panel(
        "Sampler against learner, on-policy: |log ratio|", ("sampler_gap/max", "sampler_gap/mean"), unit="nats a token"
    ),
    Panel(
        "Sampler against learner, stale groups: |log ratio|",
        ("sampler_gap/stale_max", "sampler_gap/stale_mean"),
        unit="nats a token",
    ),
    Panel("Share of tokens clipped or capped", ("clip_fraction", "behaviour_capped_fraction")),
    Panel("Prompt tokens found in the prefix cache of vLLM", ("engine/prefix_cache_hit_fraction",), unit="share"),
    Panel("Learning rate", ("lr",)),
    Panel("Completion length", ("completion_length", "completion/length_mean", "completion/length_max"), unit="tokens"),
    Panel("Staleness", ("staleness", "staleness/"), unit="policy versions"),
    Panel("Throughput", ("samples_per_second",), unit="completions a second"),
    Panel(
        "Groups masked, dropped, without signal", ("masked", "dropped", "reward/zero_variance_groups"), unit="groups"
    ),
    Panel("Dynamic sampling: groups of a step", ("sampled/groups", "sampled/with_spread"), unit="groups"),
    Panel("Captions that were cut off, or nearly", ("truncated/masked", "overlong/share"), unit="share"),
    Panel("Seconds by phase", ("seconds/",), exclude=_NOT_PHASES, unit="seconds", stacked=True),
)
INK, GRID = 16, 17
"""Numbers of the colours of text and of lines; 0 to 7 are for what is drawn."""
_LIGHT = ("#0b62a8", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#be185d", "#0f766e", "#475569")
_LIGHT_INK, _LIGHT_GRID = "#374151", "#d5dae1"
_ON_PAPER: ContextVar[bool] = ContextVar("on_paper", default=False)
_DARK = ("#6cb6ff", "#ff9d5c", "#5fd68a", "#c3a6ff", "#f2c14e", "#ff8cc6", "#4fd6c4", "#a9b6c9")


class Drawing(Figure):
    """A figure of matplotlib that notebooks show whether or not they have a backend of it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def draw(names: Sequence[str], lines: Metrics, *, title: str = "", known: Sequence[Panel] = PANELS) -> Drawing:
    """Curves of these metrics (or `prefix/` families) over steps, on white paper; a band where a panel has one.

    Args:
        names: one at least.
        lines: with a `step` each.

    Raises:
        ConfigError: nobody has written a number under that name; says which are near.
    """
    found: dict[str, None] = {}
    for name in names:
        matching = _names(Panel(name, (name,)), lines)
        if not matching:
            raise ConfigError(_unknown_metric(name, lines))
        found |= dict.fromkeys(matching)
    panel = next((each for each in known if each.names == tuple(names)), Panel("", tuple(names)))
    token = _ON_PAPER.set(True)
    try:
        figure = Drawing(figsize=(7.0, 3.6), layout="constrained")
        axes = figure.add_subplot()
        curves = {name: _curve(name, lines) for name in found}
        _lines(axes, curves)
        if panel.band is not None:
            _band(axes, *(_curve(name, lines) for name in panel.band))
        _dress(axes, panel, legend=len(curves) > 1)
        axes.set_title(title or panel.title or ", ".join(names), color=colour(INK), fontsize=10)
        for text in figure.findobj(Text):  # a name of somebody's may hold a dollar sign, and is no formula
            text.set_parse_math(False)
    finally:
        _ON_PAPER.reset(token)
    return figure


def _unknown_metric(name: str, lines: Metrics) -> str:
    known = dict.fromkeys(key for line in lines for key, value in line.items() if is_number(value) and key != "step")
    if not known:
        return f"there is no metric {name}: no step was finished yet"
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    near += [each for each in known if name.lower() in each.lower() and each not in near][:4]
    if near:
        return f"there is no metric {name}; did you mean {', '.join(near)}?"
    families = dict.fromkeys(key.split("/", 1)[0] + "/" if "/" in key else key for key in known)
    return f"there is no metric {name}; there are {', '.join(families)}"


def charts(metrics: Metrics, own: Sequence[Panel] = ()) -> list[Chart]:
    """Every chart that these metrics lines have values for, in reading order; none of what never changes.

    `own` are those of an algorithm of the user's own.
    """
    made = (_chart(panel, metrics) for panel in (*PANELS, *own) if not _is_flat(panel, metrics))
    return [chart for chart in made if chart is not None]


def held_out_charts(lines: Metrics) -> list[Chart]:
    """A curve with its 95 % intervals for each measure of evaluations while the run learned, of `eval/steps.jsonl`.

    The one that chose the best checkpoint comes first, and a line stands at that.
    """
    names = dict.fromkeys(name for line in lines for name in (line["metric"], *line["intervals"]))
    return [chart for name in names if (chart := _held_out_chart(name, lines)) is not None]


def _held_out_chart(name: str, lines: Metrics) -> Chart | None:
    best = lines[-1]["best"]
    decides = ", which chooses the best checkpoint" if name == lines[-1]["metric"] else ""
    return _interval_chart(Panel(f"Held out: {name}{decides}", (f"eval/{name}",)), {name: name}, lines, best)


def sight_charts(lines: Metrics) -> list[Chart]:
    """What the own picture is worth by step, of `eval/blind.jsonl`: beside another's, and beside a grey one."""
    made = []
    for name, what, unit in (
        ("gap_logprob", "references", "nats a token"),
        ("gap_caption", "the policy's own captions", "nats a token"),
        ("gap_reward", "the reward of its captions", ""),
    ):
        panel = Panel(f"What the own picture is worth to {what}", (f"blind/{name}",), unit=unit)
        found = {"beside another's": name, "beside a grey one": f"{name}_grey"}
        found |= {"beside itself upside down": "gap_places"} if name == "gap_logprob" else {}
        made.append(_interval_chart(panel, found, lines, None))
    return [chart for chart in made if chart is not None]


def _interval_chart(panel: Panel, names: Mapping[str, str], lines: Metrics, best: int | None) -> Chart | None:
    """Curves with their 95 % intervals, by label; None of fewer than two points."""
    found = {
        label: [(float(line["step"]), line["intervals"][name]) for line in lines if name in line["intervals"]]
        for label, name in names.items()
    }
    curves = {label: [(step, float(each["value"])) for step, each in points] for label, points in found.items()}
    curves = {label: curve for label, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    figure = Figure(figsize=(4.4, 2.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (label, curve) in enumerate(curves.items()):
        x, y = zip(*curve, strict=True)
        shade = colour(2 * i)  # the second of them marks the best
        axes.plot(x, y, color=shade, marker="o", markersize=3, linewidth=1.6, linestyle=_DASHES[i], label=label)
        known = [(step, each) for step, each in found[label] if is_number(each["low"]) and is_number(each["high"])]
        low, high = ([each[end] for _, each in known] for end in ("low", "high"))
        axes.fill_between([step for step, _ in known], low, high, color=shade, alpha=0.18, linewidth=0)
    if best is not None:
        axes.axvline(best, color=colour(1), linewidth=1.0, linestyle=_DASHES[1])
    _dress(axes, panel, legend=len(curves) > 1)
    told = "" if best is None else f" The best checkpoint is that of step {best}."
    return Chart(panel.title, svg_data_uri(figure), f"{_alt(panel, curves)}{told}", _first_last(curves))


def constants(metrics: Metrics) -> dict[str, float]:
    """The metrics of panels in which nothing ever changes: a sentence says that better than a chart."""
    flat = [panel for panel in PANELS if _is_flat(panel, metrics)]
    return {name: _values(name, metrics)[0] for panel in flat for name in _names(panel, metrics)}


def charted_names(metrics: Metrics) -> set[str]:
    """Metric names that some chart shows."""
    return {name for panel in PANELS for name in (*_names(panel, metrics), *(panel.band or ()))}


def _names(panel: Panel, metrics: Metrics) -> list[str]:
    """The numeric metrics of a panel that occur, by the panel's order, then as first seen."""
    seen = {k: None for line in metrics for k, v in line.items() if is_number(v)}
    found: dict[str, None] = {}
    for wanted in panel.names:
        for name in seen:
            if name == wanted or (wanted.endswith("/") and name.startswith(wanted)):
                found[name] = None
    return [n for n in found if n not in panel.exclude]


def _is_flat(panel: Panel, metrics: Metrics) -> bool:
    """Whether every metric of the panel keeps its value over two steps or more, up to rounding."""
    columns = [_values(name, metrics) for name in _names(panel, metrics)]
    flat = all(max(c) - min(c) <= _ROUNDING * max(1.0, abs(max(c))) for c in columns)
    return bool(columns) and max(map(len, columns)) > 1 and flat


def _values(name: str, metrics: Metrics) -> list[float]:
    return [float(line[name]) for line in metrics if is_number(line.get(name))]


def _chart(panel: Panel, metrics: Metrics) -> Chart | None:
    curves = {name: _curve(name, metrics) for name in _names(panel, metrics)}
    if panel.stacked:
        curves = _without_slivers(curves)
    elif len(curves) > 1:  # a curve that is 0 all along only crowds the legend
        curves = {name: c for name, c in curves.items() if any(y for _, y in c)} or curves
    if not curves:
        return None
    figure = Figure(figsize=(9.0, 2.6) if panel.stacked else (4.4, 2.5), layout="constrained")
    axes = figure.add_subplot()
    if panel.stacked:
        _stack(axes, {_label(panel, name): curve for name, curve in curves.items()})
    else:
        _lines(axes, {_label(panel, name): curve for name, curve in curves.items()})
    if panel.band is not None:
        _band(axes, *(_curve(name, metrics) for name in panel.band))
    _dress(axes, panel, legend=len(curves) > 1)
    return Chart(panel.title, svg_data_uri(figure), _alt(panel, curves), _first_last(curves), wide=panel.stacked)


def _without_slivers(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The largest areas; those too thin to be seen, or beyond the number of colours, as one called "other"."""
    total = {name: math.fsum(y for _, y in curve) for name, curve in curves.items()}
    whole = math.fsum(total.values())
    large = sorted((n for n in curves if total[n] > _SLIVER * whole), key=lambda n: -total[n])[: _SERIES - 1]
    kept = {name: curve for name, curve in curves.items() if name in large}
    rest: dict[float, float] = {}
    for name in curves.keys() - kept.keys():
        for x, y in curves[name]:
            rest[x] = rest.get(x, 0.0) + y
    return {**kept, "other": sorted(rest.items())} if any(rest.values()) else kept


def _curve(name: str, metrics: Metrics) -> Curve:
    """(step, value) of one metric, thinned to `MAX_POINTS` by means over equal stretches."""
    points = [
        (float(line.get("step", i)), float(line[name])) for i, line in enumerate(metrics) if is_number(line.get(name))
    ]
    if len(points) <= MAX_POINTS:
        return points
    edges = [round(i * len(points) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    chunks = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(math.fsum(x for x, _ in c) / len(c), math.fsum(y for _, y in c) / len(c)) for c in chunks]


def _label(panel: Panel, name: str) -> str:
    """Without the family's name where the panel's title has it already; `loss` and `kl` are curves themselves."""
    prefix = name.split("/", 1)[0] + "/"
    label = visible(name.removeprefix(prefix) if panel.names == (prefix,) or prefix == "completion/" else name)
    # matplotlib leaves what begins with an underscore out of its legends.
    return f"\u200b{label}" if label.startswith("_") else label


def _lines(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for i, (name, points) in enumerate(curves.items()):
        style = _DASHES[(i // _SERIES + i) % len(_DASHES)] if len(curves) > 1 else "-"
        marker = "o" if len(points) == 1 else ""
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour(i % _SERIES), linestyle=style, marker=marker, linewidth=1.6, label=name)


def _stack(axes: Axes, curves: Mapping[str, Curve]) -> None:
    steps = sorted({x for points in curves.values() for x, _ in points})
    heights = [[dict(points).get(x, 0.0) for x in steps] for points in curves.values()]
    colours = [colour(i % _SERIES) for i in range(len(curves))]
    if len(steps) == 1:  # one step has no area
        base = 0.0
        for (height,), shade, name in zip(heights, colours, curves, strict=True):
            axes.bar(steps, [height], bottom=base, color=shade, label=name, width=0.6)
            base += height
        return
    axes.stackplot(steps, heights, labels=list(curves), colors=colours, linewidth=0, alpha=0.85)


def _band(axes: Axes, mean: Curve, std: Curve) -> None:
    if len(mean) != len(std):
        return
    x = [p[0] for p in mean]
    low = [m - s for (_, m), (_, s) in zip(mean, std, strict=True)]
    high = [m + s for (_, m), (_, s) in zip(mean, std, strict=True)]
    axes.fill_between(x, low, high, color=colour(0), alpha=0.18, linewidth=0)


def _dress(axes: Axes, panel: Panel, *, legend: bool) -> None:
    """Quiet axes; a legend beside the plot, where it hides nothing."""
    ink = colour(INK)
    axes.set_xlabel("step", color=ink, fontsize=8)
    if panel.unit:
        axes.set_ylabel(panel.unit, color=ink, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set(color=ink, fontsize=7)
    axes.grid(axis="y", color=colour(GRID), linewidth=0.6)
    quiet_axes(axes, legend=legend)


def _alt(panel: Panel, curves: Mapping[str, Curve]) -> str:
    first, last = (f(p[0] for points in curves.values() for p in points) for f in (min, max))
    told = [
        f"{name} from {_figure(y[0])} to {_figure(y[-1])}, between {_figure(min(y))} and {_figure(max(y))}"
        for name, y in ((name, [p[1] for p in points]) for name, points in curves.items())
    ]
    kind = "Stacked areas" if panel.stacked else "Line chart"
    return f"{kind}: {panel.title}, steps {first:.0f} to {last:.0f}. {'; '.join(told)}."


def _first_last(curves: Mapping[str, Curve]) -> str:
    if len(curves) > 1:
        return ""
    ((_, points),) = curves.items()
    return f"{_figure(points[0][1])} → {_figure(points[-1][1])}"


def _figure(value: float) -> str:
    return f"{value:.3g}"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value can be drawn: a finite number, not a flag."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
    """A stand-in that `svg_data_uri` turns into the CSS variable of that number; within `draw` the colour itself."""
    if _ON_PAPER.get():
        return {INK: _LIGHT_INK, GRID: _LIGHT_GRID}.get(index) or _LIGHT[index]
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

    light = variables(_LIGHT, _LIGHT_INK, _LIGHT_GRID)
    dark = variables(_DARK, "#c5cdd8", "#3a424e")
    fonts = "text{font-family:system-ui,sans-serif!important}"
    return f"<style>{light}@media screen and (prefers-color-scheme:dark){{{dark}}}{fonts}</style>"
