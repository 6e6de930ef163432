"""Q-learning on RLlib: its DQN from our config, with our environment, module and loss, and its replay buffer as arrays.

    env runners ──episodes──▶ replay buffer ──transitions──▶ learner ──weights──▶ env runners

One round is one `Algorithm.train()`: every env runner says `pictures` × `words` words, then the learner takes `updates`
optimiser steps. Failed env runners are started again by RLlib, which gives them weights and the environment anew.

`FusedQModule` is DQN's module with a fused encoder and exploration by name; `TemporalDifferenceLearner` its learner
with targets from `losses/td.py`. A run's state holds the replay buffer as a few arrays: an episode is its picture, its
words and its rewards; the rest follows from them. RLlib would pickle whole episodes, pictures and all, and a run folder
is never unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import gymnasium as gym
import numpy as np
import ray
import torch
from gymnasium import spaces
from ray.rllib.algorithms.dqn.default_dqn_rl_module import QF_NEXT_PREDS, QF_PREDS, QF_TARGET_NEXT_PREDS
from ray.rllib.algorithms.dqn.dqn import DQNConfig
from ray.rllib.algorithms.dqn.dqn_learner import QF_LOSS_KEY, QF_MEAN_KEY, TD_ERROR_MEAN_KEY
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.dqn.torch.dqn_torch_learner import DQNTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical
from ray.rllib.core.models.catalog import Catalog
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import TD_ERROR_KEY
from ray.tune.registry import register_env

from mmrl_ray.algorithms.dqn.algorithm import ValueBasedSection
from mmrl_ray.algorithms.dqn.environment import CAPTION_ENV
from mmrl_ray.algorithms.dqn.exploration import boltzmann_probabilities, epsilon_greedy, scheduled
from mmrl_ray.algorithms.dqn.network import MODALITIES, QNetwork, QShape, Vocabulary, q_values
from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import PlacementError
from mmrl_ray.learner.checkpoints import LearnerState
from mmrl_ray.losses.schedule import cosine_scheduler
from mmrl_ray.losses.td import q_learning_target, q_learning_update
from mmrl_ray.rewards.base import RewardFn

FUSION_WEIGHTS = "fusion_weights"
EXPLORATION = "exploration"
RATE = "rate"


class _Catalog(Catalog):
    """RLlib asks one for networks by default; here the module builds its own."""

    def _determine_components_hook(self) -> None:
        pass

    def get_action_dist_cls(self, framework: str) -> type[TorchCategorical]:
        return TorchCategorical


class FusedQModule(DefaultDQNTorchRLModule):
    """Q over a picture and the caption so far. Actions that an observation does not allow are never taken.

    `model_config` has `fusion`, `width`, `dueling`, `double_q`, `exploration` (the section's keys) and
    `total_updates`. The count of optimiser steps is part of the state, so that it reaches every env runner with the
    weights, one that was restarted or added as well, and exploration follows it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "catalog_class": _Catalog})

    def setup(self) -> None:
        """RLlib's hook: builds the networks, of the sizes that the spaces say."""
        cfg = self.settings
        assert self.observation_space is not None
        self.uses_dueling: bool = cfg["dueling"]
        self.uses_double_q: bool = cfg["double_q"]
        self.num_atoms = 1
        built = QNetwork(shape_of(self.observation_space), cfg["fusion"], cfg["width"], dueling=self.uses_dueling)
        self.encoder, self.af = built.encoder, built.af
        if self.uses_dueling:
            self.vf = built.vf
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def settings(self) -> dict[str, Any]:
        """The `model_config`."""
        assert isinstance(self.model_config, dict)
        return self.model_config

    @property
    def exploring(self) -> float:
        """The present ε or τ."""
        cfg = self.settings["exploration"]
        fading = max(1, round(cfg["share"] * self.settings["total_updates"]))
        return scheduled(cfg["schedule"], int(self.updates), fading, cfg["start"], cfg["end"])

    @torch.no_grad()
    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        q = self._q(batch)
        return {Columns.ACTIONS: epsilon_greedy(q, 0.0, valid=allowed(batch[Columns.OBS]))}

    @torch.no_grad()
    def _forward_exploration(self, batch: dict[str, Any], t: int = 0, **kwargs: Any) -> dict[str, Any]:
        q, valid = self._q(batch), allowed(batch[Columns.OBS])
        if self.settings["exploration"]["kind"] == "epsilon_greedy":
            return {Columns.ACTIONS: epsilon_greedy(q, self.exploring, valid=valid)}
        probabilities = boltzmann_probabilities(q, self.exploring, valid)
        return {Columns.ACTIONS: torch.multinomial(probabilities, 1)[:, 0]}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        now = self.compute_q_values(batch)
        later = {Columns.OBS: batch[Columns.NEXT_OBS]}
        out = {**now, QF_TARGET_NEXT_PREDS: self.forward_target(later)[QF_PREDS]}
        if self.uses_double_q:
            with torch.no_grad():
                out[QF_NEXT_PREDS] = self._q(later)
        return out

    def _q(self, batch: dict[str, Any]) -> torch.Tensor:
        return cast(torch.Tensor, self.compute_q_values(batch)[QF_PREDS])

    def _qf_forward_helper(self, batch: dict[str, Any], encoder: Any, head: Any) -> dict[str, Any]:
        fused = encoder(batch[Columns.OBS])
        advantage, value = (head["af"], head["vf"]) if self.uses_dueling else (head, None)
        out = {QF_PREDS: q_values(fused.vector, advantage, value)}
        return out if fused.weights is None else {**out, FUSION_WEIGHTS: fused.weights}


class TemporalDifferenceLearner(DQNTorchLearner):
    """The loss ½(q − stopgrad(q_learning_update(q, target, α)))², averaged over the batch (docs/equations.md 3)."""

    def configure_optimizers_for_module(self, module_id: Any, config: Any = None) -> None:
        """RLlib's hook: its Adam, with our cosine."""
        super().configure_optimizers_for_module(module_id, config)
        told = self.config.learner_config_dict
        names = ("total_steps", "lr_min", "warmup_steps")
        self._schedule = cosine_scheduler(self.get_optimizer(module_id), **{name: told[name] for name in names})

    def compute_loss_for_module(self, *, module_id: Any, config: Any, batch: Any, fwd_out: Any) -> Any:
        """RLlib's hook; α comes from the learner's config."""
        actions = batch[Columns.ACTIONS].long()
        q = fwd_out[QF_PREDS].gather(1, actions[:, None])[:, 0]
        valid = allowed(batch[Columns.NEXT_OBS])
        if config.double_q:
            best = torch.where(valid, fwd_out[QF_NEXT_PREDS], -torch.inf).argmax(dim=1)
            valid = torch.nn.functional.one_hot(best, valid.shape[1]).bool()
        ended = batch[Columns.TERMINATEDS].bool()
        target = q_learning_target(
            batch[Columns.REWARDS].to(q.dtype), fwd_out[QF_TARGET_NEXT_PREDS], ended, config.gamma, valid
        ).detach()
        updated = q_learning_update(q, target, config.learner_config_dict["alpha"]).detach()
        loss = (0.5 * (q - updated).square()).mean()
        error = (target - q).detach().abs()
        self.metrics.log_value((module_id, TD_ERROR_KEY), error, reduce="item_series")
        figures = {
            QF_LOSS_KEY: loss.detach(),
            QF_MEAN_KEY: q.detach().mean(),
            TD_ERROR_MEAN_KEY: error.mean(),
            EXPLORATION: self.agent.exploring,
            RATE: self.get_optimizer(module_id).param_groups[0]["lr"],
        }
        if FUSION_WEIGHTS in fwd_out:
            means = fwd_out[FUSION_WEIGHTS].detach().mean(dim=0)
            figures |= {f"{FUSION_WEIGHTS}/{name}": means[i] for i, name in enumerate(MODALITIES)}
        self.metrics.log_dict(figures, key=module_id, window=1)
        return loss

    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """RLlib's hook: schedules and target networks, then the count that exploration follows."""
        super().after_gradient_based_update(timesteps=timesteps)
        self._schedule.step()  # after RLlib, which has put its own constant rate back
        self.agent.updates += 1

    def captured(self) -> LearnerState:
        """Everything that learning goes on from, target network included, as tensors and JSON."""
        agent, optimizer = self.agent, self.get_optimizer(DEFAULT_MODULE_ID)
        tensors = {f"module/{name}": tensor for name, tensor in agent.state_dict().items()}
        state = optimizer.state_dict()["state"]
        for i, (name, _) in enumerate(agent.named_parameters()):
            tensors |= {f"optimizer/{name}/{field}": value for field, value in state.get(i, {}).items()}
        return LearnerState({name: t.detach().cpu().clone() for name, t in tensors.items()}, {})

    def restore(self, state: LearnerState) -> None:
        """Undoes what happened since `captured`; the schedule follows the count of updates in it.

        Raises:
            ValueError: it is of another network.
        """
        agent, optimizer = self.agent, self.get_optimizer(DEFAULT_MODULE_ID)
        agent.load_state_dict(_below(state.tensors, "module/"))
        found = optimizer.state_dict()
        for i, (name, _) in enumerate(agent.named_parameters()):
            fields = _below(state.tensors, f"optimizer/{name}/")
            if fields:
                found["state"][i] = fields
        optimizer.load_state_dict(found)
        self._schedule.last_epoch = done = int(agent.updates)
        rates = zip(self._schedule.base_lrs, self._schedule.lr_lambdas, strict=True)
        for group, (peak, factor) in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * factor(done)

    @property
    def agent(self) -> FusedQModule:
        """The one module."""
        return cast(FusedQModule, self.module[DEFAULT_MODULE_ID].unwrapped())


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def allowed(observation: dict[str, Any]) -> torch.Tensor:
    """bool [B, A] of a batch of observations."""
    return observation["valid"].bool()


def shape_of(space: spaces.Space[Any]) -> QShape:
    """The sizes of an observation space of `mmrl/Caption-v0`."""
    assert isinstance(space, spaces.Dict)
    image, words, valid = space["image"].shape, space["words"].shape, space["valid"].shape
    assert image is not None
    assert words is not None
    assert valid is not None
    return QShape(image[0], image[1], valid[0] - 1, words[0])


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
        **agent.model_dump(include={"fusion", "width", "dueling", "double_q", "exploration"}),
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
