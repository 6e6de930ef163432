"""What happened in a run, out of its events: each kind of fault with its count, then the events one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from mmrl_ray.report.charts import is_number

Event = Mapping[str, Any]

MAX_EVENTS = 60
EVENT_WORDS = {
    "run_started": "run started",
    "run_resumed": "run resumed",
    "run_ended": "run ended",
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
    "sample_quarantined": "sample quarantined",
    "held_out_left_out": "held-out samples left out",
    "held_out_trained_on": "held-out pictures are trained on",
    "warm_start_left_out": "samples left out by the warm start",
    "reward_failed": "rewards failed",
    "reward_part_missing": "a part of weight 0 failed",
    "reward_replica_lost": "reward replica lost",
    "reward_replica_ready": "reward replica ready again",
    "checkpoint_damaged": "checkpoint damaged",
    "captions_blind": "captions do not depend on the picture",
}
_ORDINARY = frozenset(("worker_created", "worker_ready"))
"""Left out first where there are too many."""


def happened(
    events: Sequence[Event], metrics: Sequence[Mapping[str, Any]], quarantined: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """One row for each kind of thing that went wrong or changed; none where nothing did."""
    lost, restarts = _of(events, "worker_lost"), _of(events, "learner_restarted")
    replaced = list(replacements(events))
    failed, lacking = _of(events, "reward_failed"), _of(events, "reward_part_missing")
    blind = _of(events, "captions_blind")
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
        ("learner restarts", len(restarts), "; ".join(_restart(each) for each in restarts[-3:])),
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
        ("checkpoints damaged", *_damaged(_of(events, "checkpoint_damaged"))),
    ]
    return [{"what": what, "count": str(count), "details": details} for what, count, details in rows if count]


def replacements(events: Sequence[Event]) -> Iterator[float | None]:
    """Of each worker that took a lost one's place: seconds from the loss until it was ready, None if it never was."""
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


def _restart(event: Event) -> str:
    return f"at step {event.get('at_step')}, back to {event.get('step')}"


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
