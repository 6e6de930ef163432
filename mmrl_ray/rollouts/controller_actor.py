"""The controller on Ray: the actor, how it is started, and the client that learner and driver call it through.

What can be asked of a controller is said once, by `Controller`. The actor passes any of it on, and the client's methods
are made from the controller's (`Forwarded`), but for those that do something at the caller's end, too: wait, encode,
fetch from the object store.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample, SampleStream
from mmrl_ray.errors import MMRLError, PlacementError, RolloutError, said
from mmrl_ray.experience.carriers import RolloutGroup, SamplingParams, StepPlan
from mmrl_ray.rollouts.controller import Controller
from mmrl_ray.rollouts.group_codec import open_payload
from mmrl_ray.rollouts.pool import RayWorkerPool
from mmrl_ray.rollouts.pool_settings import PoolSettings
from mmrl_ray.rollouts.pool_worker import PackedFactory
from mmrl_ray.rollouts.types import EngineFactory, Generated, Stop, Wait
from mmrl_ray.rollouts.weights import decode_state, encode_state
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import QUARANTINE_FILE
from mmrl_ray.telemetry.logs import start_logging
from mmrl_ray.telemetry.ray_meter import RayMeter

FETCH_TIMEOUT_S = 120.0
"""For one object out of the store."""
CALL_TIMEOUT_S = 300.0
"""For one call to the controller; beyond what it itself waits."""
PLAN_TIMEOUT_S = 3600.0
"""For one plan. The pool's own deadlines end a run that is stuck long before."""

IDLE_TIMEOUT_S = 600.0
"""For the next answer of an evaluation, while workers are ready to give it."""
_POLL_S = 2.0
"""How long one call waits in the controller."""
_END_S, _END_POLL_S = 30.0, 0.05
"""How long, and how often, it is looked whether a controller that was ended is gone."""

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class ControllerActor:
    """A `Controller` with the run's stream and pool. Made empty: what an actor's constructor raises loses its type."""

    def __init__(self) -> None:
        self._controller: Controller | None = None

    def ping(self) -> str:
        """Answers when the actor is placed."""
        return "pong"

    def start(self, cfg: Config, run: RunDir, factory: EngineFactory, settings: PoolSettings) -> None:
        """Opens the data and starts the pump.

        Raises:
            DataError: the training data cannot be read.
        """
        start_logging(cfg.run.log_format, run=cfg.run.name, role="controller")
        source = SampleStream(
            cfg.data.train,
            prompt=cfg.data.prompt,
            seed=cfg.run.seed,
            max_quarantined=cfg.data.max_quarantined,
            on_quarantine=lambda record: run.append_line(QUARANTINE_FILE, record.as_dict()),
        )
        pool = RayWorkerPool(cfg.run.name, factory, settings)
        meter = RayMeter(run=cfg.run.name)
        self._controller = Controller(cfg, run, pool=pool, source=source, put=ray.put, fetch=_fetch, meter=meter)
        gc.freeze()  # all modules stay: looking through them for rubbish was a sixth of what this process did
        self._controller.start()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One method of the controller."""
        if self._controller is None:
            raise RolloutError(f"the rollout controller was asked for {method} before it was started")
        return getattr(self._controller, method)(*args, **kwargs)


class Forwarded(Generic[P, R]):
    """A method of the client that is one of the controller's: same name, arguments, answer and errors."""

    def __init__(self, method: Callable[Concatenate[Controller, P], R]) -> None:
        self.__doc__ = method.__doc__
        self._name = method.__name__

    def __get__(self, client: ControllerClient, owner: type[ControllerClient]) -> Callable[P, R]:
        """The call, bound to a client; on the class itself, this description of it."""
        return self if client is None else partial(client.call, self._name)


class ControllerClient:
    """What learner and driver hold; picklable. Errors come back as the project's own, every call has a deadline.

    `restore` and `rewind` are for one rank, before any rank asks for a plan; `finish_step` is for one rank.
    """

    finish_step = Forwarded(Controller.finish_step)
    checkpoint_state = Forwarded(Controller.checkpoint_state)
    restore = Forwarded(Controller.restore)
    rewind = Forwarded(Controller.rewind)
    resize = Forwarded(Controller.resize)
    request_stop = Forwarded(Controller.request_stop)
    watch_held_out = Forwarded(Controller.watch_held_out)
    evaluated = Forwarded(Controller.evaluated)
    judge = Forwarded(Controller.judge)
    failure = Forwarded(Controller.failure)
    status = Forwarded(Controller.status)

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def call(self, method: str, *args: Any, beyond_s: float = 0.0, **kwargs: Any) -> Any:
        """One method of the controller, which may itself wait for `beyond_s`.

        Raises:
            RolloutError: the controller is gone, or did not answer in time.
            MMRLError: what the method raises.
        """
        return _answer(self._handle.call.remote(method, *args, **kwargs), method, CALL_TIMEOUT_S + beyond_s)

    # -- learner ---------------------------------------------------------------------------------------------------

    def next_plan(self, step: int, world_size: int) -> StepPlan | Stop:
        """The plan of `step`, as soon as there is one.

        Raises:
            RolloutError: there was none within `PLAN_TIMEOUT_S`, or the controller is gone.
        """
        for _ in range(int(PLAN_TIMEOUT_S / _POLL_S)):
            answer = self.call("next_plan", step, world_size, _POLL_S)
            if not isinstance(answer, Wait):
                return answer
        raise RolloutError(f"no plan for step {step} within {PLAN_TIMEOUT_S:g} s: {answer.reason}")

    def groups(self, payloads: Sequence[Any]) -> list[RolloutGroup]:
        """The groups behind `PlannedGroup.payload` or `ScoredGroup.payload`.

        Raises:
            RolloutError: one was lost (its node died) or did not come in time.
        """
        try:
            fetched: dict[Any, Any] = {}

            def once(value: Any) -> Any:
                if not isinstance(value, ray.ObjectRef):
                    return value
                if value not in fetched:
                    fetched[value] = _fetch(value)
                return fetched[value]

            return [open_payload(payload, once) for payload in payloads]
        except RayError as error:
            raise RolloutError(f"a group is lost or late: {said(error)}") from error

    def publish(self, version: int, state: Mapping[str, torch.Tensor]) -> None:
        """Makes `state` the weights of `version`: returns when the controller has a copy; the caller may die then."""
        self.call("publish", version, encode_state(state))

    def evaluate(self, version: int, state: Mapping[str, torch.Tensor]) -> None:
        """Has held-out samples captioned by a version that an earlier life of the run has published."""
        self.call("evaluate", version, encode_state(state))

    def fetch(self, version: int) -> dict[str, torch.Tensor]:
        """The weights of a version.

        Raises:
            RolloutError: the version is unknown, was dropped, or has no weights (0, the adapter as it is made).
        """
        references = self.call("weights", version)
        if not references:
            raise RolloutError(f"policy version {version} has no weights of its own: it is the adapter as it is made")
        return decode_state(_fetch(references[0]))

    # -- driver ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        samples: Sequence[Sample],
        sampling: SamplingParams,
        *,
        completions: int = 1,
        states: int = 0,
        others: Sequence[Sample] = (),
        idle_s: float = IDLE_TIMEOUT_S,
        progress: Callable[[int], None] | None = None,
    ) -> Generated:
        """`Controller.ask_captions`; returns when all are there, however long workers take to start.

        `progress` hears of how many samples are done, every other second.

        Raises:
            RolloutError: workers were ready, and none gave an answer for `idle_s`; or no version is published.
            MMRLError: the run has ended, since its workers could not be placed or started, say.
        """
        wanted: dict[str, Any] = {"completions": completions, "states": states, "others": others}
        number = self.call("ask_captions", samples, sampling, **wanted)
        # Each call has a deadline, and the pool's own end a run whose workers do not come.
        while isinstance(answer := self.call("captions", number, _POLL_S, idle_s), Wait):
            if progress is not None:
                progress(answer.came)
        return answer

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends workers and controller; what was handed to the rollout log is written, and nobody is answered after."""
        try:
            self.call("close", timeout_s, beyond_s=2 * timeout_s)
        finally:
            ray.kill(self._handle, no_restart=True)
            _await_end(self._handle)


def start_controller(
    cfg: Config, run: RunDir, factory: EngineFactory, *, settings: PoolSettings | None = None
) -> ControllerClient:
    """Starts the controller actor, which starts its workers; returns when it is up.

    Raises:
        DataError: the training data cannot be read.
        PlacementError: Ray had no room for it within `resources.placement_timeout_s`.
    """
    settings = settings or PoolSettings.of(cfg)
    # A thread for each rank that waits for a plan, and some for whoever else calls.
    threads = cfg.learner.max_workers + 16
    # Beside its driver, without which it ends anyhow: the loss of any other node is then not the run's.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(ControllerActor).options(
        num_cpus=0, max_concurrency=threads, max_restarts=0, scheduling_strategy=here
    )
    handle: Any = actor.remote()
    try:
        ray.get(handle.ping.remote(), timeout=settings.placement_timeout_s)
    except GetTimeoutError:
        raise PlacementError(
            f"the rollout controller was not placed within {settings.placement_timeout_s:g} s: it asks for no CPU, "
            "so the cluster has no node that takes actors"
        ) from None
    packed = PackedFactory.of(factory)  # with the model's half of the project, which only workers import
    _answer(handle.start.remote(cfg, run, packed, settings), "start", CALL_TIMEOUT_S)
    return ControllerClient(handle)


def _answer(reference: Any, method: str, timeout_s: float) -> Any:
    """What a call to the controller gives, with errors as the project's own."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, MMRLError):
            raise error.cause from None
        raise RolloutError(f"the rollout controller failed in {method}: {said(error.cause)}") from error
    except GetTimeoutError as error:
        raise RolloutError(f"the rollout controller did not answer {method} in time") from error
    except RayActorError as error:
        raise RolloutError(f"the rollout controller is gone: {said(error)}") from error


def _await_end(handle: Any) -> None:
    """Returns when an actor that was killed answers no more: `ray.kill` does not wait for that."""
    deadline = time.monotonic() + _END_S
    while (left := deadline - time.monotonic()) > 0:
        try:
            ray.get(handle.ping.remote(), timeout=left)
        except RayActorError:
            return
        except GetTimeoutError:
            break
        time.sleep(_END_POLL_S)
    _log.warning("the rollout controller still runs %g s after it was ended", _END_S)


def _fetch(value: Any) -> Any:
    return ray.get(value, timeout=FETCH_TIMEOUT_S) if isinstance(value, ray.ObjectRef) else value
