"""What the pump does in each turn: dispatch steps and evaluations, take in what workers give, read ahead.

Everything here runs on the pump thread. `book`, `versions`, `evaluations` and `scaling` are also read and changed
by the controller's other methods, so they are touched under `pump.changed` only; pool and sampler belong to the pump
alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import MMRLError, QuarantineError, RolloutError
from mmrl_ray.experience.carriers import RolloutGroup, SamplingParams, ScoredGroup
from mmrl_ray.experience.schema import encode_records, group_rows
from mmrl_ray.rollouts.assignment_tracker import FirstErrors
from mmrl_ray.rollouts.pump import Pump
from mmrl_ray.rollouts.scaling import Scaling
from mmrl_ray.rollouts.step_book import StepBook
from mmrl_ray.rollouts.step_sampler import Evaluations, StepSampler, Ticket, chunks
from mmrl_ray.rollouts.types import (
    Assignment,
    AssignmentResult,
    Collected,
    DataFailure,
    GroupRequest,
    SampleSource,
    WorkerPool,
)
from mmrl_ray.rollouts.weights import VersionTable
from mmrl_ray.run_records.control_files import ScaleAnswer
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import QUARANTINE_FILE

EVENTS_FILE = "events.jsonl"
_LOOK_S = 1.0
"""How often an evaluation that waits looks whether anybody is there to answer it."""
POLL_S = 0.01
"""How long a turn waits for workers, or for something to do."""

BufferedGroups = Sequence[tuple[ScoredGroup, RolloutGroup]]


class RolloutLoop:
    """The moving parts of a run's rollouts, and the thread that moves them."""

    def __init__(
        self,
        cfg: Config,
        run: RunDir,
        pool: WorkerPool,
        source: SampleSource,
        put: Callable[[Any], Any],
        on_event: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """`put` makes an object-store reference; `on_event` hears of every event that is written down."""
        self.pump = Pump(self._turn)
        self.pool = pool
        self.sampler = StepSampler(source, cfg)
        staleness, per_step = cfg.rollout.max_staleness, cfg.learner.groups_per_step
        self.book = StepBook(cfg.rollout.buffer_groups or (staleness + 1) * per_step, staleness)
        self.versions = VersionTable(put)
        self.evaluations = Evaluations()
        self.scaling = Scaling(cfg, pool.resize)
        self.begun = False
        """Whether steps are dispatched: not before the learner (or the driver) said where to begin."""
        self.stopping = False
        self._cfg, self._run, self._source, self._put = cfg, run, source, put
        self._assignments = 0
        self._first = FirstErrors(cfg.model.path)
        self._restored: dict[tuple[int, int], tuple[ScoredGroup, RolloutGroup]] = {}
        self._resample: list[GroupRequest] = []
        self._notes: list[Mapping[str, Any]] = []
        self._on_event = on_event
        self._told_quarantined = 0

    # -- for other threads, while they hold `pump.changed` ---------------------------------------------------------

    def sample_again(self, requests: Sequence[GroupRequest]) -> None:
        """Dispatches these groups once more, with the newest version."""
        self._resample.extend(requests)
        self.pump.wake()

    def scale(self, workers: int | None, by: str) -> ScaleAnswer:
        """Changes how many workers there should be.

        Raises:
            ConfigError: outside the run's bounds.
        """
        message = self.scaling.request(workers, by)
        self.pump.wake()
        scaling = self.scaling
        return ScaleAnswer(accepted=True, message=message, target=scaling.target, number=scaling.requests)

    def note(self, event: Mapping[str, Any]) -> None:
        """Has the pump's thread, which alone writes the event log, write this down; may be called without the lock."""
        with self.pump.changed:
            self._notes.append(event)

    def status(self, step: int) -> dict[str, Any]:
        """What there is to say about workers, buffer and `step`, the one that is due. JSON-able."""
        arrived, asked = self.book.progress(step)
        return {
            "policy_version": self.versions.newest,
            "max_staleness": self.book.buffer.max_staleness,
            "dispatched_steps": self.sampler.next_step,
            "step_groups": {"arrived": arrived, "asked": asked},
            "buffer": {
                "arrived": self.book.buffer.arrived,
                "held": self.book.buffer.held,
                "capacity": self.book.buffer.capacity,
            },
            "evaluations": len(self.evaluations),
            "quarantined": self.sampler.quarantined,
            "pool": self.pool.status(),
            "scaling": self.scaling.status(),
        }

    def who_waits(self, out: int | None, due: int, asked: bool) -> str:
        """In words, when the plan of step `out` is with the learner, or it has `asked` for that of step `due`."""
        if out is not None:
            waiting = "" if self.pool.outstanding else ", and the workers wait for it"
            return f"the learner works on step {out}{waiting}"
        if asked:
            arrived, wanted = self.book.progress(due)
            return f"the learner waits for step {due}: {arrived} of {wanted} groups have arrived"
        if self.begun and not self.pool.outstanding:
            return "rollouts wait for the learner"
        return "an evaluation waits for its captions" if self.evaluations else "nobody"

    def totals(self) -> dict[str, Any]:
        """Counts since the start, for `StepMeter`."""
        return {
            "busy_s": self.pool.busy_seconds(),
            "quarantined": self.sampler.quarantined,
            "dropped": self.book.buffer.counts["stale"],
        }

    # -- for other threads, through `pump.call` --------------------------------------------------------------------

    def seek(self, step: int, stream: Mapping[str, Any] | None, groups: BufferedGroups) -> None:
        """Drops every training rollout and goes on with `step`; `groups` are put in their places when it comes to them.

        Raises:
            RolloutError: `stream` is None and the place of `step` is not known.
            DataError: `stream` is of other data or another seed.
        """
        self.sampler.seek(step, stream)
        self.pool.cancel("train")
        self.book.clear()
        self._resample.clear()
        self.versions.rewind(step)
        self._restored = {(scored.key.step, scored.key.index): (scored, group) for scored, group in groups}
        self.begun = True
        known = [record.as_dict() for record in self._source.quarantine.records]
        self._told_quarantined = len(known)
        self._run.truncate_lines(QUARANTINE_FILE, lambda line: line in known)

    def submit_evaluation(
        self, samples: Sequence[Sample], sampling: SamplingParams, completions: int, states: int
    ) -> Ticket:
        """Queues captions for `samples` before everything else, for the first `states` of them with their states.

        Raises:
            RolloutError: no version is published.
        """
        with self.pump.changed:
            newest = self.versions.newest
            if newest is None:
                raise RolloutError("no policy version to generate with: the learner has not published one yet")
            ticket = self.evaluations.open(samples, sampling, completions, newest, states)
        for requests in chunks(ticket.requests, self._cfg.rollout.groups_per_assignment):
            self._submit("eval", requests)
        return ticket

    def await_evaluation(self, number: int, wait_s: float, idle_s: float, clock: Callable[[], float]) -> Ticket | None:
        """On the caller's own thread: the ticket when every sample has its answer, None if that takes over `wait_s`.

        It is closed then, and with any error.

        Raises:
            RolloutError: workers were ready, and none of them gave an answer for `idle_s`.
            MMRLError: the run has ended.
        """
        ends = clock() + wait_s
        with self.pump.changed:
            ticket = self.evaluations.get(number)
            try:
                while not ticket.done:
                    self.pump.check()
                    now = clock()
                    if ticket.stuck_for(now, self.pool.status()["ready"] > 0) > idle_s:
                        raise RolloutError(
                            f"{ticket.came} of {len(ticket.requests)} samples were captioned, and no other one within "
                            f"{idle_s:g} s though workers were ready; mmrl status says what they do"
                        )
                    if now >= ends:
                        return None
                    self.pump.changed.wait(min(ends - now, idle_s, _LOOK_S))
            except MMRLError:
                self.evaluations.close(ticket)
                raise
            self.evaluations.close(ticket)
            return ticket

    def evaluated(self, number: int) -> int:
        """Samples of an evaluation under way that have their answer."""
        with self.pump.changed:
            return self.evaluations.get(number).came

    # -- the turn --------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._dispatch()
        began = time.monotonic()
        finished = self.pool.poll(POLL_S)
        for item in finished:
            self._take_in(item)
        for event in self._events():
            self._run.append_line(EVENTS_FILE, {"time": time.time(), **event})
            self._on_event(event)
        if self.begun and not self.stopping and self.sampler.next_step < self._cfg.learner.steps:
            self.sampler.read_ahead()
        if not finished and time.monotonic() - began < POLL_S:
            self.pump.rest(POLL_S)

    def _events(self) -> list[Mapping[str, Any]]:
        with self.pump.changed:
            notes, self._notes = self._notes, []
            return [*self.scaling.events(), *notes, *self._newly_quarantined(), *self.pool.events()]

    def _newly_quarantined(self) -> list[Mapping[str, Any]]:
        records = self._source.quarantine.records[self._told_quarantined :]
        self._told_quarantined += len(records)
        return [
            {"kind": "sample_quarantined", "sample": r.sample_id, "where": r.where, "detail": r.reason} for r in records
        ]

    def _dispatch(self) -> None:
        with self.pump.changed:
            again, self._resample = self._resample, []
        for requests in chunks(again, self._cfg.rollout.groups_per_assignment):
            self._submit("train", requests)
        while self._may_dispatch():
            step, requests = self.sampler.next_step, self.sampler.compose()
            with self.pump.changed:
                self.book.open(step, requests)
                missing = {request.key for request in requests if not self._put_back(request)}
                self.pump.changed.notify_all()
            for chunk in chunks(requests, self._cfg.rollout.groups_per_assignment):
                if wanted := tuple(request for request in chunk if request.key in missing):
                    self._submit("train", wanted)

    def _may_dispatch(self) -> bool:
        step = self.sampler.next_step
        with self.pump.changed:
            newest = self.versions.newest
            return (
                self.begun
                and not self.stopping
                and newest is not None
                and step < self._cfg.learner.steps
                and step - newest <= self._cfg.rollout.max_staleness
                and self.book.buffer.has_room(self.sampler.groups_per_step)
            )

    def _submit(self, kind: str, requests: tuple[GroupRequest, ...]) -> None:
        is_train = kind == "train"
        with self.pump.changed:
            newest = self.versions.newest
            if newest is None:
                return  # rewound in between: what was asked for is forgotten
            weights = self.versions.reference(newest)
        self._assignments += 1
        self.pool.submit(
            Assignment(
                id=self._assignments,
                kind="train" if is_train else "eval",
                groups=requests,
                version=newest,
                weights=weights,
                greedy_baseline=is_train and self._cfg.learner.advantage == "greedy",
                reference_logprobs=is_train and self._cfg.learner.kl.weight != 0,
            )
        )

    def _take_in(self, item: Collected | DataFailure) -> None:
        with self.pump.changed:
            if isinstance(item, DataFailure):
                self._fail_sample(item)
            else:
                self.book.add(item)
                self.evaluations.add(item.result.groups)
                if item.result.groups:
                    self._first.worked()
                for failure in item.result.failures:
                    self._fail_sample(failure)
            self.pump.changed.notify_all()

    def _fail_sample(self, failure: DataFailure) -> None:
        is_train = failure.key.step >= 0
        request = self.book.fail(failure) if is_train else self.evaluations.fail(failure)
        if request is None:
            return
        self._first.failed([request.sample.key], failure.reason)
        if is_train:
            try:
                self.sampler.quarantine(request.sample, failure.reason)
            except QuarantineError as error:
                if self._first.settled:
                    raise
                model = self._cfg.model.path
                raise QuarantineError(f"{error}; no sample has worked yet: it may well be model {model!r}") from error

    def _put_back(self, request: GroupRequest) -> bool:
        """Whether a checkpoint brought this group along."""
        scored, group = self._restored.pop((request.key.step, request.key.index), (None, None))
        if scored is None or group is None or scored.sample_id != request.sample.id:
            return False
        scored = replace(scored, payload=self._put(group))
        result = AssignmentResult(0, scored.policy_version, scored.worker, (scored,))
        self.book.add(Collected(result, encode_records(group_rows(self._run.name, scored, group, None))))
        return True
