"""What a run does with its model before there are workers: the warm start and the checks, in a process of their own.

    driver ──▶ ModelProcess, an actor with a learner's share ──▶ base model, prompt and trial of it ──▶ ends
         ◀── progress, lines, warnings          ──▶ Ctrl-C

It ends before the workers come, and with it what it holds, of a GPU too. The driver keeps nothing of a model, and needs
no GPU: it may be on a node without one. The functions here that are called there import the model's half of the project
where they run.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmrl_ray.config import Config
from mmrl_ray.config.paths import with_absolute_paths
from mmrl_ray.data.samples import QuarantineRecord, Sample
from mmrl_ray.errors import MMRLError, PlacementError, RunError, said
from mmrl_ray.evaluation.scores import Blindness
from mmrl_ray.rollouts.pool_settings import demand_of
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.telemetry.terminal import RunProgress
from mmrl_ray.training.cluster import node_local_cache_refused, ray_session
from mmrl_ray.training.interrupts import StopOnInterrupt, interrupt

_WAIT_S = 2.0
"""How long one call waits for something to be told."""
_CALL_TIMEOUT_S = 300.0
"""For a call that should take no longer than that."""
_END_S = 5.0
"""For what was stopped at once to clear away what it began."""
_LOG, _SAY = "log", "say"

Told = tuple[str, tuple[Any, ...]]
"""(which function of the caller's, with what)."""


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a run begins with, and what its warm start found."""

    path: str
    """A folder, or a hub id."""
    kept_bytes: int
    """Of the run's own `base/`; 0 where it has none."""
    left_out: tuple[QuarantineRecord, ...]
    """Rows that the warm start could not use."""
    blindness: Blindness | None
    """Where its captions do not depend on the picture."""
    unseeing: str | None = None
    """In words, where its policy does not look at its pictures."""


def base_of(cfg: Config, run: RunDir | None, *, progress: Callable[..., None], say: Callable[[str], None]) -> Base:
    """The base of a run that the caller owns, kept with it; without a run, of the config alone.

    Raises:
        MMRLError: as `warm_start.base_of_run` and `keep_base`.
    """
    from mmrl_ray.training.warm_start import (
        base_of_run,
        keep_base,
        warm_start,
        warm_start_blindness,
        warm_start_left_out,
        warm_start_unseeing,
    )

    size = 0
    if run is None:
        path = warm_start(cfg, progress=progress, say=say)
    else:
        path, size = keep_base(cfg, run, base_of_run(cfg, run, progress=progress, say=say, owned=True))
    return Base(path, size, warm_start_left_out(path), warm_start_blindness(path), warm_start_unseeing(path))


@dataclass(frozen=True, slots=True)
class Looked:
    """What is known of a model before it is used."""

    lines: tuple[str, ...]
    """For the user."""
    cfg: Config
    """The run's, its reward with what the model's template writes before an answer."""


def look_at(cfg: Config) -> Looked:
    """Checks the model and tries it, if it is small.

    Raises:
        MMRLError: as `preflight.check_model` and `preflight.with_opening`.
    """
    from mmrl_ray.planning.preflight import check_model, with_opening

    return Looked(tuple(check_model(cfg)), with_opening(cfg, cfg.model))


def features_of(cfg: Config, samples: Sequence[Sample], *, progress: Callable[[int, int], None]) -> np.ndarray:
    """float32 [N, tokens, d]: features of the samples' pictures, as an agent sees them.

    Raises:
        DataError, ModelError: as `image_features`, and of the model.
    """
    from mmrl_ray.algorithms.dqn.network import image_features
    from mmrl_ray.policy.load import load_policy
    from mmrl_ray.policy.vision import VisionCache

    assert cfg.agent is not None
    policy = load_policy(cfg.model)
    policy.model.requires_grad_(False)
    cache = VisionCache(cfg.rollout.vision_cache_mb * 2**20)
    return image_features(policy, samples, cfg.agent.image_tokens, cache, progress)


class ModelProcess:
    """The process, seen from the driver. It is there from entering the block until it is left."""

    def __init__(self, cfg: Config, say: Callable[[str], None]) -> None:
        """It will have what the config gives a learner; `say` tells the user that a signal was heard. Needs a Ray."""
        self._cfg = cfg
        self._say = say
        self._handle: Any = None

    def __enter__(self) -> Self:
        """Raises PlacementError where there is no room within `resources.placement_timeout_s`."""
        share, limit = self._cfg.resources.learner, self._cfg.resources.placement_timeout_s
        options: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus}
        if share.node_labels:
            options["label_selector"] = dict(share.node_labels)
        elif not share.gpus:  # the driver's node has the data, and the cache
            here = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=True)
        actor = ray.remote(ModelActor).options(max_restarts=0, max_concurrency=3, **options)
        self._handle = actor.remote()
        level = logging.getLogger("mmrl_ray").getEffectiveLevel()
        # Sums depend on them bit for bit: what this process would have.
        threads = share.threads or int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or 0)
        try:
            _answer(self._handle.start.remote(level, threads, share.gpus > 0).future(), limit)
        except TimeoutError:
            self.close()
            raise PlacementError(
                f"the process for warm start and checks was not placed within {limit:g} s: it asks for "
                f"{demand_of(share.cpus, share.gpus, share.node_labels)}, as a learner does; lower resources.learner, "
                "or add nodes"
            ) from None
        except BaseException:
            self.close()
            raise
        return self

    def call(self, function: Callable[..., Any], *args: Any, **heard: Callable[..., None]) -> Any:
        """What the function returns there, given the arguments; what it tells `heard`, its keywords, is told here.

        So are its warnings: as log records of this process.

        Signals are passed on: what it does with a first and a second one is its own affair (`StopOnInterrupt`).

        Raises:
            MMRLError: what the function raises; RunError where the process failed or is gone.
            KeyboardInterrupt: the user stopped it.
        """
        here: dict[str, Callable[..., None]] = {_SAY: self._say, **heard, _LOG: _log}
        answer = self._handle.work.remote(function, args, [*heard]).future()
        with StopOnInterrupt(lambda: self._handle.interrupt.remote()) as stopping:
            try:
                is_over = False
                while not is_over:
                    is_over = answer.done()  # and then a last look
                    for told in _answer(self._handle.news.remote(_WAIT_S).future()):
                        if told is None:
                            is_over = True
                        else:
                            name, what = told
                            here[name](*what)
                result = _answer(answer)
            except KeyboardInterrupt:
                self._stop_at_once(answer)
                raise
            except RunError:
                if stopping.asked:  # by a signal that reached that process, too
                    raise KeyboardInterrupt from None
                raise
        if isinstance(result, _Stopped) or stopping.asked:
            raise KeyboardInterrupt
        return result

    def _stop_at_once(self, answer: Future[Any]) -> None:
        """Has it clear away what it began, within a few seconds."""
        with suppress(TimeoutError, MMRLError, KeyboardInterrupt):
            self._handle.interrupt.remote()
            _answer(answer, _END_S)

    def close(self) -> None:
        """Ends it, at once."""
        if self._handle is not None:
            ray.kill(self._handle, no_restart=True)
            self._handle = None

    def __exit__(self, *exception: object) -> None:
        self.close()


def warm_start_apart(cfg: Config, shown: RunProgress) -> Base:
    """The warm start of a config, in a process on a Ray of its own or on the one at `RAY_ADDRESS`.

    Raises:
        RaySessionError: no Ray starts, or that one cannot be joined.
        MMRLError: as `base_of`.
        KeyboardInterrupt: the user stopped it.
    """
    cfg = with_absolute_paths(cfg)
    with ExitStack() as stack:
        with shown.busy("starting Ray"):
            stack.enter_context(ray_session(cfg, say=shown.note))
        share = cfg.resources.learner
        if share.gpus or share.node_labels:  # it may be made on another node than this
            node_local_cache_refused(cfg)
        with shown.busy("loading what the warm start begins with"):
            process = stack.enter_context(ModelProcess(cfg, shown.note))
            progress = shown.phase("warm start", lazily=True)
            made: Base = process.call(base_of, cfg, None, progress=progress, say=shown.note)
    return made


def _answer(answer: Future[Any], timeout_s: float = _CALL_TIMEOUT_S) -> Any:
    """Waits in Python, where a signal is heard at once; raises TimeoutError after so long."""
    try:
        return answer.result(timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, MMRLError):
            raise error.cause from None
        raise RunError(f"the warm start, or a check of the model, failed: {said(error.cause)}") from error
    except RayError as error:
        raise RunError(
            f"the process of warm start and checks is gone: {said(error)}; where its memory ran out, lower "
            "learner.micro_batch_tokens or sft.batch_size; it goes on from what it wrote last"
        ) from error


def _log(record: logging.LogRecord) -> None:
    logging.getLogger(record.name).handle(record)


class _Stopped:
    """In place of an answer: the user stopped it."""


class ModelActor:
    """The process's end: a thread that works, one that tells of it, and one that hears of signals."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[Told | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._working: int | None = None
        """The thread."""
        self._is_stopped = False
        self._threads = 0

    def start(self, level: int, threads: int, has_gpu: bool) -> None:
        """Answers when it is placed; `threads` are torch's, 0 for one a core."""
        if not has_gpu:  # Ray leaves the GPUs of a node to be seen by who asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._threads = threads or len(os.sched_getaffinity(0))
        handler = _Teller(self._told)
        own = logging.getLogger("mmrl_ray")
        own.setLevel(level)
        own.addHandler(handler)

    def work(self, function: Callable[..., Any], args: Sequence[Any], names: Sequence[str]) -> Any:
        """The function's result, or that it was stopped."""
        try:
            with self._lock:
                self._working = threading.get_ident()
                if self._is_stopped:
                    raise KeyboardInterrupt
            told = {name: partial(self._tell, name) for name in names}
            with StopOnInterrupt(say=partial(self._tell, _SAY)):
                import torch  # a few seconds, in which a signal is heard, too

                torch.set_num_threads(self._threads)
                return function(*args, **told)
        except KeyboardInterrupt:
            return _Stopped()
        finally:
            with self._lock:
                self._working, self._is_stopped = None, False
            self._told.put(None)

    def news(self, wait_s: float) -> list[Told | None]:
        """What was told since the last call, as soon as there is something; None stands last when the work is over."""
        found: list[Told | None] = []
        with suppress(queue.Empty):
            found.append(self._told.get(timeout=wait_s))
            while found[-1] is not None:
                found.append(self._told.get_nowait())
        return found

    def interrupt(self) -> None:
        """The user wants the work to stop."""
        with self._lock:
            self._is_stopped = True  # also work that is only on its way
            if self._working is not None:
                interrupt(self._working)

    def _tell(self, name: str, *what: Any) -> None:
        self._told.put((name, what))


class _Teller(logging.handlers.QueueHandler):
    """Has log records written by the caller's process, too."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """One more thing that was told."""
        self.queue.put((_LOG, (record,)))  # type: ignore[attr-defined]
