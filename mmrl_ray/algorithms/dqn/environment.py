"""`mmrl/Caption-v0`: a caption is said word by word, and paid for at its end.

    reset ──picture──▶ {image, words so far, which words may follow} ──word or end──▶ … ──end──▶ reward

A gymnasium environment without Ray. Importing this module registers it.

Shaping (Ng, Harada & Russell 1999, "Policy invariance under reward transformations"): with a potential Φ of states, 0
where a caption has ended, F = γ Φ(s') − Φ(s) is added to every reward. A whole caption's discounted sum of F is −Φ(s_0)
whatever its words, so that the best captions stay the best; but a good word is paid for when it is said. Here
Φ = Σ_m k_m R_m(caption so far), a part of the reward a modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from mmrl_ray.algorithms.dqn.network import LIMIT, Vocabulary
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, DataError
from mmrl_ray.experience.carriers import RewardBreakdown, TruncatedCaption
from mmrl_ray.rewards.base import RewardFn, check_breakdowns

CAPTION_ENV = "mmrl/Caption-v0"

Observation = dict[str, np.ndarray]


class CaptionEnv(gym.Env[Observation, np.int64]):
    """One caption of one picture an episode.

    An observation is `image` float32 [L, d], `words` int64 [T] (numbers counted from 1, 0 behind the end) and `valid`
    int8 [A]. An action that `valid` does not allow says nothing and ends the caption.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # gymnasium's own declaration

    def __init__(
        self,
        images: np.ndarray,
        samples: Sequence[Sample],
        reward: RewardFn,
        vocabulary: Vocabulary,
        *,
        shaping: Mapping[str, float] | None = None,
        gamma: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        """Args:
            images: float32 [N, L, d] within ± `features.LIMIT`, one a sample.
            samples: what the pictures show; their images are not looked at.
            reward: of whole captions; a `MultimodalReward`.
            vocabulary: the words.
            shaping: k_m by names of parts of the reward.
            gamma: the agent's discount, which shaping needs to be harmless.
            render_mode: `ansi` renders the caption so far.

        Raises:
            DataError: no samples, or not one picture a sample.
        """
        if images.ndim != 3 or len(images) != len(samples) or not samples:
            raise DataError(f"need images [N, L, d] of N samples, got {list(images.shape)} for {len(samples)}")
        self._images, self._samples, self._reward = images, samples, reward
        self.vocabulary = vocabulary
        self._shaping, self._gamma = dict(shaping or {}), gamma
        self.render_mode = render_mode
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(-LIMIT, LIMIT, images.shape[1:], np.float32),
                "words": spaces.Box(0, len(vocabulary.words), (vocabulary.max_words,), np.int64),
                "valid": spaces.MultiBinary(vocabulary.actions),
            }
        )
        self.action_space = spaces.Discrete(vocabulary.actions)
        self._index, self._caption, self._potential = 0, list[int](), 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """An empty caption of a random picture, or of `options={"index": …}`."""
        super().reset(seed=seed)
        chosen = (options or {}).get("index")
        self._index = int(self.np_random.integers(len(self._samples))) if chosen is None else int(chosen)
        self._caption = []
        self._potential = self._potential_of("") if self._shaping else 0.0
        return self._observation(), {"index": self._index}

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Says a word, or ends the caption; the info of the last step has the caption and what it earned.

        Raises:
            RewardError: the reward failed.
        """
        number = int(action) if self.vocabulary.valid(len(self._caption))[action] else self.vocabulary.end
        if number != self.vocabulary.end:
            self._caption.append(number)
        ended = self.vocabulary.has_ended(self._caption, number)
        info: dict[str, Any] = {"index": self._index}
        reward = 0.0
        if ended:
            text = self.vocabulary.caption(self._caption)
            scored = self._score(text)
            reward = scored.total
            parts = {name: float(value) for name, value in scored.parts.items()}
            info |= {"caption": str(text), "reward": float(scored.total), "parts": parts}
        if self._shaping:
            after = 0.0 if ended else self._potential_of(self.vocabulary.text(self._caption))
            reward += self._gamma * after - self._potential
            self._potential = after
        return self._observation(ended=ended), float(reward), ended, False, info

    def render(self) -> str:  # type: ignore[override]  # of the one mode there is
        """The caption so far."""
        return self.vocabulary.text(self._caption)

    def _score(self, text: str) -> RewardBreakdown:
        sample = self._samples[self._index]
        return check_breakdowns(self._reward.score_batch([sample], [text]), [sample])[0]

    def _potential_of(self, text: str) -> float:
        parts = self._score(TruncatedCaption(text)).parts  # it goes on
        unknown = [name for name in self._shaping if name not in parts]
        if unknown:
            raise ConfigError(
                f"value_based.shaping names {unknown[0]!r}, which the reward has not; it has {', '.join(sorted(parts))}"
            )
        return sum(weight * parts[name] for name, weight in self._shaping.items())

    def _observation(self, *, ended: bool = False) -> Observation:
        count = self.vocabulary.max_words if ended else len(self._caption)
        return {
            "image": self._images[self._index],
            "words": self.vocabulary.observed(self._caption),
            "valid": self.vocabulary.valid(count),
        }


gym.register(id=CAPTION_ENV, entry_point="mmrl_ray.algorithms.dqn.environment:CaptionEnv")
