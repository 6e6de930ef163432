"""RLlib's DQN from our config: its env runners, its replay buffer, its learner; our environment, module and loss.

    env runners ──episodes──▶ replay buffer ──transitions──▶ learner ──weights──▶ env runners

One round is one `Algorithm.train()`: every env runner says `pictures` × `words` words, then the learner takes `updates`
optimiser steps. Failed env runners are started again by RLlib, which gives them weights and the environment anew.

The replay buffer as a few arrays: an episode is its picture, its words and its rewards; the rest follows from them.

RLlib would pickle whole episodes, pictures and all, and a run folder is never unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.algorithms.dqn.dqn import DQNConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.tune.registry import register_env

from mmrl_ray.algorithms.dqn.algorithm import ValueBasedSection
from mmrl_ray.algorithms.dqn.environment import CAPTION_ENV
from mmrl_ray.algorithms.dqn.module import FusedQModule, TemporalDifferenceLearner
from mmrl_ray.algorithms.dqn.network import Vocabulary
from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import PlacementError
from mmrl_ray.rewards.base import RewardFn


def environment_arguments(
    cfg: Config,
    images: np.ndarray,
    samples: list[Sample],
    reward: RewardFn,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """What `gym.make(CAPTION_ENV, …)` takes; `images` stand for pictures, which only a reward may need."""
    agent = _section(cfg)
    return {
        "images": images,
        "samples": samples if cfg.reward.needs_images else [replace(sample, images=()) for sample in samples],
        "reward": reward,
        "vocabulary": vocabulary,
        "shaping": agent.shaping,
        "gamma": agent.gamma,
    }


def module_settings(cfg: Config) -> dict[str, Any]:
    """`model_config` of `FusedQModule`."""
    agent = _section(cfg)
    return {
        "fusion": agent.fusion,
        "width": agent.width,
        "dueling": agent.dueling,
        "double_q": agent.double_q,
        "exploration": agent.exploration.model_dump(),
        "total_updates": cfg.learner.steps,
    }


def dqn_config(cfg: Config, arguments: dict[str, Any] | ray.ObjectRef) -> DQNConfig:
    """RLlib's config of a run; `arguments` are of `environment_arguments`, or where they lie in the object store."""
    agent, learner, resources = _section(cfg), cfg.learner, cfg.resources
    register_env(CAPTION_ENV, _make_environment)
    runners = cfg.rollout.first_workers
    # RLlib takes int(round(intensity ÷ native ratio)) optimiser steps a round; this makes it `updates`.
    native = agent.batch_size / (agent.words * agent.pictures * (runners + 1))
    told = {
        "alpha": agent.alpha,
        "total_steps": learner.steps,
        "lr_min": learner.lr_min,
        "warmup_steps": learner.warmup_steps,
    }
    return (
        DQNConfig()
        .environment(CAPTION_ENV, env_config={"arguments": arguments}, disable_env_checking=True)
        .framework("torch")
        .env_runners(
            num_env_runners=runners,
            num_envs_per_env_runner=agent.pictures,
            rollout_fragment_length=agent.words,
            num_cpus_per_env_runner=resources.rollout.cpus,  # type: ignore[arg-type]  # a fraction will do
            num_gpus_per_env_runner=resources.rollout.gpus,
            sample_timeout_s=cfg.rollout.assignment_timeout_s,
        )
        .learners(
            num_learners=0,
            num_gpus_per_learner=resources.learner.gpus,
            learner_class=TemporalDifferenceLearner,
            learner_config_dict=told,
        )
        .training(
            lr=learner.lr,
            gamma=agent.gamma,
            grad_clip=learner.max_grad_norm,  # type: ignore[arg-type]
            grad_clip_by="global_norm",
            train_batch_size_per_learner=agent.batch_size,
            training_intensity=agent.updates * native,
            num_steps_sampled_before_learning_starts=agent.learning_starts,
            target_network_update_freq=agent.target_every,
            tau=agent.tau,
            double_q=agent.double_q,
            dueling=agent.dueling,
            replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": agent.buffer_words},
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=FusedQModule, model_config=module_settings(cfg)))
        .fault_tolerance(restart_failed_env_runners=True, env_runner_health_probe_timeout_s=10)
        .reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=0)
        .debugging(seed=cfg.run.seed, log_level="ERROR")
    )


def refuse_without_room(workers: int, cfg: Config) -> None:
    """Refuses that many more env runners where Ray has no room for them now: RLlib would wait for them for ever.

    Raises:
        PlacementError: what is asked for and what is free.
    """
    share = cfg.resources.rollout
    free = ray.available_resources()
    asked = {"CPU": workers * share.cpus, "GPU": workers * share.gpus}
    short = [f"{name}: {amount:g}" for name, amount in asked.items() if amount > free.get(name, 0.0)]
    if short:
        raise PlacementError(
            f"{workers} rollout workers ask for {{{', '.join(short)}}}, but "
            f"{{CPU: {free.get('CPU', 0.0):g}, GPU: {free.get('GPU', 0.0):g}}} is free: ask for fewer workers"
        )


def _section(cfg: Config) -> ValueBasedSection:
    assert cfg.value_based is not None
    return cfg.value_based


@lru_cache(maxsize=1)
def _fetched(reference: Any) -> dict[str, Any]:
    """Once a process, whatever the number of its environments."""
    return ray.get(reference, timeout=300)


def _make_environment(context: dict[str, Any]) -> gym.Env[Any, Any]:
    arguments = context["arguments"]
    arguments = _fetched(arguments) if isinstance(arguments, ray.ObjectRef) else arguments
    return gym.make(CAPTION_ENV, disable_env_checker=True, **arguments)


def episodes_to_tensors(episodes: Iterable[SingleAgentEpisode]) -> dict[str, torch.Tensor]:
    """`index`, `length`, `ended` [N], and `actions`, `rewards` of all episodes one after another."""
    kept = [episode for episode in episodes if len(episode)]
    actions = [int(action) for episode in kept for action in episode.get_actions()]
    rewards = [float(reward) for episode in kept for reward in episode.get_rewards()]
    return {
        "index": torch.tensor([int(episode.get_infos(0)["index"]) for episode in kept], dtype=torch.int64),
        "length": torch.tensor([len(episode) for episode in kept], dtype=torch.int64),
        "ended": torch.tensor([bool(episode.is_terminated) for episode in kept], dtype=torch.bool),
        "actions": torch.tensor(actions, dtype=torch.int64),
        "rewards": torch.tensor(rewards, dtype=torch.float64),
    }


def episodes_from_tensors(
    tensors: Mapping[str, torch.Tensor], images: np.ndarray, vocabulary: Vocabulary
) -> list[SingleAgentEpisode]:
    """The episodes again; one that was under way counts as cut off, so that its last state keeps its value.

    Args:
        tensors: as `episodes_to_tensors` makes them.
        images: [N, L, d], the environment's.
        vocabulary: the environment's.
    """
    found, start = [], 0
    rows = zip(*(tensors[name].tolist() for name in ("index", "length", "ended")), strict=True)
    for index, length, ended in rows:
        actions = tensors["actions"][start : start + length].tolist()
        rewards = tensors["rewards"][start : start + length].tolist()
        start += length
        observations = [
            _observation(images[index], vocabulary, actions[:t], ended=ended and t == length) for t in range(length + 1)
        ]
        found.append(
            SingleAgentEpisode(
                observations=observations,
                actions=[np.int64(action) for action in actions],
                rewards=rewards,
                infos=[{"index": index} for _ in observations],
                terminated=ended,
                truncated=not ended,
                len_lookback_buffer=0,
            )
        )
    return found


def _observation(image: np.ndarray, vocabulary: Vocabulary, actions: list[int], *, ended: bool) -> dict[str, Any]:
    said = [action for action in actions if action != vocabulary.end]
    return {
        "image": image,
        "words": vocabulary.observed(said),
        "valid": vocabulary.valid(vocabulary.max_words if ended else len(said)),
    }
