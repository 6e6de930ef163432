"""What the reward of a run is made of, in words: for the dry run, and with what became of it for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from mmrl_ray.config.reward import SEES, RewardSection
from mmrl_ray.runs.report_charts import is_number

Row = tuple[str, str]
_WEIGHT = "reward_weight/"


def reward_lines(reward: RewardSection) -> list[str]:
    """A line for each part, and for what is done to their sum."""
    rows = [(reward.weights[name], name, part) for name, part in reward.parts.items()]
    lines = [f"{weight:g} × {name:<12} {part.kind}, on the {SEES[part.modality]}" for weight, name, part in rows]
    for name, part in reward.parts.items():
        if part.kind == "format" and part.prefix:
            lines.append(f"{name}: answers begin with {part.prefix!r}, which the chat template writes")
    if reward.normalize == "group":
        lines.append("each part normalised by its group before it is weighed")
    if reward.risk:
        lines.append(f"less {reward.risk:g} standard deviations of it")
    return lines


def reward_rows(config: str, metrics: Sequence[Mapping[str, Any]]) -> list[Row]:
    """(what, figures) of every weighted part, then of the total; empty before the first step.

    Args:
        config: text of the run's config; kinds and modalities are left out where it cannot be read.
        metrics: the run's lines.
    """
    return list(_rows(_kinds(config), metrics)) if metrics else []


def _rows(kinds: Mapping[str, str], metrics: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    last = metrics[-1]
    for name in (key.removeprefix(_WEIGHT) for key in last if key.startswith(_WEIGHT)):
        means = _first_last(f"reward/{name}", metrics)
        yield f"{name}{kinds.get(name, '')}", f"weight {last[_WEIGHT + name]:g}, mean {means}"
    if is_number(last.get("reward/mean")):
        yield "total", f"mean {_first_last('reward/mean', metrics)}"
    if is_number(last.get("reward/sigma")):
        yield "standard deviation of the total", f"mean {_first_last('reward/sigma', metrics)}"
    if is_number(last.get("reward/adjusted")):
        yield f"total - {last.get('reward/risk', 0):g}σ, learnt from", f"mean {_first_last('reward/adjusted', metrics)}"
    if last.get("reward/normalized"):
        yield "normalisation", "each part by its group, then the weighted sum by the step (GDPO)"


def _first_last(name: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    values = [line[name] for line in metrics if is_number(line.get(name))]
    return f"{values[0]:.4g} → {values[-1]:.4g}" if values else "unknown"


def _kinds(config: str) -> dict[str, str]:
    """`, KIND on the MODALITY` by the name of the part."""
    try:
        section = RewardSection.model_validate(yaml.safe_load(config)["reward"])
    except (yaml.YAMLError, ValidationError, KeyError, TypeError):
        return {}
    return {name: f", {part.kind} on the {SEES[part.modality]}" for name, part in section.parts.items()}
