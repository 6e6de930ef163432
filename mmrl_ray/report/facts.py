"""The facts of a report as rows of text: the run, its reward in words (the dry run's, too), its faults and events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml
from pydantic import ValidationError

from mmrl_ray.config.reward import SEES, RewardSection
from mmrl_ray.report.charts import charted_names, is_number

Row = tuple[str, str]

MAX_QUARANTINED = 20
_WEIGHT = "reward_weight/"
Event = Mapping[str, Any]

MAX_EVENTS = 60
EVENT_WORDS = {
    "run_started": "run started",
    "run_resumed": "run resumed",
    "run_ended": "run ended",
    "engine": "sampled by another engine",
    "ended_early": "ended before its last step: held-out captions got no better",
    "worker_created": "rollout worker asked for",
    "worker_ready": "rollout worker ready",
    "worker_lost": "rollout worker lost",
    "worker_retiring": "rollout worker retired",
    "worker_unplaced": "rollout worker not placed",
    "workers_scaled": "rollout workers scaled",
    "scale_refused": "scaling refused",
    "nodes_not_asked_for": "autoscaler not asked",
    "learner_restarted": "learners restarted",
    "learners": "learners together",
    "learner_path": "forward path chosen",
    "out_of_memory": "micro-batches halved: out of memory",
    "sample_quarantined": "sample quarantined",
    "held_out_left_out": "held-out samples left out",
    "held_out_trained_on": "held-out pictures are trained on",
    "warm_start_left_out": "samples left out by the warm start",
    "reward_failed": "rewards failed",
    "reward_part_missing": "a part of weight 0 failed",
    "dynamic_sampling_bound": "a step was filled up with groups of equal rewards",
    "reward_replica_lost": "reward replica lost",
    "reward_replica_ready": "reward replica ready again",
    "checkpoint_damaged": "checkpoint damaged",
    "tracker_failed": "tracker failed",
    "tracker_back": "tracker reached again",
    "tracker_left_out": "not told to a tracker, which fails on it",
    "tracker_behind": "tracker left behind when the run ended",
    "captions_blind": "captions do not depend on the picture",
    "blind": "the policy does not look at its pictures",
}
_ORDINARY = frozenset(("worker_created", "worker_ready"))
"""Left out first where there are too many."""


def fact_blocks(
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    quarantined: Sequence[Mapping[str, Any]],
    config: str,
) -> list[dict[str, Any]]:
    """Titled blocks of (name, value); a block without rows is left out."""
    blocks = [
        ("Checkpoints, by held-out captions", list(_checkpoints(summary))),
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


def _checkpoints(summary: Mapping[str, Any]) -> Iterator[Row]:
    told = _mapping(summary.get("checkpoints"))
    for name, folder in (("best", "adapter/"), ("last", "adapter-last/")):
        side = _mapping(told.get(name))
        if is_number(side.get("step")):
            yield f"{name}, {folder}", f"step {side['step']:g}: {told.get('metric')} {_interval(side)}"
    for name, label in (("best_less_start", "best less the start"), ("last_less_best", "last less best")):
        if gap := _mapping(told.get(name)):
            yield f"{label}, paired by sample", _interval(gap, "+")
    if early := _mapping(summary.get("ended_early")):
        yield "ended early", str(early.get("detail", ""))


def _interval(side: Mapping[str, Any], sign: str = "") -> str:
    if not is_number(side.get("value")):
        return "unknown"
    known = is_number(side.get("low")) and is_number(side.get("high"))
    ends = f"[{side['low']:{sign}.3f}, {side['high']:{sign}.3f}]" if known else "(no interval: one sample)"
    return f"{side['value']:{sign}.3f} {ends}"


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
        # What checkpointed or sharded layers make of it.
        packed = ", in the learner as packed rows" if any(line.get("packed_rows") for line in metrics) else ""
        yield (
            "forward path",
            f"shared prefix{share}{packed}" if any(flags) else "naive (every completion behind its own prompt)",
        )
    if reason := str(_mapping(summary.get("shared_prefix")).get("reason") or path_reason(events)):
        yield "why", reason
    for name in ("device", "devices", "workers", "learner_workers", "rollout_workers"):
        if name in summary:
            yield name.replace("_", " "), text_of(summary[name])


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


def happened(
    events: Sequence[Event], metrics: Sequence[Mapping[str, Any]], quarantined: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """One row for each kind of thing that went wrong or changed; none where nothing did."""
    lost, restarts = _of(events, "worker_lost"), _of(events, "learner_restarted")
    back = [f"at step {each.get('at_step')}, back to {each.get('step')}" for each in restarts]
    replaced = list(replacements(events))
    failed, lacking = _of(events, "reward_failed"), _of(events, "reward_part_missing")
    blind, looked = _of(events, "captions_blind"), _of(events, "blind")
    tracked = [each for each in events if _kind(each) in ("tracker_failed", "tracker_left_out", "tracker_behind")]
    ends = [{"detail": str(each.get("status", ""))} for each in _of(events, "run_ended")]
    ended = [each for each in ends if each["detail"].startswith("failed")]
    stale = sum(int(line["dropped"]) for line in metrics if is_number(line.get("dropped")))
    rows = [
        ("rollout workers lost", len(lost), _reasons(lost)),
        ("rollout workers replaced", len(replaced), _slowest(replaced)),
        ("rollout workers retired", len(_of(events, "worker_retiring")), ""),
        ("rollout workers not placed", len(_of(events, "worker_unplaced")), _reasons(_of(events, "worker_unplaced"))),
        ("changes of scale", len(_of(events, "workers_scaled")), _reasons(_of(events, "workers_scaled"))),
        ("requests to scale refused", len(_of(events, "scale_refused")), _reasons(_of(events, "scale_refused"))),
        (
            "captions that do not depend on the picture",
            len(blind),
            _reasons([{"detail": e.get("what")} for e in blind]),
        ),
        (
            "looks that found the policy blind",
            len(looked),
            _reasons([{"detail": e.get("what")} for e in looked]),
        ),
        (
            "learner restarts",
            len(restarts),
            "; ".join(back[-3:]),
        ),
        ("ended with an error", len(ended), _reasons(ended)),
        ("resumed", len(_of(events, "run_resumed")), ""),
        ("samples quarantined", len(quarantined), _reasons(quarantined)),
        ("held-out pictures trained on", *_counted(_of(events, "held_out_trained_on"), "found")),
        ("held-out samples left out", *_counted(_of(events, "held_out_left_out"), "count")),
        ("samples left out by the warm start", *_counted(_of(events, "warm_start_left_out"), "count")),
        ("groups without a reward", sum(int(each.get("groups", 1)) for each in failed), _reasons(failed)),
        ("captions without a reward", sum(int(each.get("captions", 0)) for each in failed), _reasons(failed)),
        ("captions that a part of weight 0 lacks", sum(int(each["captions"]) for each in lacking), _reasons(lacking)),
        ("reward replicas lost", len(_of(events, "reward_replica_lost")), ""),
        ("groups sampled again as too stale", stale, ""),
        ("failures of trackers", len(tracked), _reasons(tracked)),
        ("checkpoints damaged", *_damaged(_of(events, "checkpoint_damaged"))),
    ]
    return [{"what": what, "count": str(count), "details": details} for what, count, details in rows if count]


def replacements(events: Sequence[Event]) -> Iterator[float | None]:
    """Seconds from a worker's loss until the one in its place was ready, of each; None if it never was."""
    waiting: list[float | None] = []  # losses without a successor
    lost_at: dict[str, float | None] = {}  # by successor
    found: dict[str, float | None] = {}
    for event in events:
        kind, worker, when = _kind(event), str(event.get("worker", "")), event.get("time")
        if kind in ("run_started", "run_resumed"):
            waiting = []  # the workers of a new process are nobody's successors
            yield from found.values()
            found = {}
        elif kind == "worker_lost":
            waiting.append(when)
        elif kind == "worker_created" and waiting:
            lost_at[worker] = waiting.pop(0)
            found[worker] = None
        elif kind == "worker_ready" and worker in found:
            before = lost_at[worker]
            found[worker] = when - before if is_number(when) and is_number(before) else None
    yield from found.values()


def event_rows(events: Sequence[Event]) -> tuple[list[dict[str, str]], int]:
    """The last events in words, and how many were left out: ordinary ones first."""
    shown = list(events)
    if len(shown) > MAX_EVENTS:
        shown = [event for event in shown if _kind(event) not in _ORDINARY][-MAX_EVENTS:]
    return [_row(event) for event in shown], len(events) - len(shown)


def path_reason(events: Sequence[Event]) -> str:
    """Why the forward path is what it is, from the event that the start-up check left."""
    for event in reversed(events):
        if _kind(event) == "learner_path":
            return str(event.get("reason", ""))
    return ""


def text_of(value: Any) -> str:
    """A value for people."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _of(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if _kind(event) == kind]


def _kind(event: Event) -> str:
    return str(event.get("kind", ""))


def _reasons(records: Sequence[Mapping[str, Any]]) -> str:
    """Each reason once, the last three."""
    reasons = [str(each.get("detail") or each.get("reason") or "") for each in records]
    return "; ".join(list(dict.fromkeys(reason for reason in reversed(reasons) if reason))[:3][::-1])


def _counted(events: Sequence[Event], key: str) -> tuple[int, str]:
    """What an event counts under that key, summed, and the reasons."""
    return sum(int(each[key]) for each in events if is_number(each.get(key))), _reasons(events)


def _slowest(replaced: Sequence[float | None]) -> str:
    known = [seconds for seconds in replaced if seconds is not None]
    missing = len(replaced) - len(known)
    told = [f"ready within {max(known):.1f} s of the loss"] if known else []
    return ", ".join([*told, *([f"{missing} not ready (yet)"] if missing else [])])


def _damaged(events: Sequence[Event]) -> tuple[int, str]:
    """A start that finds the same one damaged again says so again."""
    steps = sorted({int(event["step"]) for event in events if is_number(event.get("step"))})
    return len(steps), f"of step {', '.join(map(str, steps))}; {_reasons(events)}" if steps else ""


def _row(event: Event) -> dict[str, str]:
    details = ", ".join(
        f"{k}: {text_of(v)}" for k, v in event.items() if k not in ("time", "kind") and v not in ("", [])
    )
    kind = _kind(event)
    return {"when": _when(event), "what": EVENT_WORDS.get(kind, kind.replace("_", " ")) or "event", "details": details}


def _when(event: Event) -> str:
    value = event.get("time")
    if is_number(value):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"step {event['step']}" if "step" in event else ""
