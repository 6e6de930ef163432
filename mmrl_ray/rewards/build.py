"""From the `reward:` section to the reward of a run."""

from __future__ import annotations

from mmrl_ray.config.reward import CaptionPart, CiderPart, LearnedPart, RewardPart, RewardSection
from mmrl_ray.metrics.corpus import CorpusStatistics
from mmrl_ray.rewards.base import RewardFn
from mmrl_ray.rewards.captioning import CaptionReward
from mmrl_ray.rewards.learned import LearnedReward
from mmrl_ray.rewards.multimodal import MultimodalReward
from mmrl_ray.rewards.overlap import CiderReward, RougeReward


def build_reward(cfg: RewardSection, statistics: CorpusStatistics) -> RewardFn:
    """The composed reward; always a `MultimodalReward`, so that breakdowns look alike however many parts there are.

    Picklable: it is made once by the driver and sent to the workers.
    """
    parts = {name: _build_part(part, statistics) for name, part in cfg.parts.items()}
    return MultimodalReward(parts, cfg.weights)


def _build_part(part: RewardPart, statistics: CorpusStatistics) -> RewardFn:
    if isinstance(part, CaptionPart):
        return CaptionReward(
            alpha=part.alpha,
            beta=part.beta,
            gamma=part.gamma,
            idf=statistics.idf,
            max_words=part.max_words,
            grounded=part.grounded,
        )
    if isinstance(part, LearnedPart):
        return LearnedReward(part.model)
    return CiderReward(statistics) if isinstance(part, CiderPart) else RougeReward()
