"""`LearnerGroup`: the learners of one run as a Ray Train job, seen from the driver.

`TorchTrainer.fit()` blocks, and takes the signals over when it runs on the main thread: here it has a thread of its
own, and the driver's main thread stays free for progress and Ctrl-C. To end a group early, tell the controller
(`request_stop`): the next plan is then a stop, and the group finishes its step, saves a checkpoint and returns.

With a range of learners (`Room`), Ray Train makes their number from what the nodes have in all, whoever uses it. So
that it does not count on the rollout workers' share, that share is registered where Ray Train registers its own
(`rollouts/pool_settings.py`). With room for fewer than the minimum Ray Train waits without an end; here that wait has
a deadline.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
    PlacementGroupHandle,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util.placement_group import PlacementGroup

from mmrl_ray.config import Config
from mmrl_ray.config.schema import Demand, demands_of
from mmrl_ray.errors import ConfigError, LearnerError, MMRLError, PlacementError
from mmrl_ray.learner.job import LearnerJob, LearnerOutcome, train_loop
from mmrl_ray.rollouts.controller_actor import ControllerClient
from mmrl_ray.rollouts.pool_settings import register
from mmrl_ray.run_records.run_dir import RunDir

logger = logging.getLogger(__name__)

_TRAIN_FOLDER = ".tmp-train"
"""Ray Train's own bookkeeping, inside the run folder while the group runs: all nodes see it there."""
_COLLECTIVE_TIMEOUT_S = 1800
"""Ranks wait for each other no longer than this: the longest forward and backward pass of one rank, and then some."""
_LOOK_S = 2.0
"""How often the room for a range of learners is looked at."""
_END_S, _TELL_S = 90.0, 10.0
"""A learner sees at its next call that the controller is gone, and Ray Train at its next look that the learner is; a
group that is only starting ends when it has started. On a busy machine each of it takes its time."""
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_PREEMPTION = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
Bundle = Mapping[str, float]

_CALL_TIMEOUT_S = 5.0
_ROUNDING = 1e-6


class _Trainer(TorchTrainer):
    """Without the process for datasets of Ray Data, which learners do not read, and on a Ray of the run's own without
    the one that tidies up when the run is killed: that Ray ends with it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        node = ray._private.worker._global_node  # None or a node that was here before
        own = node is not None and node.head
        is_lent = any(isinstance(callback, _InBundles) for callback in self.run_config.callbacks or ())
        unused = {"DatasetsCallback", *(["PlacementGroupCleanerCallback"] if own or is_lent else [])}
        made: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # new in Ray Train's second API
        return [callback for callback in made if type(callback).__name__ not in unused]


class _Lent(DefaultPlacementGroupHandle):
    """Of bundles that are not Ray Train's to give back: a group that is started again finds them."""

    def shutdown(self) -> None:
        """They stay."""


class _InBundles(ControllerCallback):
    """Has Ray Train put its workers into bundles that are there, in place of some of its own.

    It has no setting for that. One that makes its groups otherwise places them itself, as if nothing were shared.
    """

    def __init__(self, bundles: PlacementGroup) -> None:
        self._bundles = bundles

    def after_controller_start(self, train_run_context: Any) -> None:
        """In Ray Train's controller, before it makes a group."""
        bundles = self._bundles

        class InBundles(WorkerGroup):
            def _create_placement_group(self, *args: Any, **kwargs: Any) -> PlacementGroupHandle:
                return _Lent(bundles)

        TrainController.worker_group_cls = InBundles


class LearnerGroup:
    """Start it, wait for it, take its outcome."""

    def __init__(
        self, cfg: Config, run: RunDir, controller: ControllerClient, bundles: PlacementGroup | None = None
    ) -> None:
        """`cfg.model.path` is the folder (or hub id) that reinforcement learning starts from.

        With `bundles`, of `shared_gpus`, each learner goes into one of them.

        Raises:
            ConfigError: two learners could land on one GPU.
        """
        share, most = cfg.resources.learner, cfg.learner.max_workers
        if most > 1 and 0 < share.gpus <= 0.5:
            raise ConfigError(
                f"resources.learner.gpus={share.gpus:g} lets two of {most} learners land on one GPU, "
                "where they cannot reduce gradients: set it above 0.5"
            )
        self._cfg = cfg
        self._run = run
        self._bundles = bundles
        # Ray Train changes its workers' directory: a relative path would mean something else there.
        path = Path(cfg.model.path).expanduser()
        if path.exists():
            cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": str(path.absolute())})})
        self._job = LearnerJob(cfg, run, controller)
        self._outcome: LearnerOutcome | None = None
        self._error: BaseException | None = None
        self._room = None if isinstance(cfg.learner.workers, int) else Room(cfg)
        self._thread = threading.Thread(target=self._fit, name="learner-group", daemon=True)

    def start(self) -> None:
        """Returns at once; the group resumes from the run folder's newest valid checkpoint, if there is one."""
        if self._room is not None:
            self._room.reserve()
        # Ray Train reads these where `fit` is called and hands them to its own processes.
        os.environ[_START_TIMEOUT] = str(self._cfg.resources.placement_timeout_s)
        if len([node for node in ray.nodes() if node["Alive"]]) == 1:
            # It watches for nodes that are about to be taken away: with one node, a process of 200 MB for nothing.
            os.environ.setdefault(_PREEMPTION, "0")
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether the group has ended, after at most `timeout_s`; call it again until it has."""
        deadline = time.monotonic() + timeout_s
        while self._thread.is_alive() and self._error is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._thread.join(min(left, _LOOK_S))
            self._look_for_room()
        return True

    def close(self, timeout_s: float = _END_S) -> None:
        """Waits for what is left of the group when its controller is closed or gone, before anybody ends Ray.

        Ray ends a process of which a thread still calls it, without a word.
        """
        if self._thread.ident is None:
            return
        deadline = time.monotonic() + timeout_s
        self._thread.join(min(_TELL_S, timeout_s))
        if self._thread.is_alive() and timeout_s > _TELL_S:
            logger.warning("waiting for the learner group to end, at most %g s", timeout_s)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning(
                "the learner group did not end within %g s: this program may end by a signal, in place of its exit "
                "code, while Ray ends; what the run has written is whole",
                timeout_s,
            )

    def _look_for_room(self) -> None:
        if self._room is None or not self._thread.is_alive():
            return
        try:
            self._room.check()
        except PlacementError as error:
            # Ray Train goes on waiting in its thread, which ends with the process.
            self._error = error

    def result(self) -> LearnerOutcome:
        """How the group ended; call it after `wait` said so.

        Raises:
            MMRLError: what ended it: the error of a learner or of the rollouts as it was raised there, PlacementError
                when Ray had no room for the learners, LearnerError when they died more often than `max_failures`.
        """
        if self._error is None and (self._thread.is_alive() or self._outcome is None):
            raise LearnerError("the learner group has not ended yet: wait for it first")
        if self._error is not None:
            raise self._explained(self._error) from self._error
        assert self._outcome is not None
        if self._outcome.error is not None:
            raise self._outcome.error
        return self._outcome

    def _fit(self) -> None:
        try:
            self._outcome = self._trainer().fit().return_value  # type: ignore[attr-defined]  # Ray types its first API
        except BaseException as error:  # noqa: BLE001 - the thread's boundary: `result` raises it
            self._error = error
        finally:
            self._run.delete(_TRAIN_FOLDER)

    def _trainer(self) -> TorchTrainer:
        learner = self._cfg.learner
        return _Trainer(
            train_loop,  # type: ignore[arg-type]  # a return value is new in Ray Train's second API
            train_loop_config={"job": self._job},
            scaling_config=scaling_config(self._cfg),
            run_config=RunConfig(
                name=_TRAIN_FOLDER,
                storage_path=self._run.full_path(),
                storage_filesystem=self._run.filesystem,
                callbacks=[_InBundles(self._bundles)] if self._bundles is not None else [],  # type: ignore[list-item]  # new there, too
                # Not to be placed in time is final; a group that died is started again.
                failure_config=FailureConfig(
                    max_failures=learner.max_failures,
                    # With a range it is not: what was counted on may be gone a moment later, and is counted again.
                    controller_failure_limit=learner.max_failures if self._room is not None else 0,  # type: ignore[call-arg]  # new there, too
                ),
            ),
            torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
        )

    def _explained(self, error: BaseException) -> MMRLError:
        learner, share = self._cfg.learner, self._cfg.resources.learner
        labels = ", ".join(f"{key}={value}" for key, value in share.node_labels.items())
        each = f"{share.cpus:g} CPUs and {share.gpus:g} GPUs each{f', on nodes labelled {labels},' if labels else ''}"
        if isinstance(error, MMRLError):
            return error
        if isinstance(error, WorkerGroupError):
            rank, cause = min(error.worker_failures.items())
            return LearnerError(
                f"learner {rank} died {learner.max_failures + 1} times, the last time of {_one_line(cause)}; "
                "the last checkpoint is good: continue with --resume"
            )
        if isinstance(error, ControllerError) and "StartupTimeout" in type(error.controller_failure).__name__:
            return PlacementError(
                f"{learner.min_workers} learners with {each} were not placed within "
                f"{self._cfg.resources.placement_timeout_s:g} s: lower learner.workers or resources.learner, or "
                "add nodes"
            )
        if isinstance(error, ControllerError):
            return LearnerError(f"the learner group did not start: {_one_line(error.controller_failure)}")
        return LearnerError(f"the learner group ended: {_one_line(error)}")


def scaling_config(cfg: Config) -> ScalingConfig:
    """How many learners, and what each asks Ray for."""
    learner, share = cfg.learner, cfg.resources.learner
    fixed = isinstance(learner.workers, int)
    count = learner.max_workers if fixed else (learner.min_workers, learner.max_workers)
    return ScalingConfig(
        num_workers=count,  # type: ignore[arg-type]  # a range is new there, too
        use_gpu=share.gpus > 0,
        resources_per_worker={"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {}),
        label_selector=dict(share.node_labels) or None,  # type: ignore[call-arg]  # Ray types its first API
    )


def _one_line(error: BaseException) -> str:
    """The last line of what Ray wraps a traceback into says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def others(cfg: Config) -> list[Demand]:
    """What the run asks Ray for beside its learners, at most."""
    return [demand for demand in demands_of(cfg, at_most=True) if demand.kind != "learner"]


def learners_that_fit(nodes: Sequence[Bundle], taken: Sequence[Bundle], learner: Bundle, most: int) -> int:
    """How many learners nodes of these sizes hold beside `taken`, each of which goes to the first node it fits on."""
    if not learner:
        return most
    free = [dict(node) for node in nodes]
    for bundle in taken:
        home = next((node for node in free if _times(node, bundle) >= 1), None)
        if home is not None:
            home.update({name: home[name] - amount for name, amount in bundle.items()})
    return min(most, sum(_times(node, learner) for node in free))


class Room:
    """Watches over the room for the learners of one run. Call `check` every few seconds."""

    def __init__(self, cfg: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cfg = cfg
        self._clock = clock
        self._since = clock()

    def reserve(self) -> None:
        """Registers what is not the learners', before Ray Train counts; the rollout controller keeps it registered.

        That it fails is told, and no reason to end a run.
        """
        try:
            ray.get(register(self._cfg.run.name, others(self._cfg)), timeout=_CALL_TIMEOUT_S)
        except ImportError:
            logger.warning("this Ray has no coordinator to reserve with: learners may count on the workers' share")
        except (ray.exceptions.RayError, RuntimeError, OSError) as error:
            logger.warning("the rollout workers' share was not reserved: %s", error)

    def check(self) -> None:
        """Looks at what there is now.

        Raises:
            PlacementError: for `resources.placement_timeout_s` there has been room for fewer than the minimum.
        """
        now = self._clock()
        learner, share = self._cfg.learner, self._cfg.resources.learner
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        taken = [demand.bundle for demand in others(self._cfg) if demand.bundle for _ in range(demand.count)]
        mine = {name: amount for name, amount in (("CPU", share.cpus), ("GPU", share.gpus)) if amount}
        fit = learners_that_fit(nodes, taken, mine, learner.max_workers)
        if fit >= learner.min_workers:
            self._since = now
        elif now - self._since >= self._cfg.resources.placement_timeout_s:
            raise PlacementError(
                f"{learner.min_workers} learners with {share.cpus:g} CPUs and {share.gpus:g} GPUs each, the least of "
                f"learner.workers, have had room for {fit} beside the rollout workers for "
                f"{self._cfg.resources.placement_timeout_s:g} s: lower learner.workers.min, resources or "
                "rollout.workers, or add nodes"
            )


def _times(node: Bundle, bundle: Bundle) -> int:
    return int(min((node.get(name, 0.0) + _ROUNDING) // amount for name, amount in bundle.items()))
