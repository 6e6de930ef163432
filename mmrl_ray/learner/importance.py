"""Whether the policy still looks: the importance of each modality, measured now and then while a run learns.

    importance/image, importance/text          I_m ÷ ΣI of one caption of the step (docs/equations.md 9)
    importance_rms/image, importance_rms/text  I_m ÷ √(L_m d)
    seconds/importance                         what that took

One sampled caption a measurement, under the policy that the step begins with: a forward and a backward pass of one row.
An image share that falls towards 0 means that captions no longer hang on the picture.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch

from mmrl_ray.analysis.probe import caption_importance
from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import RolloutGroup
from mmrl_ray.policy.collate import prompts_and_features
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.vision import VisionCache

logger = logging.getLogger(__name__)


class ImportanceWatch:
    """Measures every so many steps; where the model's modalities cannot be told it says so once, and stays quiet."""

    def __init__(self, policy: Policy, cache: VisionCache, every: int) -> None:
        """`every` is in steps; 0 never."""
        self._policy = policy
        self._cache = cache
        self._every = every

    def is_due(self, step: int) -> bool:
        """Whether `measure` should be called at this step."""
        return self._every > 0 and step % self._every == 0

    def measure(self, fetch: Callable[[], RolloutGroup]) -> dict[str, float]:
        """The figures of the first completion of a group. No parameter gets a gradient, no random number is drawn."""
        began = time.perf_counter()
        group = fetch()
        with torch.no_grad():
            (prompt,), (features,), _ = prompts_and_features(self._policy, [group], self._cache)
        temperature = group.sampling.temperature
        try:
            found = caption_importance(
                self._policy, prompt, features, group.completions[0].token_ids, temperature=temperature
            )
        except ModelError as error:
            logger.warning("the importance of modalities is not measured: %s", error)
            self._every = 0
            return {}
        shares = {f"importance/{name}": value for name, value in found.share.items()}
        rms = {f"importance_rms/{name}": value for name, value in found.rms.items()}
        told = {name: value for name, value in (shares | rms).items() if math.isfinite(value)}
        return {**told, "seconds/importance": time.perf_counter() - began}
