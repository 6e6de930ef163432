"""What the agent sees: the frozen vision tower's features, a fixed number of tokens a picture, on one scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.losses.spread import resolution
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache, vision_features

LIMIT = 10.0
"""Standardised features are cut at ± this."""
_BATCH = 32


@dataclass(frozen=True)
class FeatureScale:
    """Mean and standard deviation of each feature over the training pictures; 1 for one that never changes."""

    mean: np.ndarray
    """float32 [d]."""
    std: np.ndarray
    """float32 [d]."""

    @classmethod
    def of(cls, images: np.ndarray) -> FeatureScale:
        """That of features [N, L, d]."""
        flat = images.reshape(-1, images.shape[-1])
        differ = np.ptp(flat, axis=0) > resolution(np.abs(flat).max(axis=0))
        return cls(flat.mean(axis=0), np.where(differ, flat.std(axis=0), 1.0).astype(flat.dtype))

    def __call__(self, images: np.ndarray, *, blind: bool = False) -> np.ndarray:
        """float32 [N, L, d] of mean 0 and deviation 1, within ± `LIMIT`; all 0 where `blind`."""
        if blind:
            return np.zeros_like(images, dtype=np.float32)
        return np.clip((images - self.mean) / self.std, -LIMIT, LIMIT).astype(np.float32)


def image_features(
    policy: Policy,
    samples: Sequence[Sample],
    tokens: int,
    cache: VisionCache,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """float32 [N, tokens, d]: each picture's features, averaged in neighbouring runs to that many tokens.

    Raises:
        DataError, ImageError, ModelError: a sample cannot be encoded.
    """
    found: list[np.ndarray] = []
    for start in range(0, len(samples), _BATCH):
        found += prompt_features(policy, encode_prompts(policy, samples[start : start + _BATCH]), tokens, cache)
        if progress is not None:
            progress(len(found), len(samples))
    return np.stack(found)


def prompt_features(
    policy: Policy, prompts: Sequence[EncodedPrompt], tokens: int, cache: VisionCache
) -> list[np.ndarray]:
    """`image_features` of encoded prompts: float32 [tokens, d] each.

    Raises:
        ModelError: the tower's tokens do not match the prompt's placeholders.
    """
    found = vision_features(policy, prompts, cache)
    pooled = [torch.nn.functional.adaptive_avg_pool1d(each.tokens.float().T, tokens).T for each in found]
    return [each.cpu().numpy() for each in pooled]
