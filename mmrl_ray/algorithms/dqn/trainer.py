"""RLlib's algorithm behind the few things that a run asks of it: a round, its figures, workers more or fewer, state."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from mmrl_ray.algorithms.dqn.checkpoints import ValueState
from mmrl_ray.algorithms.dqn.module import FUSION_WEIGHTS, RATE
from mmrl_ray.algorithms.dqn.replay import episodes_from_tensors, episodes_to_tensors
from mmrl_ray.algorithms.dqn.rllib import dqn_config, refuse_without_room
from mmrl_ray.config import Config
from mmrl_ray.errors import NonFiniteError, RolloutError
from mmrl_ray.learner.checkpoints import LearnerState

_REMEMBERED = 20_000
"""Captions whose ids are known, so that each is reported once."""
_LOOK_S = 0.2
_ANSWER_S = 2.0
"""For an env runner to say where it is."""


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
            cfg: the run's, with a `value_based` section.
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
        """Of env runners that failed, so far."""
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
