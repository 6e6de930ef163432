"""RLlib's algorithm behind the few things that a run asks of it: a round, its figures, workers, state, and status.

RLlib's algorithm belongs to one thread: the status writer's thread only takes a request, and the run does it between
rounds.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from mmrl_ray.algorithms.dqn.agent import ValueState
from mmrl_ray.algorithms.dqn.rllib import (
    FUSION_WEIGHTS,
    RATE,
    dqn_config,
    episodes_from_tensors,
    episodes_to_tensors,
    refuse_without_room,
)
from mmrl_ray.config import Config
from mmrl_ray.errors import ConfigError, NonFiniteError, PlacementError, RolloutError
from mmrl_ray.learner.checkpoints import LearnerState
from mmrl_ray.run_records.control_files import ScaleAnswer

_REMEMBERED = 20_000
"""Captions whose ids are known, so that each is reported once."""
_LOOK_S = 0.2
_ANSWER_S = 2.0
"""For an env runner to say where it is."""
_DECISIONS = 20


@dataclass(frozen=True, slots=True)
class Said:
    """A caption that a worker finished, and what it earned."""

    index: int
    """Of its picture."""
    caption: str
    actions: tuple[int, ...]
    reward: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did."""

    updates: int
    """Optimiser steps of the run so far."""
    words: int
    """Said by all workers so far."""
    said: tuple[Said, ...]
    figures: Mapping[str, float]
    """Empty before learning has started."""


class ValueTrainer:
    """One run's algorithm. Not thread-safe."""

    def __init__(self, cfg: Config, arguments: dict[str, Any], state: ValueState | None = None) -> None:
        """Starts the env runners; with a `state`, from there.

        Args:
            arguments: of `algorithm.environment_arguments`.
            state: of a checkpoint.

        Raises:
            PlacementError: Ray had no room for the env runners within `resources.placement_timeout_s`.
        """
        assert cfg.value_based is not None
        self._cfg, self._agent_cfg, self._arguments = cfg, cfg.value_based, arguments
        self._reference = ray.put(arguments)  # owned here: env runners that start again fetch it anew
        config = dqn_config(cfg, self._reference)
        if state is not None:  # or the runners would draw the same pictures and words again
            config.debugging(seed=(cfg.run.seed + state.words) % 2**31)
            held = len(state.replay["actions"])
            config.training(num_steps_sampled_before_learning_starts=max(1, cfg.value_based.learning_starts - held))
        refuse_without_room(cfg.rollout.first_workers, cfg)
        # It says at every start that DQN runs on the API stack that it was written for.
        logging.getLogger("ray.rllib.algorithms.algorithm_config").setLevel(logging.ERROR)
        self.algorithm: Any = config.build_algo()  # its parts may be None in RLlib's own types
        self._known: deque[str] = deque(maxlen=_REMEMBERED)
        self._words_of_before = 0
        if state is not None:
            self._restore(state)

    # -- rounds ----------------------------------------------------------------------------------------------------

    def round(self) -> Round:
        """Workers say words, the learner learns.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
            RolloutError: no worker was ready for `rollout.worker_deadline_s`.
        """
        self._wait_for_workers()
        began = time.monotonic()
        result = self.algorithm.train()
        words = self.words
        learned = result.get("learners", {}).get("default_policy", {})
        figures = _figures(learned) if learned else {}
        if figures:
            figures["seconds/step"] = time.monotonic() - began
            if not math.isfinite(figures["loss"]):
                raise NonFiniteError(f"the loss is {figures['loss']} after {self.updates} steps: lower learner.lr")
        return Round(self.updates, words, tuple(self._newly_said()), figures)

    @property
    def updates(self) -> int:
        """Optimiser steps so far."""
        return int(self._on_learner(lambda learner: int(learner.agent.updates)))

    @property
    def words(self) -> int:
        """Said by all workers so far."""
        counted = self.algorithm.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
        return self._words_of_before + int(counted)

    def weights(self) -> dict[str, torch.Tensor]:
        """The Q network's, and what else the module holds."""
        return self._on_learner(
            lambda learner: {k: v.detach().cpu().clone() for k, v in learner.agent.state_dict().items()}
        )

    def _newly_said(self) -> list[Said]:
        found: list[Said] = []
        known = set(self._known)
        most = 4 * self._agent_cfg.pictures * self._agent_cfg.words * max(1, self.workers)
        for back, episode in enumerate(reversed(self.algorithm.local_replay_buffer.episodes)):
            if back >= most:
                break
            if episode.is_done and episode.id_ not in known:
                self._known.append(episode.id_)
                found.append(_said(episode))
        return found[::-1]

    def _wait_for_workers(self) -> None:
        """Until an env runner is healthy: with none RLlib would go on learning from what was said long ago."""
        deadline_s, group = self._cfg.rollout.worker_deadline_s, self.algorithm.env_runner_group
        deadline = time.monotonic() + deadline_s
        while self.workers == 0:
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"none of {self.wanted} rollout workers was ready for {deadline_s:g} s "
                    "(rollout.worker_deadline_s); their logs are in Ray's session folder"
                )
            if self.algorithm.restore_env_runners(group):
                group.sync_weights(from_worker_or_learner_group=self.algorithm.learner_group, inference_only=True)
            else:
                time.sleep(_LOOK_S)

    # -- workers ---------------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """Env runners that are healthy."""
        return self.algorithm.env_runner_group.num_healthy_remote_env_runners()

    @property
    def wanted(self) -> int:
        """Env runners that there are or will be again."""
        return self.algorithm.env_runner_group.num_remote_env_runners()

    def places(self) -> list[tuple[str, int]]:
        """(node, process id) of each healthy env runner."""
        return self.algorithm.env_runner_group.foreach_env_runner(
            _place, local_env_runner=False, timeout_seconds=_ANSWER_S
        )

    @property
    def restarts(self) -> int:
        """Restarts of env runners that failed, so far."""
        return self.algorithm.env_runner_group.num_remote_worker_restarts()

    def scale(self, workers: int) -> None:
        """Adds env runners, or takes the last ones away; between rounds.

        Raises:
            PlacementError: Ray has no room for them.
        """
        group = self.algorithm.env_runner_group
        missing = workers - self.wanted
        if missing > 0:
            refuse_without_room(missing, self._cfg)
            group.add_workers(missing)
            group.sync_weights(from_worker_or_learner_group=self.algorithm.learner_group, inference_only=True)
        manager = group._worker_manager  # RLlib can add workers by name, but not take one away
        for worker in sorted(manager.actor_ids())[workers:]:
            ray.kill(manager.actors()[worker])
            manager.remove_actor(worker)

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> ValueState:
        """What a later trainer goes on from."""
        learner = self._on_learner(lambda learner: learner.captured())
        replay = episodes_to_tensors(self.algorithm.local_replay_buffer.episodes)
        return ValueState(self.words, learner.tensors, replay)

    def close(self) -> None:
        """Ends the env runners."""
        self.algorithm.stop()

    def _restore(self, state: ValueState) -> None:
        self._on_learner(lambda learner: learner.restore(LearnerState(state.learner, {})))
        images, vocabulary = self._arguments["images"], self._arguments["vocabulary"]
        episodes = episodes_from_tensors(state.replay, images, vocabulary)
        self.algorithm.local_replay_buffer.add(episodes)
        self._known.extend(episode.id_ for episode in episodes)
        self._words_of_before = state.words
        self.algorithm.env_runner_group.sync_weights(
            from_worker_or_learner_group=self.algorithm.learner_group, inference_only=True
        )

    def _on_learner(self, work: Any) -> Any:
        """`work(learner)`; the learner lives in this process."""
        (done,) = list(self.algorithm.learner_group.foreach_learner(func=work))
        return done.get()


def _place(runner: Any) -> tuple[str, int]:
    return ray.util.get_node_ip_address(), os.getpid()


def _said(episode: SingleAgentEpisode) -> Said:
    info = episode.get_infos(-1)
    actions = tuple(int(action) for action in episode.get_actions())
    return Said(int(info["index"]), info["caption"], actions, info["reward"], info["parts"])


def _figures(learned: Mapping[str, Any]) -> dict[str, float]:
    """RLlib's names as ours. Without its timers: moving averages, in which the slow first call lasts for hundreds."""
    names = {
        "loss": "qf_loss",
        "q/mean": "qf_mean",
        "q/td_error": "td_error_mean",
        "exploration": "exploration",
        "lr": RATE,
        "grad_norm": "gradients_default_optimizer_global_norm",
    }
    found = {ours: float(learned[theirs]) for ours, theirs in names.items() if theirs in learned}
    prefix = f"{FUSION_WEIGHTS}/"
    found |= {f"fusion/{k.removeprefix(prefix)}": float(v) for k, v in learned.items() if k.startswith(prefix)}
    return {name: value for name, value in found.items() if name == "loss" or np.isfinite(value)}


class ValueStatus:
    """How a run stands, under one lock."""

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._lock = threading.Lock()
        self._target = self._told = cfg.rollout.first_workers
        self._places: list[tuple[str, int]] = []
        self._requests, self._by = 0, ""
        self._updates, self._began = 0, time.time()
        self._decisions: deque[dict[str, Any]] = deque(maxlen=_DECISIONS)

    # -- the run's thread ------------------------------------------------------------------------------------------

    def tell(self, done: Round) -> None:
        """Takes in the figures of a round that is over."""
        with self._lock:
            self._updates = done.updates

    def tell_workers(self, places: Sequence[tuple[str, int]]) -> None:
        """(node, process id) of the workers that are ready now."""
        with self._lock:
            self._places = list(places)

    def wanted(self) -> int | None:
        """Workers that were asked for and that there are not yet."""
        with self._lock:
            return self._target if self._target != self._told else None

    def scaled(self, workers: int) -> dict[str, Any]:
        """Notes that the workers were scaled; returns the decision, for the run's events."""
        with self._lock:
            decision = {"before": self._told, "workers": workers, "reason": f"{self._by} asked for {workers}"}
            self._told = workers
            return decision

    # -- the status writer's thread ------------------------------------------------------------------------------------

    def ask(self, workers: int | None, by: str) -> ScaleAnswer:
        """Somebody wants so many workers.

        Raises:
            ConfigError: a number below the least, or none; or Ray has no room for them.
        """
        if workers is None:
            raise ConfigError("a value-based run does not scale by itself: ask for a number")
        least = self._cfg.rollout.min_workers
        if workers < least:
            raise ConfigError(f"{workers} rollout workers are fewer than rollout.min_workers={least}")
        with self._lock:
            before = self._target
            try:
                refuse_without_room(workers - before, self._cfg)
            except PlacementError as error:
                raise ConfigError(str(error)) from error
            self._target, self._by = workers, by
            self._requests += 1
            reason = f"{by} asked for {workers}"
            self._decisions.append({"time": time.time(), "before": before, "workers": workers, "reason": reason})
            return ScaleAnswer(
                accepted=True, message=f"{before} → {workers} rollout workers", target=workers, number=self._requests
            )

    def status(self) -> dict[str, Any]:
        """JSON-able; the keys of every run's status."""
        with self._lock:
            share = self._cfg.resources.rollout
            free = {name: ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU")}
            seconds = time.time() - self._began
            missing = [("", 0)] * (self._told - len(self._places))
            workers = {
                f"env-runner-{i + 1}": {
                    "state": "ready" if pid else "starting",
                    "seconds": seconds,
                    "version": self._updates,
                    "at": None,
                    "groups": 0,
                    "node": node,
                    "pid": pid,
                }
                for i, (node, pid) in enumerate([*self._places, *missing])
            }
            return {
                "step": self._updates,
                "steps": self._cfg.learner.steps,
                "policy_version": self._updates,
                "waiting": "the learner for the workers and they for it, by turns",
                "stopping": None,
                "metrics": {},
                "max_staleness": 0,
                "step_groups": {"arrived": 0, "asked": 0},
                "buffer": {"arrived": 0, "held": 0, "capacity": 0},
                "evaluations": 0,
                "quarantined": 0,
                "throughput": {},
                "pool": {
                    "workers": workers,
                    "ready": len(self._places),
                    "target": self._target,
                    "queued_assignments": 0,
                    "free": free,
                    "demand": f"{{CPU: {share.cpus:g}}}",
                },
                "scaling": {
                    "mode": "fixed",
                    "target": self._target,
                    "min": self._cfg.rollout.min_workers,
                    "max": None,
                    "useful": self._target,
                    "requests": self._requests,
                    "finding": "",
                    "decisions": list(self._decisions),
                },
            }
