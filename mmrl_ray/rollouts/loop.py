"""The controller's loop: in each turn, dispatch steps and evaluations, take in what workers give, read ahead.

All of it runs on one thread (`Pump`). `buffer`, `versions` and `scaling` are also read and changed by the controller's
other methods, so they are touched under `pump.changed` only; pool and sampler belong to the pump alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from mmrl_ray.config import Config
from mmrl_ray.data.samples import SampleStream
from mmrl_ray.errors import MMRLError, QuarantineError, RolloutError
from mmrl_ray.experience.carriers import ScoredGroup
from mmrl_ray.experience.plan import Selection
from mmrl_ray.rollouts.assignment_tracker import FirstErrors
from mmrl_ray.rollouts.group_codec import Parcel, Parcelled
from mmrl_ray.rollouts.scaling import Scaling
from mmrl_ray.rollouts.steps import StepBuffer, StepSampler, chunks
from mmrl_ray.rollouts.types import Assignment, AssignmentResult, Collected, DataFailure, GroupRequest, Kind
from mmrl_ray.rollouts.weights import VersionTable
from mmrl_ray.run_records.control_files import ScaleAnswer
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import EVENTS, QUARANTINE_FILE

if TYPE_CHECKING:
    from mmrl_ray.rollouts.pool import RayWorkerPool  # needs Ray, which the controller does not

logger = logging.getLogger(__name__)

POLL_S = 0.01
"""How long a turn waits for workers, or for something to do."""

BufferedGroups = Sequence[tuple[ScoredGroup, Parcel]]
"""Of a checkpoint: each alone in its parcel."""
T = TypeVar("T")


class RolloutLoop:
    """The moving parts of a run's rollouts, and the thread that moves them."""

    def __init__(
        self,
        cfg: Config,
        run: RunDir,
        pool: RayWorkerPool,
        source: SampleStream,
        put: Callable[[Any], Any],
        on_event: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """`put` makes an object-store reference; `on_event` hears of every event that is written down."""
        self.pump = Pump(self._turn)
        self.pool = pool
        self.sampler = StepSampler(source, cfg)
        staleness, per_step = cfg.rollout.max_staleness, cfg.learner.groups_per_step
        self.buffer = StepBuffer(cfg.rollout.buffer_groups or (staleness + 1) * per_step, staleness)
        self.versions = VersionTable(put)
        self.scaling = Scaling(cfg, pool.resize)
        self.begun = False
        """Whether steps are dispatched: not before the learner (or the driver) said where to begin."""
        self.stopping = False
        self._cfg, self._run, self._source, self._put = cfg, run, source, put
        self._assignments = 0
        self._first = FirstErrors(cfg.model.path)
        self._restored: dict[tuple[int, int], tuple[ScoredGroup, Parcel]] = {}
        self._resample: list[GroupRequest] = []
        self._asides: list[tuple[Sequence[GroupRequest], int, tuple[Any, ...]]] = []
        # A worker that shares its GPU with a learner has its turn, and no time beside it.
        self._beside: Kind = "eval" if cfg.resources.takes_turns else "aside"
        self._notes: list[Mapping[str, Any]] = []
        self._on_event = on_event
        self._told_quarantined = 0

    # -- for other threads, while they hold `pump.changed` ---------------------------------------------------------

    def sample_again(self, requests: Sequence[GroupRequest]) -> None:
        """Dispatches these groups once more, with the newest version."""
        self._resample.extend(requests)
        self.pump.wake()

    def ask_beside(self, requests: Sequence[GroupRequest], version: int, weights: tuple[Any, ...]) -> None:
        """Dispatches groups of an evaluation when workers have nothing else to do, whatever is the newest then."""
        self._asides.append((requests, version, weights))
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
        arrived, asked = self.buffer.progress(step)
        return {
            "policy_version": self.versions.newest,
            "max_staleness": self.buffer.max_staleness,
            "dispatched_steps": self.sampler.next_step,
            "step_groups": {"arrived": arrived, "asked": asked},
            "buffer": {
                "arrived": self.buffer.arrived,
                "held": self.buffer.held,
                "capacity": self.buffer.capacity,
            },
            "evaluations": self.buffer.evaluations,
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
            arrived, wanted = self.buffer.progress(due)
            return f"the learner waits for step {due}: {arrived} of {wanted} groups have arrived"
        if self.begun and not self.pool.outstanding:
            return "rollouts wait for the learner"
        return "an evaluation waits for its captions" if self.buffer.evaluations else "nobody"

    def totals(self) -> dict[str, Any]:
        """Counts since the start, for `StepMeter`."""
        return {
            "busy_s": self.pool.busy_seconds(),
            "quarantined": self.sampler.quarantined,
            "dropped": self.buffer.counts["stale"],
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
        self.buffer.clear()
        self._resample.clear()
        self.versions.rewind(step)
        self._restored = {(scored.key.step, scored.key.index): (scored, parcel) for scored, parcel in groups}
        self.begun = True
        known = [record.as_dict() for record in self._source.quarantine.records]
        self._told_quarantined = len(known)
        self._run.truncate_lines(QUARANTINE_FILE, lambda line: line in known)

    def submit(self, kind: Kind, requests: Sequence[GroupRequest]) -> None:
        """Has the pool sample these groups with the newest version, in assignments."""
        for chunk in chunks(requests, self._cfg.rollout.groups_per_assignment):
            self._submit(kind, chunk)

    # -- the turn --------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._dispatch()
        began = time.monotonic()
        finished = self.pool.poll(POLL_S)
        for item in finished:
            self._take_in(item)
        for event in self._events():
            self._run.append_line(EVENTS, {"time": time.time(), **event})
            self._on_event(event)
        # What comes next in the stream may be the unsettled step's.
        unsettled = self.buffer.unsettled is not None
        if self.begun and not self.stopping and not unsettled and self.sampler.next_step < self._cfg.learner.steps:
            samples = self.sampler.read_ahead()
            if samples is not None:
                self.pool.expect(chunks(samples, self._cfg.rollout.groups_per_assignment))
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
            asides, self._asides = self._asides, []
        self.submit("train", again)
        self._select()
        for beside, version, weights in asides:
            # As many completions as one of training has, so that it is decoded as fast and no longer.
            size = self._cfg.rollout.groups_per_assignment * self._cfg.rollout.group_size
            for chunk in chunks(beside, size):
                self._send(self._beside, chunk, version, weights)
        while self._may_dispatch():
            step, requests = self.sampler.next_step, self.sampler.compose()
            self.pool.expect(())  # it is here; what comes after it is not read yet
            learner = self._cfg.learner
            selection = Selection(learner, self._cfg.reward.normalize) if learner.dynamic_sampling else None
            with self.pump.changed:
                self.buffer.open(step, requests, selection)
            self._ask_for(requests)

    def _select(self) -> None:
        """Gives the unsettled step more places, if it needs them and all that it has are resolved."""
        with self.pump.changed:
            step = self.buffer.unsettled
            if step is None or self.stopping or not self.buffer.is_resolved(step):
                return
            drawn, wanted = self.buffer.select(step)
            if not wanted:
                figures = self.buffer.figures(step)
                if figures["sampled/at_bound"]:
                    found, groups = int(figures["sampled/with_spread"]), int(figures["sampled/groups"])
                    told = {"step": step, "with_spread": found, "wanted": self.sampler.groups_per_step}
                    self.note({"kind": "dynamic_sampling_bound", **told, "sampled": groups})
                self.pump.changed.notify_all()
                return
        requests = self.sampler.further(drawn, wanted)
        with self.pump.changed:
            self.buffer.extend(step, requests)
        self._ask_for(requests)

    def _ask_for(self, requests: Sequence[GroupRequest]) -> None:
        """Has places of an open step sampled, but for those that a checkpoint brought along."""
        with self.pump.changed:
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
                and self.buffer.unsettled is None
                and step < self._cfg.learner.steps
                and step - newest <= self._cfg.rollout.max_staleness
                and self.buffer.has_room(self.sampler.groups_per_step)
            )

    def _submit(self, kind: Kind, requests: tuple[GroupRequest, ...]) -> None:
        with self.pump.changed:
            newest = self.versions.newest
            if newest is None:
                return  # rewound in between: what was asked for is forgotten
            weights = self.versions.reference(newest)
        self._send(kind, requests, newest, weights)

    def _send(self, kind: Kind, requests: tuple[GroupRequest, ...], version: int, weights: tuple[Any, ...]) -> None:
        is_train = kind == "train"
        self._assignments += 1
        self.pool.submit(
            Assignment(
                id=self._assignments,
                kind=kind,
                groups=requests,
                version=version,
                weights=weights,
                greedy_baseline=is_train and self._cfg.learner.advantage == "greedy",
                reference_logprobs=is_train and (self._cfg.learner.kl.weight != 0 or self._cfg.teacher is not None),
            )
        )

    def _take_in(self, item: Collected | DataFailure) -> None:
        with self.pump.changed:
            if isinstance(item, DataFailure):
                self._fail_sample(item)
            else:
                self.buffer.add(item)
                if item.result.groups:
                    self._first.worked()
                for failure in item.result.failures:
                    self._fail_sample(failure)
            self.pump.changed.notify_all()

    def _fail_sample(self, failure: DataFailure) -> None:
        request = self.buffer.fail(failure)
        if request is None:
            return
        self._first.failed([request.sample.key], failure.reason)
        if failure.key.step >= 0:  # of training
            try:
                self.sampler.quarantine(request.sample, failure.reason)
            except QuarantineError as error:
                if self._first.settled:
                    raise
                model = self._cfg.model.path
                raise QuarantineError(f"{error}; no sample has worked yet: it may well be model {model!r}") from error

    def _put_back(self, request: GroupRequest) -> bool:
        """Whether a checkpoint brought this group along."""
        scored, parcel = self._restored.pop((request.key.step, request.key.index), (None, None))
        if scored is None or parcel is None or scored.sample_id != request.sample.id:
            return False
        scored = replace(scored, payload=Parcelled(self._put(parcel), 0))
        result = AssignmentResult(0, scored.policy_version, scored.worker, (scored,))
        self.buffer.add(Collected(result, (parcel.rows,)))
        return True


class Pump:
    """Calls `turn` for ever on a thread of its own. What it raises is kept, and ends the run."""

    def __init__(self, turn: Callable[[], None]) -> None:
        self.changed = threading.Condition()
        """Guards what pump and callers share (its lock may be taken again by its holder); notified on every change."""
        self._turn = turn
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._woken = False
        self._failure: MMRLError | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="pump", daemon=True)

    @property
    def failure(self) -> MMRLError | None:
        """What ended the run, or None."""
        return self._failure

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after its present turn."""
        self._stopping = True
        self.wake()
        self._thread.join(timeout_s)

    def fail(self, error: Exception) -> None:
        """Ends the run with `error`; the first one counts."""
        with self.changed:
            if self._failure is None:
                wrapped = RolloutError(f"the rollout controller failed: {type(error).__name__}: {error}")
                self._failure = error if isinstance(error, MMRLError) else wrapped
                logger.error("rollout controller: %s", self._failure, exc_info=error)
            self.changed.notify_all()

    def check(self) -> None:
        """Raises what ended the run, if it has ended so."""
        if self._failure is not None:
            raise self._failure

    def wake(self) -> None:
        """Cuts a `rest` short, now or when it comes."""
        with self.changed:
            self._woken = True
            self.changed.notify_all()

    def rest(self, timeout_s: float) -> None:
        """For the turn: waits until somebody calls `wake` or `call`, at most `timeout_s`."""
        with self.changed:
            if not self._woken:
                self.changed.wait(timeout_s)
            self._woken = False

    def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """Has the pump thread call `function` between two turns; returns or raises what it does.

        Not while holding `changed`.

        Raises:
            RolloutError: the pump did not get to it within `timeout_s`.
            MMRLError: the run had ended already.
        """
        future: Future[T] = Future()
        with self.changed:
            self.check()
            self._commands.append((function, future))
            self.wake()
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise RolloutError(f"the rollout controller did not answer within {timeout_s:g} s") from None

    def _work(self) -> None:
        try:
            while not self._stopping and self._failure is None:
                self._run_commands()
                self._turn()
        except Exception as error:  # noqa: BLE001 - the boundary of the thread: whatever it is ends the run
            self.fail(error)
        ended = self._failure or RolloutError("the rollout controller was stopped")
        with self.changed:
            self._failure = ended  # nothing would ever answer a later call
            commands = list(self._commands)
            self._commands.clear()
            self.changed.notify_all()
        for _, future in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(ended)

    def _run_commands(self) -> None:
        while self._commands:
            function, future = self._commands.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - belongs to whoever called
                future.set_exception(error)
