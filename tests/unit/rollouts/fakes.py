"""A light engine whose results follow from its requests alone, and that can be told to die, hang or fail."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Quarantine, Sample
from mmrl_ray.errors import ConfigError, ModelError, ProcessError
from mmrl_ray.experience.carriers import (
    CaptionState,
    Completion,
    EncodedPrompt,
    RewardBreakdown,
    RewardFailure,
    RolloutGroup,
    Score,
    ScoredGroup,
)
from mmrl_ray.rollouts.group_codec import open_payload
from mmrl_ray.rollouts.pool_worker import join_result, split_result
from mmrl_ray.rollouts.types import Assignment, AssignmentResult, Collected, DataFailure, FetchWeights, GroupRequest

TEXT = "a red circle"
STATE = CaptionState(torch.zeros(2), {"image": torch.zeros(2), "text": torch.zeros(2)}, torch.zeros(2))


def png(shade: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade % 256, shade // 256, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def samples(count: int) -> list[Sample]:
    return [
        Sample(id=f"sample-{i:03d}", images=(png(i),), prompt="Describe.", references=(TEXT,)) for i in range(count)
    ]


def config(tmp_path: Path, **sections: Mapping[str, Any]) -> Config:
    """A small run: 4 groups of 2 completions a step, assignments of 2 groups."""
    written: dict[str, dict[str, Any]] = {
        "run": {"name": "test-run", "seed": 3, "root": str(tmp_path)},
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train"), "max_quarantined": 2},
        "rollout": {"group_size": 2, "max_new_tokens": 4, "workers": 2, "groups_per_assignment": 2},
        "learner": {"steps": 6, "groups_per_step": 4, "lr": 1e-3, "kl": {"weight": 0.0}},
    }
    for name, section in sections.items():
        written[name] = {**written.get(name, {}), **section}
    return Config.model_validate(written)


@dataclass
class FakeEngine:
    """Completions are the digits of the request's seed; the reward is a function of them."""

    worker: str
    seconds: float = 0.0
    crash_on: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    """Samples by id, or rows by place."""
    masked: frozenset[str] = frozenset()
    """Samples whose completions have no reward, or single completions: `sample-002/0`."""
    raise_on: frozenset[str] = frozenset()
    flat: frozenset[str] = frozenset()
    """Samples whose completions all earn the same; those of others differ, where this is given."""
    hang_once: tuple[str, str] | None = None
    """(sample id, file that is made when it hangs: only the first time)."""
    lose_once: str | None = None
    """File that is made when a process that it has beside it ends: only the first time."""
    seen: list[tuple[int, int]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    """Samples that it was told of last, by id."""

    def prepare(self, samples: Sequence[Sample]) -> None:
        self.told = {sample.id for sample in samples}

    def run(self, assignment: Assignment, fetch: FetchWeights) -> AssignmentResult:
        time.sleep(self.seconds)
        weights = fetch()
        self.seen.append((assignment.version, -1 if weights is None else int(weights["version"])))
        ids = {request.sample.id for request in assignment.groups}
        if ids & self.crash_on:
            os._exit(1)
        if ids & self.raise_on:
            raise ModelError(f"logits of {sorted(ids & self.raise_on)} are NaN")
        if self.hang_once is not None and self.hang_once[0] in ids and not Path(self.hang_once[1]).exists():
            Path(self.hang_once[1]).touch()
            time.sleep(3600)
        if self.lose_once is not None and not Path(self.lose_once).exists():
            Path(self.lose_once).touch()
            raise ProcessError("the process of an engine ended by itself (SIGKILL)")
        failures = [
            DataFailure(r.key, r.sample.id, "ImageError: broken")
            for r in assignment.groups
            if {r.sample.id, r.sample.key} & self.broken
        ]
        failed = {failure.key for failure in failures}
        groups = [self._group(assignment, r) for r in assignment.groups if r.key not in failed]
        self.prepare(assignment.ahead)
        return AssignmentResult(
            assignment.id, assignment.version, self.worker, tuple(groups), tuple(failures), {"sample": self.seconds}
        )

    def _group(self, assignment: Assignment, request: GroupRequest) -> ScoredGroup:
        digits = [int(d) for d in str(request.sampling.seed)]
        tokens = [digits[2 * i : 2 * i + 2 + i % 2] for i in range(request.completions)]
        completions = tuple(
            Completion(torch.tensor(t), -torch.tensor([d + 1.0 for d in t]), TEXT, "stop") for t in tokens
        )
        totals = [sum(t) + assignment.version / 100 for t in tokens]
        masked = "no references" if request.sample.id in self.masked else None
        payload = RolloutGroup(
            sample=request.sample,
            prompt=EncodedPrompt(torch.arange(5), {}, "key"),
            completions=completions,
            policy_version=assignment.version,
            sampling=request.sampling,
            state=STATE if request.wants_state else None,
        )
        return ScoredGroup(
            key=request.key,
            sample_id=request.sample.id,
            policy_version=assignment.version,
            prompt_tokens=5,
            completion_tokens=tuple(len(t) for t in tokens),
            rewards=() if masked else tuple(self._score(request, i, total) for i, total in enumerate(totals)),
            masked=masked,
            payload=payload,
            worker=self.worker,
            timings={"sample": self.seconds},
            counters={"finished": len(completions), "prompts_ahead": int(request.sample.id in self.told)},
        )

    def _score(self, request: GroupRequest, place: int, total: float) -> Score:
        if f"{request.sample.id}/{place}" in self.masked:
            return RewardFailure("no number")
        if self.flat:
            total = 1.0 if request.sample.id in self.flat else total + 100.0 * place
        return RewardBreakdown(total, {"sum": total}, {"sum": 1.0})


@dataclass(frozen=True)
class FakeEngineFactory:
    seconds: float = 0.0
    crash_on: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    masked: frozenset[str] = frozenset()
    raise_on: frozenset[str] = frozenset()
    flat: frozenset[str] = frozenset()
    hang_once: tuple[str, str] | None = None
    lose_once: str | None = None
    start_error: str | None = None
    lose_first: str | None = None
    """File that is made when a process does not start: only the first time."""
    refused_while: str | None = None
    """A file: while it is there, its interpreter is not."""
    stuck_while: str | None = None
    """A file: while it is there, engines are not finished."""

    def __call__(self, worker: str) -> FakeEngine:
        if self.start_error is not None:
            raise ModelError(self.start_error)
        if self.lose_first is not None and not Path(self.lose_first).exists():
            Path(self.lose_first).touch()
            raise ProcessError("the process of an engine gave no answer within 1 s")
        if self.refused_while is not None and Path(self.refused_while).exists():
            raise ConfigError("rollout.engine.python='/nowhere/python' is no program")
        while self.stuck_while is not None and Path(self.stuck_while).exists():
            time.sleep(0.05)
        every = (self.crash_on, self.broken, self.masked, self.raise_on, self.flat, self.hang_once, self.lose_once)
        return FakeEngine(worker, self.seconds, *every)


class FakePool:
    """A `RayWorkerPool` in this process: `release` says how many assignments are run in each poll."""

    def __init__(self, engine: FakeEngine, fetch_weights: Any = None) -> None:
        self.engine = engine
        self.queue: list[Assignment] = []
        self.submitted: list[Assignment] = []
        self.release = 1_000_000
        self.error: Exception | None = None
        self.target = 1
        self.ready = 1
        self.polls = 0
        self.closed = False
        self._fetch_weights = fetch_weights

    def submit(self, assignment: Assignment) -> None:
        self.submitted.append(assignment)
        place = 0 if assignment.kind == "eval" else len(self.queue)
        self.queue.insert(place, assignment)

    def poll(self, timeout_s: float) -> list[Collected | DataFailure]:
        self.polls += 1
        if self.error is not None:
            raise self.error
        finished: list[Collected | DataFailure] = []
        while self.queue and self.release > 0:
            self.release -= 1
            assignment = self.queue.pop(0)
            result = self.engine.run(assignment, lambda assignment=assignment: self._weights(assignment))
            light, *parcels = split_result(assignment, result, "test-run")
            joined = join_result(light, parcels)
            groups = [replace(g, payload=open_payload(g.payload, lambda value: value)) for g in joined.result.groups]
            finished.append(replace(joined, result=replace(joined.result, groups=tuple(groups))))
        return finished

    def _weights(self, assignment: Assignment) -> Any:
        return self._fetch_weights(assignment.weights[0]) if assignment.weights else None

    def expect(self, samples: Iterable[tuple[Sample, ...]]) -> None:
        pass

    def cancel(self, kind: str) -> None:
        self.queue = [a for a in self.queue if a.kind != kind]

    def resize(self, workers: int) -> None:
        self.target = workers

    @property
    def outstanding(self) -> int:
        return len(self.queue)

    def events(self) -> list[dict[str, Any]]:
        return []

    def status(self) -> dict[str, Any]:
        return {
            "ready": self.ready,
            "target": self.target,
            "workers": {"w0": {"state": "busy" if self.queue else "ready"}},
            "queued_assignments": len(self.queue),
            "assignments": {"accepted": len(self.submitted) - len(self.queue)},
        }

    def busy_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        self.closed = True


class ListSource:
    """A `SampleStream` that goes round a list."""

    def __init__(self, items: Sequence[Sample], budget: int = 2) -> None:
        self.items = list(items)
        self.quarantine = Quarantine(budget)
        self.position = 0

    def take(self, count: int) -> list[Sample]:
        taken: list[Sample] = []
        while len(taken) < count:
            sample = self.items[self.position % len(self.items)]
            self.position += 1
            if not self.quarantine.holds(sample.id, sample.place):
                taken.append(sample)
        return taken

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "quarantine": self.quarantine.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]
        self.quarantine.restore(state["quarantine"])
