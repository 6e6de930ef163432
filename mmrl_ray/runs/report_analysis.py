"""What a report says of the policy's inside: a map of its states before and after, and what captions go with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure

from mmrl_ray.analysis.correlation import Correlation
from mmrl_ray.analysis.pca import PCAResult, fit_pca
from mmrl_ray.runs.report_svg import INK, Chart, colour, quiet_axes, svg_data_uri
from mmrl_ray.runs.state_records import States, correlation_lines

_COMPONENTS = 2
_COLOURS = {"before": 1, "after": 0}
_MARKS = {"before": "o", "after": "^"}
_LINKS = 150
"""Samples up to which a line joins a sample's two states."""

Sides = Mapping[str, States]
"""Under "before" and "after", those that there are."""


def state_map(sides: Sides) -> Chart | None:
    """Hidden states of held-out captions on two principal components, one fit for both sides (docs/equations.md 11)."""
    fit = _fit(sides)
    if fit is None:
        return None
    points = {name: fit.transform(states.hidden.double()) for name, states in sides.items()}
    ratios = [float(ratio) for ratio in fit.explained_variance_ratio]
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    if len(points) == 2 and sides["before"].same_rows(sides["after"]):
        pairs = torch.stack([points["before"], points["after"]], dim=1)[:_LINKS]
        for pair in pairs.tolist():
            x, y = zip(*pair, strict=True)
            axes.plot(x, y, color=colour(INK), linewidth=0.4, alpha=0.25)
    for name, z in points.items():
        x, y = z.T.tolist()
        mark, shade = _MARKS[name], colour(_COLOURS[name])
        axes.scatter(x, y, s=10, alpha=0.75, linewidths=0, marker=mark, color=shade, label=name)
    axes.set_xlabel(f"first component, {ratios[0]:.0%} of the variance", color=colour(INK), fontsize=8)
    axes.set_ylabel(f"second component, {ratios[1]:.0%} of the variance", color=colour(INK), fontsize=8)
    quiet_axes(axes, legend=True)
    count = sum(len(states.sample_ids) for states in sides.values())
    caption = drift(sides)
    alt = (
        f"Scatter plot: {count} mean hidden states of held-out captions, {' and '.join(points)}, on two principal "
        f"components with {ratios[0]:.0%} and {ratios[1]:.0%} of the variance. {caption}"
    )
    return Chart("States of the policy, one fit of principal components", svg_data_uri(figure), alt, caption, wide=True)


def drift(sides: Sides) -> str:
    """How far the states moved, in units of their spread before: the mean of all, and a sample on average."""
    if len(sides) < 2 or not sides["before"].same_rows(sides["after"]):
        return ""
    before, after = (sides[name].hidden.double() for name in ("before", "after"))
    spread = float((before - before.mean(dim=0)).square().sum(dim=1).mean().sqrt())
    if spread == 0.0 or before.shape != after.shape:
        return ""
    together = float((after.mean(dim=0) - before.mean(dim=0)).norm()) / spread
    each = float((after - before).norm(dim=1).mean()) / spread
    return f"The mean state moved by {together:.2f} of the spread that they had before, a sample's by {each:.2f}."


def correlation_table(sides: Sides) -> dict[str, Any]:
    """|ρ| of what is said with each modality's state (docs/equations.md 17), for the template; may be empty."""
    found = {name: states.correlations for name, states in sides.items()}
    names = dict.fromkeys(name for each in found.values() for name in each)
    return {
        "sides": list(found),
        "rows": [{"modality": name, "cells": [_cell(each, name) for each in found.values()]} for name in names],
        "samples": max((len(states.sample_ids) for states in sides.values()), default=0),
    }


def _fit(sides: Sides) -> PCAResult | None:
    """Of all states together; None where two components cannot be had."""
    widths = {states.hidden.shape[1] for states in sides.values()}
    if len(widths) != 1:
        return None
    both = torch.cat([states.hidden.double() for states in sides.values()])
    if min(both.shape) < _COMPONENTS:
        return None
    fit = fit_pca(both, _COMPONENTS)
    return None if math.isnan(float(fit.explained_variance_ratio[0])) else fit


def _cell(found: Mapping[str, Correlation], name: str) -> dict[str, str]:
    ((_, rho, p_value),) = correlation_lines({name: found[name]}) if name in found else ((name, "–", ""),)
    return {"rho": rho, "p_value": p_value}
