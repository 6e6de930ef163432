"""The facts of a report as rows of text: the run, its reward in words (the dry run's, too), broken samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from mmrl_ray.config.reward import SEES, RewardSection
from mmrl_ray.report.charts import charted_names, is_number
from mmrl_ray.report.events import path_reason, text_of

Row = tuple[str, str]

MAX_QUARANTINED = 20
_WEIGHT = "reward_weight/"


def fact_blocks(
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    quarantined: Sequence[Mapping[str, Any]],
    config: str,
) -> list[dict[str, Any]]:
    """Titled blocks of (name, value); a block without rows is left out."""
    blocks = [
        ("Held-out preferences", list(_preferences(summary))),
        ("Reward in training, first step to last", reward_rows(config, metrics)),
        ("Time by phase", list(_phases(summary))),
        ("Time in steps, summed", list(_step_seconds(metrics))),
        ("Resources and path", list(_resources(summary, metrics, events))),
        ("Counts over the run", list(_counts(metrics, quarantined))),
        ("Other figures of the last step", list(_others(metrics))),
        ("Versions", [(str(k), text_of(v)) for k, v in _mapping(summary.get("versions")).items()]),
    ]
    return [{"title": title, "rows": rows} for title, rows in blocks if rows]


def quarantine_rows(records: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, str]], int]:
    """The first quarantined samples, and how many were left out."""
    shown = records[:MAX_QUARANTINED]
    rows = [
        {
            "sample": str(r.get("sample_id", "")),
            "reason": " – ".join(str(r[k]) for k in ("where", "reason") if r.get(k)),
        }
        for r in shown
    ]
    return rows, len(records) - len(shown)


def duration(seconds: float) -> str:
    """`59.3 s`, `12 min 05 s`, `3 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60):02d} s"
    return f"{int(minutes // 60)} h {int(minutes % 60):02d} min"


def _preferences(summary: Mapping[str, Any]) -> Iterator[Row]:
    told = _mapping(summary.get("preferences"))
    for name in ("before", "after", "difference"):
        side = _mapping(told.get(name))
        if is_number(side.get("pairs")):
            yield f"pairs, {name}", f"{side['pairs']:g}"
        for measure in ("accuracy", "margin"):
            interval = _mapping(side.get(measure))
            if is_number(interval.get("value")):
                known = is_number(interval.get("low")) and is_number(interval.get("high"))
                bounds = f"[{interval['low']:.3f}, {interval['high']:.3f}]" if known else "(no interval: one pair)"
                yield f"{measure} of the implicit reward, {name}", f"{interval['value']:.3f} {bounds}"


def _phases(summary: Mapping[str, Any]) -> Iterator[Row]:
    told = summary.get("seconds")
    if is_number(told):
        yield "whole run", duration(told)
    for name, value in _mapping(told).items():
        if is_number(value):
            yield str(name).replace("_", " "), duration(value)


def _step_seconds(metrics: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Of workers and learner alike, so that overlapping phases add up to more than the steps."""
    totals: dict[str, float] = {}
    for line in metrics:
        for name, value in line.items():
            if name.startswith("seconds/") and is_number(value):
                totals[name] = totals.get(name, 0.0) + value
    for name, total in sorted(totals.items(), key=lambda item: -item[1]):
        yield name.removeprefix("seconds/").replace("_", " "), duration(total)


def _resources(
    summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> Iterator[Row]:
    peak = summary.get("peak_memory_bytes")
    if is_number(peak):
        yield "peak memory, all processes", f"{peak / 2**30:.2f} GiB"
    flags = [bool(line["shared_prefix"]) for line in metrics if line.get("shared_prefix") is not None]
    if flags:
        share = f" in {sum(flags)} of {len(flags)} steps" if any(flags) and not all(flags) else ""
        yield (
            "forward path",
            f"shared prefix{share}{_packed(metrics)}"
            if any(flags)
            else "naive (every completion behind its own prompt)",
        )
    reason = _path_reason(summary, events)
    if reason:
        yield "why", reason
    for name in ("device", "devices", "workers", "learner_workers", "rollout_workers"):
        if name in summary:
            yield name.replace("_", " "), text_of(summary[name])


def _packed(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What checkpointed or sharded layers make of it."""
    return ", in the learner as packed rows" if any(line.get("packed_rows") for line in metrics) else ""


def _path_reason(summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str:
    """From the summary, or from the event that the start-up parity check left."""
    told = summary.get("shared_prefix")
    if isinstance(told, Mapping) and told.get("reason"):
        return str(told["reason"])
    return path_reason(events)


def _counts(metrics: Sequence[Mapping[str, Any]], quarantined: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    if not metrics:
        return
    for name, label in (
        ("masked", "groups masked"),
        ("masked_captions", "captions without a reward"),
        ("dropped", "groups dropped as stale"),
    ):
        values = [line[name] for line in metrics if is_number(line.get(name))]
        if values:
            yield label, f"{sum(values):g}"
    yield "samples quarantined", str(len(quarantined))
    values = [line["policy_version"] for line in metrics if is_number(line.get("policy_version"))]
    if values:
        yield "last policy version", f"{values[-1]:g}"


def _others(metrics: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Whatever no chart shows, so that nothing in metrics.jsonl stays hidden."""
    if not metrics:
        return
    hidden = charted_names(metrics) | {
        "step",
        "policy_version",
        "masked",
        "masked_captions",
        "dropped",
        "shared_prefix",
        "packed_rows",
        "run",
    }
    for name, value in metrics[-1].items():
        if name not in hidden and not name.startswith("seconds/") and is_number(value):
            yield name, f"{value:.4g}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


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
