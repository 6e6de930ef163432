"""Rewards of overlap with the references: CIDEr-D and ROUGE-L. Plain Python, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl_ray.data.samples import Sample
from mmrl_ray.metrics.cider import CiderD
from mmrl_ray.metrics.corpus import CorpusStatistics
from mmrl_ray.metrics.rouge import rouge_l
from mmrl_ray.metrics.text import Tokenizer
from mmrl_ray.rewards.base import RewardBreakdown, TruncatedCaption
from mmrl_ray.rewards.checks import check_pairs, check_references


class CiderReward:
    """CIDEr-D in its usual range 0 to 10 (weigh it accordingly beside rewards in [0, 1])."""

    def __init__(self, statistics: CorpusStatistics, *, eos: bool = False) -> None:
        """With `eos` the end of a text counts as one more word, of references and of captions that have one.

        Statistics that were counted without ends have nothing to weigh them by: with these, ends do not count.
        """
        self._metric = CiderD(statistics)
        self._eos = eos and statistics.ends is not None

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown a caption, with the part `cider_d`; see `RewardFn`."""
        check_pairs(samples, captions)
        return [self._score(sample, caption) for sample, caption in zip(samples, captions, strict=True)]

    def _score(self, sample: Sample, caption: str) -> RewardBreakdown:
        check_references(sample.references, f"CIDEr-D of sample {sample.id!r}")
        ended = not isinstance(caption, TruncatedCaption) if self._eos else None
        value = self._metric.score(caption, sample.references, ended=ended)
        return RewardBreakdown(total=value, parts={"cider_d": value}, weights={"cider_d": 1.0})


class RougeReward:
    """ROUGE-L, in [0, 1]."""

    def __init__(self, tokenizer: Tokenizer = Tokenizer.UNICODE) -> None:
        self._tokenizer = tokenizer

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown a caption, with the part `rouge_l`; see `RewardFn`."""
        check_pairs(samples, captions)
        return [self._score(sample, caption) for sample, caption in zip(samples, captions, strict=True)]

    def _score(self, sample: Sample, caption: str) -> RewardBreakdown:
        check_references(sample.references, f"ROUGE-L of sample {sample.id!r}")
        value = rouge_l(caption, sample.references, tokenizer=self._tokenizer)
        return RewardBreakdown(total=value, parts={"rouge_l": value}, weights={"rouge_l": 1.0})
