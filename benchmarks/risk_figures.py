"""The table and the plot of `risk.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table


def by_kind(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The runs of each scenario and κ, a seed each."""
    kinds = dict.fromkeys((row["scenario"], row["kappa"]) for row in rows)
    return {kind: [row for row in rows if (row["scenario"], row["kappa"]) == kind] for kind in kinds}


def attribute(scenario: str) -> str:
    """The figure that says how many captions have the attribute at which the learned reward fails."""
    return "says" if scenario == "noise" else "short"


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """R_cap and the share of captions with the attribute over the steps: each seed thin, their mean thick."""
    from matplotlib.figure import Figure

    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    kappas = sorted({row["kappa"] for row in rows})
    figure = Figure(figsize=(3.6 * len(scenarios), 4.8), layout="constrained")
    panels = figure.subplots(2, len(scenarios), sharex=True, sharey="row", squeeze=False)
    for (scenario, kappa), some in by_kind(rows).items():
        colour, column = f"C{kappas.index(kappa)}", scenarios.index(scenario)
        for axes, key in zip(panels[:, column], ("r_cap", attribute(scenario)), strict=True):
            lines = [[point[key] for point in row["curve"]] for row in some]
            steps = [point["step"] for point in some[0]["curve"]]
            for line in lines:
                axes.plot(steps, line, color=colour, linewidth=0.7, alpha=0.5)
            means = [statistics.mean(values) for values in zip(*lines, strict=True)]
            axes.plot(steps, means, color=colour, linewidth=2.2, label=f"κ = {kappa:g}")
        panels[0, column].set_title(scenario)
        panels[1, column].set_xlabel("step of RL")
    panels[0, 0].set_ylabel("true reward (R_cap), held out")
    panels[1, 0].set_ylabel("captions with the attribute")
    panels[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=72)


def tabulate(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """A line for each scenario and κ."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    table = Table(title=title)
    for column in ("scenario", "κ", *(f"seed {seed}" for seed in seeds), "mean", "has it", "judge", "σ"):
        table.add_column(column, justify="left" if column == "scenario" else "right")
    for (scenario, kappa), some in by_kind(rows).items():
        means = {
            key: statistics.mean(row[key] for row in some) for key in ("r_cap", attribute(scenario), "judge", "sigma")
        }
        figures = [*(row["r_cap"] for row in some), means["r_cap"]]
        rest = (f"{means[attribute(scenario)]:.0%}", f"{means['judge']:.3f}", f"{means['sigma']:.3f}")
        table.add_row(scenario, f"{kappa:g}", *(f"{figure:.3f}" for figure in figures), *rest)
    return table
