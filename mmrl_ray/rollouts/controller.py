"""The controller: samples out, groups in, one plan a step. A plain class; `controller_actor.py` puts it on Ray.

    pump thread     ┌─▶ dispatch: steps within max_staleness of the newest version, while the buffer has room
    (`loop.py`)     │   poll the pool ─▶ groups into the buffer, broken samples into quarantine
                    └── read the next step's samples ahead
    other threads   next_plan · publish · finish_step · checkpoint_state · restore · rewind · captions · judge · status

A step's life: composed → dispatched → complete → planned (`next_plan`) → finished (`finish_step`). An error in the
pump ends the run: the next `next_plan` answers `Stop(failed=True)`, every other call raises it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample, SampleStream
from mmrl_ray.errors import BlindPolicyError, MMRLError, RolloutError
from mmrl_ray.experience.carriers import SamplingParams, ScoredGroup, StepPlan
from mmrl_ray.experience.plan import build_step_plan
from mmrl_ray.rollouts.group_codec import decode_checkpoint, encode_checkpoint
from mmrl_ray.rollouts.held_out import BlindWatch, HeldOutWatch, Purpose, Watch
from mmrl_ray.rollouts.loop import BufferedGroups, RolloutLoop
from mmrl_ray.rollouts.run_metrics import PlannedStep, RunMetrics, StepWriter, reward_failures
from mmrl_ray.rollouts.types import Generated, Stop, Wait
from mmrl_ray.run_records.control_files import ScaleAnswer, StatusWriter
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.telemetry.meter import Meter

if TYPE_CHECKING:
    from mmrl_ray.rollouts.pool import RayWorkerPool  # needs Ray, which the controller does not

COMMAND_TIMEOUT_S = 120.0
_LOOK_S = 1.0
"""How often an evaluation that waits looks whether anybody is there to answer it."""


class Controller:
    """Composes steps, keeps their groups, and plans them. Methods may be called from any thread."""

    def __init__(
        self,
        cfg: Config,
        run: RunDir,
        *,
        pool: RayWorkerPool,
        source: SampleStream,
        put: Callable[[Any], Any],
        fetch: Callable[[Any], Any],
        clock: Callable[[], float] = time.monotonic,
        meter: Meter | None = None,
    ) -> None:
        """`put` makes an object-store reference, `fetch` the object again (and leaves what is none as it is)."""
        self._cfg, self._fetch, self._clock = cfg, fetch, clock
        self._meter = meter or Meter(run=cfg.run.name)
        self._told = RunMetrics(self._meter, cfg.learner.steps)
        self._put = put
        self._loop = RolloutLoop(cfg, run, pool, source, put, self._told.event)
        self._held_out: dict[Purpose, Watch] = {
            "eval": HeldOutWatch(cfg, run, self._loop.buffer),
            "blind": BlindWatch(cfg, run, self._loop.buffer),
        }
        self._pump = self._loop.pump
        self._changed = self._pump.changed
        self._writer = StepWriter(run, clock)
        self._next_plan = 0
        self._planned: PlannedStep | None = None
        self._asked_since: float | None = None
        self._stop: str | None = None
        self._status_writer = StatusWriter(run, self.status, self.resize, self._loop.note)

    def start(self) -> None:
        """Starts the pump: workers come up, evaluations are served; steps begin with `rewind` or `restore`."""
        self._pump.start()
        self._status_writer.start()
        self._meter.watch(lambda: self._told.look(self.status()))

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends pump, workers and log; what was handed to the log is written."""
        self._status_writer.close(timeout_s)
        self._pump.stop(timeout_s)
        self._loop.pool.close()
        self._writer.close(timeout_s)

    # -- the learner's calls ---------------------------------------------------------------------------------------

    def next_plan(self, step: int, world_size: int, wait_s: float = 2.0) -> StepPlan | Wait | Stop:
        """The plan of `step`, the same for every rank; `Wait` after `wait_s` at most, then ask again.

        Raises:
            RolloutError: `step` is not the one that is due, or ranks disagree about their number.
        """
        deadline = self._clock() + wait_s
        with self._changed:
            while True:
                answer = self._answer(step, world_size)
                left = deadline - self._clock()
                if not isinstance(answer, Wait) or left <= 0:
                    return answer
                self._changed.wait(left)

    def publish(self, version: int, encoded: np.ndarray) -> None:
        """Makes `encoded` (see `encode_state`) the weights of `version`, the newest.

        Raises:
            RolloutError: `version` is neither that of the step due nor the one after it.
        """
        self._pump.check()
        with self._changed:
            if version not in (self._next_plan, self._next_plan + 1):
                raise RolloutError(f"policy version {version} was published while step {self._next_plan} is due")
            self._loop.versions.publish(version, encoded)
            self._ask_beside(version, lambda: self._loop.versions.reference(version))
            self._loop.versions.drop_before(version)
            self._pump.wake()

    def weights(self, version: int) -> tuple[Any, ...]:
        """(reference to the encoded weights,) of a version that is held."""
        with self._changed:
            return self._loop.versions.reference(version)

    def finish_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The learner has taken its step: logs it, writes its groups down, and lets go of them.

        Raises:
            RolloutError: no plan of `step` is out.
            RunError: the run folder cannot be written.
        """
        self._pump.check()
        with self._changed:
            if self._planned is None or self._planned.plan.step != step:
                raise RolloutError(f"step {step} was finished, but its plan is not out (due: {self._next_plan})")
            done, self._planned = self._planned, None
            self._next_plan = step + 1
            workers = self._loop.pool.status()["ready"]
            line = self._writer.line(done, metrics, self._loop.totals(), workers)
            self._loop.scaling.after_step(line, workers)
            self._pump.wake()
        try:
            self._writer.write(done, line)
        except MMRLError as error:
            self._pump.fail(error)
            raise
        self._told.step(done, line)
        for event in reward_failures(done):
            self._loop.note(event)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint_state(self, step: int) -> dict[str, Any]:
        """What a resume needs after `step` finished steps: JSON-able values, and the buffered groups as bytes.

        Groups sampled with version `step` are left out: a resume samples them again, just the same. When it returns,
        the rollout log of all finished steps is written.

        Raises:
            RolloutError: `step` is not the number of finished steps.
        """
        self._pump.check()
        self._writer.flush()

        def gather() -> tuple[dict[str, Any], list[ScoredGroup]]:
            with self._changed:
                if self._next_plan != step or self._planned is not None:
                    raise RolloutError(f"a checkpoint of {step} finished steps was asked for at {self._next_plan}")
                stream = self._loop.sampler.state(step)
                self._loop.sampler.forget_before(step)
                return stream, [g for g in self._loop.buffer.waiting(step) if g.policy_version < step]

        stream, groups = self._pump.call(gather, COMMAND_TIMEOUT_S)
        return encode_checkpoint(self._cfg.run.name, step, stream, groups, self._fetch)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `checkpoint_state` was taken, in this or another process; version `next_step` comes next.

        Raises:
            RolloutError: the state is of another format.
            DataError: it is of other data or another seed.
        """
        self._begin(*decode_checkpoint(self._cfg.run.name, state))

    def rewind(self, step: int) -> None:
        """(Re)starts at `step`, 0 or one whose checkpoint was taken by this controller; one that is due is only noted.

        Raises:
            RolloutError: where its samples begin is not known any more.
        """
        self._begin(step, None, [])

    def _begin(self, step: int, stream: Mapping[str, Any] | None, groups: BufferedGroups) -> None:
        def go() -> None:
            with self._changed:
                if self._loop.begun:
                    self._loop.note({"kind": "learner_restarted", "at_step": self._next_plan, "step": step})
                    if self._next_plan == step and self._planned is None:
                        return  # it had checkpointed, and not begun another one
                self._loop.seek(step, stream, groups)
                self._planned, self._next_plan, self._asked_since = None, step, None
                for watch in self._held_out.values():
                    watch.begin(step)
                self._writer.begin(step, self._loop.totals())
                self._loop.scaling.began()
                self._told.begin(step)

        self._pump.call(go, COMMAND_TIMEOUT_S)

    # -- held-out captions beside the learning -----------------------------------------------------------------------

    def watch_held_out(
        self,
        samples: Sequence[Sample],
        sampling: SamplingParams,
        purpose: Purpose = "eval",
        others: Sequence[Sample] = (),
    ) -> None:
        """Says what is captioned at the steps of a purpose, and how. Before the learner begins."""
        with self._changed:
            self._held_out[purpose].watch(samples, sampling, others)

    def evaluate(self, version: int, encoded: np.ndarray) -> None:
        """Has a version captioned that was published in an earlier life of the run."""
        self._pump.check()
        with self._changed:
            self._ask_beside(version, lambda: (self._put(encoded),))

    def evaluated(self, purpose: Purpose = "eval") -> tuple[int, Generated] | None:
        """(step, captions) of the evaluation that is to be judged next, if its captions are all there."""
        self._pump.check()
        with self._changed:
            return self._held_out[purpose].complete()

    def judge(self, line: Mapping[str, Any], purpose: Purpose = "eval", fatal: str = "") -> bool:
        """Writes an evaluation's line, and lets the learner go on; False where its step was undone since.

        With `fatal`, what it shows ends the run, by a `BlindPolicyError` of that message.

        Raises:
            RunError: the run folder cannot be written.
        """
        with self._changed:
            if not self._held_out[purpose].judge(line, self._next_plan):
                return False
            if fatal:
                self._pump.fail(BlindPolicyError(fatal))
            self._changed.notify_all()
        self._told.evaluated(line)
        return True

    def _ask_beside(self, version: int, weights: Callable[[], tuple[Any, ...]]) -> None:
        """For whatever purposes that version is due."""
        if due := [watch for watch in self._held_out.values() if watch.is_due(version)]:
            reference = weights()
            for watch in due:
                self._loop.ask_beside([*watch.open(version).requests.values()], version, reference)

    # -- the driver's calls ----------------------------------------------------------------------------------------

    def ask_captions(
        self,
        samples: Sequence[Sample],
        sampling: SamplingParams,
        *,
        completions: int = 1,
        states: int = 0,
        others: Sequence[Sample] = (),
    ) -> int:
        """Asks for captions and rewards for `samples` by the newest version, on the pool, before any training rollout.

        The groups of the first `states` samples hold the state of their first completion, too; those of samples that
        have one of `others` what the policy makes of its pictures. Returns the number that `captions` is asked for.

        Raises:
            RolloutError: no version is published.
        """

        def ask() -> int:
            with self._changed:
                newest = self._loop.versions.newest
                if newest is None:
                    raise RolloutError("no policy version to generate with: the learner has not published one yet")
                asked = self._loop.buffer.open_evaluation(samples, sampling, completions, newest, states, others)
            self._loop.submit("eval", [*asked.requests.values()])
            return asked.number

        return self._pump.call(ask, COMMAND_TIMEOUT_S)

    def captions(self, number: int, wait_s: float, idle_s: float) -> Generated | Wait:
        """What `ask_captions` asked for, once; `Wait` if it is not there after `wait_s`.

        Raises:
            RolloutError: workers were ready, and none gave an answer for `idle_s`.
        """
        ends = self._clock() + wait_s
        with self._changed:
            asked = self._loop.buffer.evaluation(number)
            try:
                while not asked.complete:
                    self._pump.check()
                    now = self._clock()
                    if asked.stuck_for(now, self._loop.pool.status()["ready"] > 0) > idle_s:
                        raise RolloutError(
                            f"{asked.came} of {len(asked.requests)} samples were captioned, and no other one within "
                            f"{idle_s:g} s though workers were ready; mmrl status says what they do"
                        )
                    if now >= ends:
                        return Wait("captions are under way", asked.came)
                    self._changed.wait(min(ends - now, idle_s, _LOOK_S))
            except MMRLError:
                self._loop.buffer.close_evaluation(number)
                raise
            self._loop.buffer.close_evaluation(number)
            return asked.answer()

    def resize(self, workers: int | None, by: str = "the driver") -> ScaleAnswer:
        """Sets how many rollout workers there should be, or leaves it to the run.

        Raises:
            ConfigError: outside the bounds of `rollout.workers` and `rollout.min_workers`.
            RolloutError: the run has ended.
        """
        self._pump.check()
        with self._changed:
            return self._loop.scale(workers, by)

    def request_stop(self, reason: str) -> None:
        """No further step is planned; the one that is out may finish."""
        with self._changed:
            self._stop = self._stop or reason
            self._loop.stopping = True
            self._pump.wake()

    def failure(self) -> MMRLError | None:
        """What ended the run, or None."""
        return self._pump.failure

    def status(self) -> dict[str, Any]:
        """Where the run stands, JSON-able."""
        with self._changed:
            out = None if self._planned is None else self._planned.plan.step
            return {
                "run": self._cfg.run.name,
                "step": self._next_plan,
                "steps": self._cfg.learner.steps,
                "waiting": self._loop.who_waits(out, self._next_plan, self._asked_since is not None),
                "stopping": self._stop,
                "error": None if self._pump.failure is None else str(self._pump.failure),
                "metrics": dict(self._writer.last_line),
                "throughput": self._writer.throughput(),
                "held_out": self._held_out["eval"].status(),
                "looks": self._held_out["blind"].status(),
                **self._loop.status(self._next_plan),
            }

    # -- inside, under the lock ------------------------------------------------------------------------------------

    def _answer(self, step: int, world_size: int) -> StepPlan | Wait | Stop:
        if self._pump.failure is not None:
            return Stop(str(self._pump.failure), failed=True)
        if self._planned is not None and self._planned.plan.step == step:
            if self._planned.world_size != world_size:
                raise RolloutError(f"step {step} was planned for {self._planned.world_size} ranks, not {world_size}")
            return self._planned.plan
        if not self._loop.begun:
            return Wait("rollouts have not begun: the learner's first rank restores or rewinds first")
        if step != self._next_plan:
            raise RolloutError(f"step {step} was asked for, but {self._next_plan} is due: restore or rewind first")
        if step >= self._cfg.learner.steps:
            return Stop(f"all {self._cfg.learner.steps} steps are done")
        if self._stop is not None:
            return Stop(self._stop)
        if self._asked_since is None:
            self._asked_since = self._clock()
        for watch in self._held_out.values():
            if (due := watch.awaited(step)) is not None:
                return Wait(f"the evaluation of step {due} is under way, and step {step} waits for what it shows")
            if (reason := watch.ended()) is not None:
                return Stop(reason, early=True)
        if not self._loop.buffer.is_complete(step):
            return Wait("{} of {} groups of step {} have arrived".format(*self._loop.buffer.progress(step), step))
        return self._plan(step, world_size)

    def _plan(self, step: int, world_size: int) -> StepPlan | Wait | Stop:
        taken = self._loop.buffer.take(step, version=step)
        if isinstance(taken, list):
            self._loop.sample_again(taken)
            return Wait(f"{len(taken)} groups of step {step} were too stale and are sampled again")
        try:
            plan = build_step_plan(
                step,
                taken.groups,
                learner=self._cfg.learner,
                max_new_tokens=self._cfg.rollout.max_new_tokens,
                world_size=world_size,
                normalize=self._cfg.reward.normalize,
            )
        except MMRLError as error:
            self._pump.fail(error)
            return Stop(str(error), failed=True)
        plan = replace(plan, metrics={**plan.metrics, **taken.figures})
        waited = self._clock() - (self._asked_since or self._clock())
        self._asked_since = None
        self._planned = PlannedStep(plan, taken, world_size, waited)
        self._changed.notify_all()
        self._pump.wake()
        return plan
