"""What is measured while a run learns: does the policy look at the picture, do sampler and learner agree.

Whether the policy still looks: the importance of each modality, measured now and then while a run learns.

    importance/image, importance/text          I_m ÷ ΣI of one caption of the step (docs/equations.md 9)
    importance_rms/image, importance_rms/text  I_m ÷ √(L_m d)
    seconds/importance                         what that took

One sampled caption a measurement, under the policy that the step begins with: a forward and a backward pass of one row.
An image share that falls towards 0 means that captions no longer hang on the picture.

How far the learner's log-probs are from those that the sampler recorded, over the completion tokens that a step
scores (groups without any learning signal are not).

    sampler_gap/max, sampler_gap/mean              |log(π_learner ÷ π_sampler)| of groups that this version sampled
    sampler_gap/stale_max, sampler_gap/stale_mean  the same of older groups: the policy's own way since is in it

The two programs compute one policy in different ways (decode steps on a cache; whole completions), so on-policy there
should be rounding alone, and more than that is a fault that importance weights would only hide: the run stops. Others
report such figures, too (TRL's `sampling/sampling_logp_difference`, verl's `rollout_probs_diff`), over on- and
off-policy tokens together. Both log-probs are at hand in a step, as they are before its first update, so that this
costs one reduction of two numbers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch

from mmrl_ray.analysis.attribution import caption_importance
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import LearnerError, ModelError
from mmrl_ray.experience.carriers import PlannedGroup, RolloutGroup
from mmrl_ray.learner.ranks import Ranks
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.collate import prompts_and_features
from mmrl_ray.policy.vision import VisionCache

logger = logging.getLogger(__name__)
LARGEST = {torch.float32: 0.01, torch.float16: 0.5, torch.bfloat16: 2.0}
"""Nats, where `learner.max_sampler_gap` is not set. Rounding makes 3e-5 and 0.4 of them at 28 layers whose logits'
standard deviation is 6.6, over 72 tokens; a step has up to 10⁵, and tails."""
MEAN_SHARE = 0.1
"""The mean may be this much of the largest: a fault of every token shows there where rounding hides its size."""
_KINDS = ("", "stale_")


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


class SamplerGap:
    """Of one step: filled micro-batch by micro-batch, then summed over ranks."""

    def __init__(self, policy: Policy, cfg: LearnerSection) -> None:
        self._policy = policy
        self.bound = cfg.max_sampler_gap if cfg.max_sampler_gap is not None else LARGEST[policy.dtype]
        """Nats; 0 stops nothing."""
        self._sums = torch.zeros(2, 2, dtype=torch.float64, device=policy.device)
        """Σ and number of tokens, of on-policy groups and of stale ones."""
        self._largest = torch.zeros(2, dtype=torch.float64, device=policy.device)

    def add(
        self,
        planned: Sequence[PlannedGroup],
        logprobs: torch.Tensor,
        behaviour: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        """Takes in a micro-batch: [N, T] each, completions in the order of the groups."""
        stale = [group.staleness > 0 for group in planned for _ in group.learned_tokens]
        rows = torch.tensor(stale, device=mask.device)[:, None]
        gap = (logprobs.detach() - behaviour).abs().double()
        # No device is waited for here.
        for kind, of in enumerate((mask & ~rows, mask & rows)):
            chosen = torch.where(of, gap, 0.0)
            self._sums[kind, 0] += chosen.sum()
            self._sums[kind, 1] += of.sum()
            self._largest[kind] = torch.maximum(self._largest[kind], chosen.max())

    def reduce(self, ranks: Ranks) -> None:
        """Over all ranks, which all call it."""
        ranks.sum_(self._sums)
        ranks.max_(self._largest)

    def metrics(self) -> dict[str, float]:
        """Figures of the step; those of a kind of groups that it did not have are missing."""
        figures = {}
        for kind, name in enumerate(_KINDS):
            total, tokens = self._sums[kind].tolist()
            if tokens:
                figures[f"sampler_gap/{name}max"] = float(self._largest[kind])
                figures[f"sampler_gap/{name}mean"] = total / tokens
        return figures

    def check(self, step: int) -> None:
        """Stops a step whose on-policy tokens were not sampled from the policy that learns.

        Raises:
            LearnerError: the largest gap is above the bound, or the mean above a tenth of it.
        """
        figures = self.metrics()
        largest, mean = figures.get("sampler_gap/max", 0.0), figures.get("sampler_gap/mean", 0.0)
        if self.bound == 0 or (largest <= self.bound and mean <= MEAN_SHARE * self.bound):
            return
        raise LearnerError(
            f"step {step}: model {self._policy.path!r} ({self._policy.hf_model.config.model_type}) is sampled from by "
            f"another policy than learns: |log(learner ÷ sampler)| of on-policy tokens is {largest:.3g} at most and "
            f"{mean:.3g} on average, above learner.max_sampler_gap={self.bound:g} (on average "
            f"{MEAN_SHARE * self.bound:g}); this update was not made: look at `mmrl check {self._policy.path}`, and "
            "raise the bound only where rounding explains the gap"
        )
