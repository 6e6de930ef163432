"""`mmrl train`: a config in, a finished run folder out.

    run folder, owned ──▶ scenes ──▶ Ray ──▶ warm start, checks ──▶ controller + rollout workers
                                                                     │  evaluate (before) ‖ learner group starts
                                                                     ▼
                                                                     │  evaluate (eval.every) ‖ steps, checkpoints
                                  report ◀── summary ◀── evaluate (after), the best checkpoint ──▶ adapter/

No model is ever in this process: it is light, and needs no GPU.

The folder is there from the first moment, so that whatever stops the run, `--resume` finds it; where a check of a new
run fails it is taken away again. Whatever happens after the checks, summary and report say it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ray.util.placement_group import PlacementGroup

import mmrl_ray
from mmrl_ray.config import Config
from mmrl_ray.config.load import changed_keys, dump_config
from mmrl_ray.config.paths import RUN_CONFIG, with_absolute_paths
from mmrl_ray.data.samples import QuarantineRecord, Sample, iter_references, reasons_of, told
from mmrl_ray.data.scenes.generator import write_scenes
from mmrl_ray.errors import Interrupted, MMRLError, RunError
from mmrl_ray.evaluation.records import load_evaluation, load_states, states_json
from mmrl_ray.evaluation.scores import Blindness
from mmrl_ray.evaluation.sight import BLIND_LOOK
from mmrl_ray.learner.group import LearnerGroup
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.planning.preflight import (
    check_engine,
    check_references,
    evaluation_split,
    held_out_quarantine,
    refuse_moved,
    trained_on,
)
from mmrl_ray.report.page import write_report
from mmrl_ray.rewards.build import check_reward
from mmrl_ray.rollouts.controller_actor import ControllerClient, start_controller
from mmrl_ray.rollouts.factory import PolicyEngineFactory
from mmrl_ray.rollouts.pool_settings import PoolSettings, shared_gpus, shared_gpus_of
from mmrl_ray.rollouts.teacher import teachers
from mmrl_ray.run_records.control_files import STARTING_S, conclude_status, write_status
from mmrl_ray.run_records.run_dir import BASE, STATISTICS, RunDir, checkpoint_steps
from mmrl_ray.run_records.run_owner import OWNER_FILE, RunOwner, living_owner
from mmrl_ray.run_records.step_log import EVENTS, note_event
from mmrl_ray.telemetry.logs import start_logging
from mmrl_ray.telemetry.terminal import ProgressFn, RunProgress
from mmrl_ray.tracking.pictures import PictureTaker
from mmrl_ray.tracking.run import Tracking
from mmrl_ray.training import offline
from mmrl_ray.training.cluster import is_joined, ray_session, refuse_node_local
from mmrl_ray.training.held_out import HeldOut, choice_json, evaluation_json, warn_if_blind
from mmrl_ray.training.interrupts import StopOnInterrupt
from mmrl_ray.training.local_ray import PeakMemory, scrape_targets
from mmrl_ray.training.model_process import ModelProcess, base_of, look_at
from mmrl_ray.training.serve_apps import LivePolicy, RunReward
from mmrl_ray.training.sight import SightCheck, sight_json

SUMMARY = "summary.json"
_DOES = {
    "warm_start": "loading what the warm start begins with",
    "checks": "loading the model for a trial",
    "statistics": "counting words of the references",
    "stored": "copying stored data",
    "serve": "starting the servers",
    "start": "starting the rollout workers",
    "trackers": "asking the trackers",
}
"""What a phase of the summary does while it tells nothing of itself."""
_WATCH_S = 0.5
_LOST_S = 5.0
"""For a controller that a signal has reached, too, to end."""
_HURRIED_S = 20.0
_STATUS_S = 60.0
_VERSIONS = ("ray", "torch", "transformers", "peft", "pyarrow")
_SHOWN = {"reward/mean": "reward", "loss": "loss", "kl": "kl"}
"""Metrics beside the progress bar; an algorithm adds its own, and the speed comes last."""


def train(cfg: Config, *, resume: bool = False, address: str | None = None, debug: bool = False) -> str:
    """Runs, or goes on with, a whole run; returns the folder.

    Raises:
        MMRLError: what stopped it; the run folder, if it came to that, says so too.
        Interrupted: the user did, and what was finished is checkpointed.
    """
    as_json = cfg.run.log_format == "json"
    level = logging.INFO if as_json else logging.WARNING  # on a terminal the progress says it already
    start_logging(cfg.run.log_format, run=cfg.run.name, role="driver", level=level)
    with (
        PeakMemory() as memory,
        RunProgress(as_log=as_json) as progress,
        StopOnInterrupt(say=progress.note) as interrupt,
    ):
        run = _Run(with_absolute_paths(cfg), progress, memory, interrupt)
        return run.whole(resume=resume, address=address, debug=debug)


class _Run:
    """One run from its config to its report."""

    def __init__(self, cfg: Config, progress: RunProgress, memory: PeakMemory, interrupt: StopOnInterrupt) -> None:
        self._cfg = cfg
        self._progress = progress
        self._memory = memory
        self._interrupt = interrupt
        self._pairs: list[Sample] = []
        self._facts: dict[str, Any] = {}
        """Of the data, for the summary."""
        self._findings: list[tuple[str, dict[str, Any]]] = []
        """Events from before there was a run folder to write them into."""
        self._seconds: dict[str, float] = {}
        self._began = time.monotonic()
        self._keep = True
        """Whether the run folder stays if the run ends now."""
        self._is_resumed = False
        self._is_root_new = False
        """Whether the folder that it lies in was made for it."""
        self._joined = False
        """Whether its Ray outlives it."""
        self._step = 0
        """Steps that are known to be finished."""
        self._run: RunDir
        """Opened or made by `whole`, which everything else is below."""
        self._owner: RunOwner
        self._tracking: Tracking
        self._process: ModelProcess
        """Open until the last that needs the whole model has had it."""

    def whole(self, *, resume: bool, address: str | None, debug: bool) -> str:
        """All phases; see the top of this file."""
        cfg = self._cfg
        run = self._run = RunDir.open(cfg.run.root, cfg.run.name) if resume else self._created()
        try:
            with RunOwner(run) as self._owner:
                # Not before: until here it may be another's.
                self._keep = self._is_resumed = resume or run.exists(RUN_CONFIG)
                if self._owner.taken_over is not None:
                    self._progress.note(f"taken over from {self._owner.taken_over}, which is gone")
                run.remove_scratch()  # of a process that was killed
                run.cut_torn_line(EVENTS)  # of a machine that went down
                with closing(Tracking(cfg, run, self._progress)) as self._tracking:
                    self._begin(address=address, debug=debug)
        finally:
            if not self._keep:
                run.delete("")
                if self._is_root_new:
                    with suppress(OSError):  # another run has begun there meanwhile
                        Path(run.path).parent.rmdir()
        return run.location

    def _created(self) -> RunDir:
        cfg = self._cfg
        self._is_root_new = "://" not in cfg.run.root and not Path(cfg.run.root).exists()
        try:
            return RunDir.create(cfg.run.root, cfg.run.name)
        except RunError:
            if (owner := _owner_of(cfg)) is not None:
                raise RunError(f"run {cfg.run.name} in {cfg.run.root} is under way: {owner}") from None
            if (found := _unbegun(cfg)) is not None:
                return found
            raise

    def _begin(self, *, address: str | None, debug: bool) -> None:
        """Prepares, then runs. A new folder is kept if the user stops the preparation, not if a check fails."""
        run = self._run
        again = run.exists(EVENTS)
        if not run.exists(RUN_CONFIG):
            run.write_text(RUN_CONFIG, dump_config(self._cfg))
        with ExitStack() as session:
            try:
                start, unseeing, samples = self._prepare(again, session, address=address, debug=debug)
            except KeyboardInterrupt:
                self._keep = True
                conclude_status(run, "interrupted")
                raise Interrupted(
                    f"stopped before the first step; go on with: mmrl train --resume {run.location}"
                ) from None
            except Exception:
                if self._keep:
                    conclude_status(run, "failed: it could not start")
                raise
            opened = session.pop_all()
        self._keep = True
        cfg = self._cfg
        status = "failed"
        try:
            with opened as stack:
                write_status(run, "starting", STARTING_S)
                note_event(run, "run_resumed" if again else "run_started")
                if cfg.rollout.engine.told is not None:
                    note_event(run, "engine", detail=cfg.rollout.engine.told)
                if self._owner.taken_over is not None:
                    note_event(run, "run_taken_over", owner=self._owner.taken_over)
                for kind, told_of in self._findings if not again else ():
                    note_event(run, kind, **told_of)
                self._keep_config(again)
                self._tracking.start(self._cfg)
                if not again:
                    warn_if_blind(run, self._progress, "warm start", unseeing)
                statistics = self._statistics()
                with self._timed("stored"):
                    start, self._pairs = offline.pair_data(offline.stored_data(start, run), run)
                stack.enter_context(scrape_targets(run))
                with self._timed("serve"):
                    live = stack.enter_context(LivePolicy(cfg, run, start.model.path, joined=self._joined))
                    hosted = stack.enter_context(RunReward(cfg, run, statistics, joined=self._joined))
                for line in live.greeting():
                    self._progress.note(line)
                held_out = HeldOut(self._cfg, run, samples, hosted.own, statistics, self._progress)
                if cfg.agent is None:
                    with self._progress.busy("waiting for room on GPUs"):
                        bundles = stack.enter_context(shared_gpus(start))
                    teacher = None
                    if start.teacher is not None:
                        with self._timed("teacher"), self._progress.busy("loading the teacher"):
                            teacher = stack.enter_context(teachers(start))
                    factory = PolicyEngineFactory(start, hosted.reward, teacher)
                    sight = SightCheck(self._cfg, run, samples, self._progress)
                    self._learn(start, factory, hosted, held_out, sight, bundles)
                else:
                    self._learn_by_value(start, hosted, held_out)
            status = "finished"
        except Interrupted:
            status = "interrupted"
            raise
        except KeyboardInterrupt:
            status = "interrupted"
            raise Interrupted(f"stopped at once; go on with: mmrl train --resume {run.location}") from None
        except MMRLError as error:
            status = f"failed: {error}"
            raise
        finally:
            self._owner.check()
            with StopOnInterrupt(lambda: self._progress.note("writing the report; a second signal stops at once")):
                self._conclude(status)

    def _prepare(
        self, again: bool, session: ExitStack, *, address: str | None, debug: bool
    ) -> tuple[Config, Blindness | None, list[Sample]]:
        """Data, warm start and checks: the config to start from, what the warm start does not see, what is held out.

        A Ray is started on the way, which `session` ends.
        """
        cfg, run = self._cfg, self._run
        shared_gpus_of(cfg)  # refuses what cannot be placed, before anything takes its time
        write_status(run, "starting", STARTING_S)
        with self._timed("data"):
            if self._is_resumed:
                refuse_moved(cfg, base_is_kept=run.exists(BASE))
            if not again:
                offline.check_pairs(cfg)
                offline.check_stored(cfg)
            if cfg.data.scenes is not None:
                write_scenes(cfg.data.scenes, cfg.data.train, cfg.data.eval)
            self._joined = is_joined(address)
            if not self._joined:
                check_engine(cfg)
            if cfg.rollout.engine.told is not None:
                self._progress.note(cfg.rollout.engine.told)
            check_references(cfg)
            samples = self._held_out(again)
        with self._timed("trackers"):
            self._tracking.check(is_resumed=again)
        with self._progress.busy("starting Ray"):
            say = self._progress.note
            session.enter_context(ray_session(cfg, address=address, debug=debug, show=say, say=say))
        refuse_node_local(cfg)
        with self._timed("warm_start"):
            self._process = session.enter_context(ModelProcess(cfg, say))
            base = self._process.call(base_of, cfg, run, progress=self._warm_start_progress(), say=say)
            if base.kept_bytes:
                self._facts["base_bytes"] = base.kept_bytes
            self._tell_left_out("warm_start", base.left_out)
            if base.unseeing is not None and not again:
                self._progress.warn(base.unseeing)
                self._findings.append((BLIND_LOOK, {"what": "warm start", "detail": base.unseeing}))
        start = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": base.path})})
        with self._timed("checks"):
            check_reward(start.reward)
            looked = self._process.call(look_at, start)
            for line in looked.lines:
                self._progress.note(line)
            start = looked.cfg
            self._cfg = cfg.model_copy(update={"reward": start.reward})
        if cfg.agent is None:
            self._process.close()
        return start, base.blindness, samples

    def _warm_start_progress(self) -> ProgressFn:
        """Shown, and told to whoever looks at the run's status."""
        shown = self._progress.phase("warm start", lazily=True)
        told = time.monotonic()

        def update(done: int, total: int, figures: Mapping[str, float]) -> None:
            nonlocal told
            shown(done, total, figures)
            if time.monotonic() - told >= _STATUS_S:
                told = time.monotonic()
                write_status(self._run, "starting", STARTING_S)

        return update

    def _keep_config(self, again: bool) -> None:
        """The config as it is from here on; a resume that changes it says what it changes."""
        run = self._run
        text = dump_config(self._cfg)
        before = run.read_text(RUN_CONFIG) if run.exists(RUN_CONFIG) else None
        if before == text:
            return
        run.write_text(RUN_CONFIG, text)
        if again and before is not None and (changed := changed_keys(before, text)):
            note_event(run, "config_changed", detail=", ".join(changed))

    # -- data ------------------------------------------------------------------------------------------------------

    def _held_out(self, resume: bool) -> list[Sample]:
        """The samples to evaluate on; says which of them are broken, and which are trained on."""
        quarantine = held_out_quarantine(self._cfg)
        samples = evaluation_split(self._cfg, quarantine)
        self._tell_left_out("held_out", quarantine.records)
        overlaps = list(trained_on(self._cfg, samples, resume=resume))
        self._facts["held_out"] = {"samples": len(samples), "trained_on": [each.to_json() for each in overlaps]}
        for each in overlaps:
            if each.found:
                self._progress.note(f"warning: {each}")
                self._findings.append(("held_out_trained_on", {"detail": str(each), **each.to_json()}))
        return samples

    def _tell_left_out(self, where: str, records: Sequence[QuarantineRecord]) -> None:
        """On the terminal, in the events and in the summary."""
        self._facts.setdefault("left_out", {})[where] = [record.as_dict() for record in records]
        if records:
            self._progress.note(f"{where.replace('_', ' ')}: {told(records)}")
            details = {"samples": [record.sample_id for record in records[:20]], "detail": reasons_of(records)}
            self._findings.append((f"{where}_left_out", {"count": len(records), **details}))

    # -- phases ----------------------------------------------------------------------------------------------------

    def _statistics(self) -> CorpusStatistics:
        """Of the training references; they stay with the run."""
        run = self._run
        with self._timed("statistics"):
            if run.exists(STATISTICS):
                statistics = CorpusStatistics.from_json(run.read_text(STATISTICS))
            else:
                references = iter_references(self._cfg.data.train)
                order = self._cfg.reward.language_order
                statistics = CorpusStatistics.from_references(references, language_order=order)
                run.write_text(STATISTICS, statistics.to_json())
        return statistics

    def _learn(
        self,
        cfg: Config,
        factory: PolicyEngineFactory,
        hosted: RunReward,
        held_out: HeldOut,
        sight: SightCheck,
        bundles: PlacementGroup | None = None,
    ) -> None:
        """Rollout workers and learners, from the evaluation before to the one after; `cfg` is what they start from."""
        run = self._run
        with self._timed("start"):
            settings = PoolSettings.of(cfg, bundles)
            controller = start_controller(cfg, run, factory, settings=settings)
        if held_out.chooses:
            held_out.watch(controller)
        sight.watch(controller)
        is_beginning = not checkpoint_steps(run)
        learner: LearnerGroup | None = None
        interrupt = StopOnInterrupt(
            lambda: controller.request_stop("interrupted"), awaited=self._awaited, say=self._progress.note
        )
        is_lost = False
        try:
            with PictureTaker(cfg, run, held_out.samples, controller), interrupt:
                learner = LearnerGroup(cfg, run, controller, bundles)
                learner.start()
                with interrupt.at_once():
                    with self._progress.busy("loading the reward"):
                        hosted.wait()
                    if held_out.samples and load_evaluation(run, "before") is None:
                        if is_beginning:
                            self._evaluate(held_out, "before", controller)
                        else:  # a later version's captions would pass for the first one's
                            self._progress.note("evaluate (before): left out, the run is past its beginning")
                    if held_out.chooses and is_beginning:
                        held_out.judge_before(controller)
                    if is_beginning:
                        sight.look_before(controller)
                    if is_beginning and not offline.has_measured(run, "before"):
                        self._measure_pairs(cfg, "before", controller)
                with self._timed("learning"):
                    self._watch(controller, learner, hosted, held_out, sight)
                    outcome = learner.result()
                if not outcome.finished:
                    raise Interrupted(
                        f"stopped after {outcome.step} steps; go on with: mmrl train --resume {run.location}"
                    )
                if outcome.step < cfg.learner.steps:
                    self._progress.note(f"ended after {outcome.step} of {cfg.learner.steps} steps: {outcome.reason}")
                    self._facts["ended_early"] = {"step": outcome.step, "detail": outcome.reason}
                    note_event(run, "ended_early", **self._facts["ended_early"])
                with interrupt.at_once():
                    if held_out.chooses:
                        held_out.finish_looking(controller)
                    if held_out.samples:
                        self._evaluate(held_out, "after", controller)
                    if held_out.chooses:
                        held_out.choose(outcome.step, controller)
                    sight.finish_looking(controller, outcome.step)
                    self._measure_pairs(cfg, "after", controller)
        except (MMRLError, KeyboardInterrupt) as error:
            if not interrupt.asked or isinstance(error, Interrupted):
                raise
            # A service manager may signal every process of a service, and soon kill what is left of it.
            is_lost = True
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Interrupted(
                f"stopped, but what was to be finished is lost: {error}; go on from the newest checkpoint with: mmrl "
                f"train --resume {run.location}"
            ) from error
        finally:
            try:
                with suppress(MMRLError) if is_lost else nullcontext():
                    controller.close(**({"timeout_s": _LOST_S} if is_lost else {}))
            finally:
                if learner is not None:
                    learner.close()

    def _learn_by_value(self, cfg: Config, hosted: RunReward, held_out: HeldOut) -> None:
        # Imported here: RLlib takes seconds, which other runs need not pay.
        from mmrl_ray.training.value_based import ValueBasedRun

        def evaluate(name: str, captions: Sequence[str]) -> None:
            held_out.score(name, held_out.samples, captions)

        with self._timed("start"):
            learning = ValueBasedRun(cfg, self._run, hosted, held_out.samples, self._progress, self._process)
        pictures = PictureTaker(cfg, self._run, held_out.samples, None)
        with closing(learning), pictures, self._timed("learning"):
            learning.learn(evaluate)

    def _evaluate(self, held_out: HeldOut, name: str, controller: ControllerClient) -> None:
        with self._timed(f"evaluate_{name}"):
            held_out.evaluate(name, controller)

    def _measure_pairs(self, cfg: Config, name: str, controller: ControllerClient) -> None:
        """What the policy makes of the held-out pairs, if there are any."""
        if self._pairs:
            with self._timed(f"preferences_{name}"):
                self._progress.note(offline.measure_pairs(cfg, self._run, name, controller, self._pairs))

    def _watch(
        self,
        controller: ControllerClient,
        learner: LearnerGroup,
        hosted: RunReward,
        held_out: HeldOut,
        sight: SightCheck,
    ) -> None:
        """Shows the newest step until the learner group is done, and judges what was evaluated meanwhile."""
        update: ProgressFn = self._progress.phase("learning")
        self._step = shown = 0
        is_over = False
        while not is_over:
            is_over = learner.wait(_WATCH_S)  # and then a last look: steps were finished since the one before
            self._owner.check()
            hosted.look()
            status = controller.status()
            self._step, steps = int(status["step"]), int(status["steps"])
            if status["held_out"]["complete"] and not is_over:
                held_out.look(controller)
            if status["looks"]["complete"] and not is_over:
                sight.look(controller)
            if self._step > shown:
                shown = self._step
                update(shown, steps, _figures(status.get("metrics", {}), self._cfg.family.shown))

    def _awaited(self) -> str:
        """What is still done when the user stops the run."""
        return f"finishing step {min(self._step + 1, self._cfg.learner.steps)}, then a checkpoint"

    # -- the end ---------------------------------------------------------------------------------------------------

    def _conclude(self, status: str) -> None:
        """Summary and report, however the run ended."""
        run = self._run
        before, after = load_evaluation(run, "before"), load_evaluation(run, "after")
        states = {name: load_states(run, name) for name in ("before", "after")}
        seconds = {**self._seconds, "total": time.monotonic() - self._began}
        summary = {
            "status": status,
            "run": self._cfg.run.name,
            "eval": evaluation_json(before, after),
            **({"checkpoints": chosen} if (chosen := choice_json(run)) else {}),
            **({"sight": looks} if (looks := sight_json(run)) else {}),
            "correlations": states_json(states),
            **self._facts,
            **({"preferences": pairs} if (pairs := offline.preferences_json(run)) else {}),
            "seconds": seconds,
            "peak_memory_bytes": self._memory.peak_bytes,
            "cpus": os.cpu_count(),
            "versions": _versions(),
        }
        run.write_json(SUMMARY, summary)
        conclude_status(run, status)
        note_event(run, "run_ended", status=status)
        report = write_report(run)
        with self._progress.busy("telling trackers the rest"):
            is_hurried = status == "interrupted"  # whoever stopped it may soon kill it
            self._tracking.finish(failed=status.startswith("failed"), within_s=_HURRIED_S if is_hurried else None)
        self._progress.note(f"{status}: {run.location}")
        self._progress.note(f"report: {report}")
        self._progress.note(f"wall {seconds['total']:.0f} s, peak resident {self._memory.peak_bytes / 1e9:.2f} GB")

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self._interrupt.check()
        began = time.monotonic()
        try:
            with self._progress.busy(_DOES.get(phase, phase.replace("_", " "))):
                yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - began


def _owner_of(cfg: Config) -> str | None:
    """Who is at work in the run's folder."""
    with suppress(RunError):  # no run, so nobody's
        return living_owner(RunDir.open(cfg.run.root, cfg.run.name))
    return None


def _unbegun(cfg: Config) -> RunDir | None:
    """The run's folder where there is nothing in it yet: whoever made it was killed at once."""
    with suppress(RunError):  # no run: what is there is something else
        run = RunDir.open(cfg.run.root, cfg.run.name)
        if set(run.list()) <= {OWNER_FILE}:
            return run
    return None


def _figures(line: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, float]:
    wanted = {**_SHOWN, **own, "samples_per_second": "samples/s"}
    known = {name: line[key] for key, name in wanted.items() if isinstance(line.get(key), int | float)}
    return {name: float(value) for name, value in known.items() if math.isfinite(value)}


def _versions() -> dict[str, str]:
    found = {"mmrl_ray": mmrl_ray.__version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in _VERSIONS}
