"""A step's line in `metrics.jsonl`, which trackers read, too, and a run's own events (`note_event`).

From the plan: `reward/…`, `masked…`, `completion/length_…`. From the rollouts: those below. From the learner: whatever
it gave, `sampler_gap/…` (`learner/objective.py`) among it.

    staleness/mean, staleness/max     policy versions between sampling and learning, over the step's groups
    dropped, quarantined              groups too stale and sampled anew; samples left out since
    completion/finish_fraction        of completions that ended by themselves, not by max_new_tokens
    shared_prefix                     whether every forward of the step computed its prompts once a group
    vision/hits, vision/misses        of the vision cache in the rollout workers
    engine/…                          of an engine that counts (vLLM): prompt tokens looked for in its prefix cache and
                                      found there, pictures in its processor's
    engine/prefix_cache_hit_fraction  of those tokens: (G - 1) ÷ G where prompts are encoded once a group, but for what
                                      is left of a block at their ends
    samples_per_second                completions consumed ÷ `seconds/step`
    seconds/step                      wall time since the step before ended
    seconds/wait_plan                 of it, what the learner waited for its plan
    seconds/workers_idle              worker-seconds without an assignment in that time
    seconds/PHASE                     worker-seconds of load, encode, sample, reference, reward, states
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from mmrl_ray.experience.carriers import ScoredGroup, StepPlan
from mmrl_ray.run_records.run_dir import RunDir

METRICS_FILE = "metrics.jsonl"
RECENT_STEPS = 10
"""Of which the status gives the throughput."""
EVENTS = "events.jsonl"
_ENGINE = ("prefix_cache_queries", "prefix_cache_hits", "mm_cache_queries", "mm_cache_hits", "num_preemptions")
QUARANTINE_FILE = "quarantine.jsonl"
LOOKS = "eval/blind.jsonl"
"""One line a look at the policy's sight, in order: `step`, the gaps as `blind/…`, why it is `blind`, if it is."""
EVALUATIONS = "eval/steps.jsonl"
"""One line an evaluation while a run learns, in order: `step`, the measures as `eval/…`, `best` (a step, or null)."""


def rollout_metrics(
    plan: StepPlan, groups: Sequence[ScoredGroup], timings: Iterable[Mapping[str, float]]
) -> dict[str, float | bool]:
    """What the groups of a step say about it.

    Args:
        groups: those that resolved its places, masked ones included.
        timings: of the assignments they came from.
    """
    counters: Counter[str] = Counter()
    for group in groups:
        counters.update(group.counters)
    seconds: Counter[str] = Counter()
    for timing in timings:
        seconds.update(timing)
    completions = sum(len(group.completion_tokens) for group in groups)
    staleness = [group.staleness for group in plan.groups]
    return {
        "staleness/mean": sum(staleness) / len(staleness),
        "staleness/max": max(staleness),
        "completion/finish_fraction": counters["finished"] / max(completions, 1),
        "shared_prefix": not counters["naive_path"],
        "vision/hits": counters["vision_hits"],
        "vision/misses": counters["vision_misses"],
        "prompts/ahead": counters["prompts_ahead"],
        **{f"engine/{name}": counters[name] for name in _ENGINE if name in counters},
        **(
            {"engine/prefix_cache_hit_fraction": counters["prefix_cache_hits"] / counters["prefix_cache_queries"]}
            if counters["prefix_cache_queries"]
            else {}
        ),
        **{f"seconds/{phase}": value for phase, value in sorted(seconds.items())},
    }


def recent_throughput(lines: Collection[Mapping[str, Any]]) -> dict[str, Any]:
    """What the run got through in a mean step of these, for its status; empty before the first.

    `seconds` are those a step, by phase: `step` and `wait_plan` of the wall, others as the top of this file says.
    """
    if not lines:
        return {}
    seconds: Counter[str] = Counter()
    for line in lines:
        seconds.update({k.removeprefix("seconds/"): v for k, v in line.items() if k.startswith("seconds/")})
    wall = max(seconds["step"], 1e-9)
    return {
        "steps": len(lines),
        "groups_per_second": sum(line["groups"] for line in lines) / wall,
        "samples_per_second": sum(line["samples_per_second"] * line["seconds/step"] for line in lines) / wall,
        "seconds": {phase: total / len(lines) for phase, total in seconds.items()},
    }


class StepMeter:
    """What changes from one step to the next: wall time, idle workers, samples left out."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._busy_s = 0.0
        self._quarantined = 0
        self._dropped = 0

    def begin(self, *, busy_s: float, quarantined: int, dropped: int) -> None:
        """A step begins here; the arguments are totals so far."""
        self._began = self._clock()
        self._busy_s, self._quarantined, self._dropped = busy_s, quarantined, dropped

    def lap(self, *, completions: int, workers: int, busy_s: float, quarantined: int, dropped: int) -> dict[str, float]:
        """The figures of the step that ends now; the next one begins."""
        seconds = max(self._clock() - self._began, 1e-9)
        figures = {
            "quarantined": quarantined - self._quarantined,
            "dropped": dropped - self._dropped,
            "samples_per_second": completions / seconds,
            "seconds/step": seconds,
            "seconds/workers_idle": max(0.0, workers * seconds - (busy_s - self._busy_s)),
        }
        self.begin(busy_s=busy_s, quarantined=quarantined, dropped=dropped)
        return figures


class StepLog:
    """Writes step lines."""

    def __init__(self, run: RunDir) -> None:
        self._run = run

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one step's line."""
        self._run.append_line(METRICS_FILE, line)

    def rewind(self, step: int) -> None:
        """Takes back the lines of `step` and later, which will be done again."""
        self._run.truncate_lines(METRICS_FILE, lambda line: line["step"] < step)


def note_event(run: RunDir, kind: str, **more: Any) -> None:
    """A line of `events.jsonl`; a RunError where it cannot be written."""
    run.append_line(EVENTS, {"time": time.time(), "kind": kind, **more})
