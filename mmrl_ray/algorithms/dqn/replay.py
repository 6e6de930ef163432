"""The replay buffer as a few arrays: an episode is its picture, its words and its rewards; the rest follows from them.

RLlib would pickle whole episodes, pictures and all, and a run folder is never unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from mmrl_ray.algorithms.dqn.vocabulary import Vocabulary


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
