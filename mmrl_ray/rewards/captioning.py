"""The captioning reward R_cap = α·BLEU(c, c*) + β·Detail(c, c*) − γ·Length(c). Plain Python, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, RewardError
from mmrl_ray.metrics.overlap import sentence_bleu
from mmrl_ray.metrics.text import Tokenizer, words
from mmrl_ray.rewards.base import RewardBreakdown, TruncatedCaption, check_pairs, check_references

_CACHED_SAMPLES = 1024


class CaptionReward:
    """Rewards captions that agree with the references, say much of what they say, and are short.

    - `bleu`: sentence BLEU over all references, in [0, 1] (`metrics/overlap.py`).
    - `detail`: Σ idf over the caption's distinct words ÷ the largest such sum among the references, clipped to [0, 1];
      0 where that largest sum is 0. With `grounded` a word counts only if some reference has it, so that listing
      invented attributes earns nothing.
    - `length`: words ÷ `max_words`, not clipped: a clip would end the penalty.

    A caption without words scores 0 for all three. `score` knows no end of a text; `score_batch` with `eos` has it as
    one more word of BLEU, in the references and in captions that ended by themselves, so that breaking off costs
    something (Rennie et al. 2017, arXiv:1612.00563). Neither detail nor length counts it.
    """

    def __init__(
        self,
        alpha: float,
        beta: float,
        gamma: float,
        idf: Mapping[str, float],
        max_words: int,
        grounded: bool = True,
        *,
        eos: bool = False,
        tokenizer: Tokenizer = Tokenizer.UNICODE,
    ) -> None:
        """Weights of the three terms, at least 0; `idf` by word as `tokenizer` makes them, an unknown word has 0.

        Raises:
            ConfigError: a weight or an idf is negative or not finite, or `max_words` is below 1.
        """
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"caption reward: {name}={value} must be finite and at least 0")
        if max_words < 1:
            raise ConfigError(f"caption reward: max_words={max_words} must be at least 1")
        wrong = next((word for word, value in idf.items() if not (math.isfinite(value) and value >= 0)), None)
        if wrong is not None:
            raise ConfigError(f"caption reward: idf of {wrong!r} is {idf[wrong]}, it must be finite and at least 0")
        self._idf = dict(idf)
        self._max_words = max_words
        self._grounded = grounded
        self._eos = eos
        self._tokenizer = tokenizer
        self._weights = {"bleu": float(alpha), "detail": float(beta), "length": -float(gamma)}
        # The G completions of a sample share their references.
        self._prepare = lru_cache(maxsize=_CACHED_SAMPLES)(self._prepare_references)

    def __reduce__(self) -> tuple[Callable[[], CaptionReward], tuple[()]]:
        weights = self._weights
        arguments = (weights["bleu"], weights["detail"], -weights["length"], self._idf, self._max_words, self._grounded)
        return partial(CaptionReward, *arguments, eos=self._eos, tokenizer=self._tokenizer), ()

    def score(self, caption: str, references: Sequence[str]) -> RewardBreakdown:
        """Score one caption against its references, whatever ended it.

        Raises:
            RewardError: there are no references.
        """
        return self._score(caption, references, None)

    def _score(self, caption: str, references: Sequence[str], ended: bool | None) -> RewardBreakdown:
        check_references(references, "the caption reward")
        tokens = words(caption, self._tokenizer)
        parts = {
            # Punctuation alone would match a reference's full stop under sacrebleu's tokeniser.
            "bleu": sentence_bleu(caption, references, ended=ended, tokenizer=self._tokenizer) if tokens else 0.0,
            "detail": self._detail(tokens, tuple(references)),
            "length": len(tokens) / self._max_words,
        }
        total = sum(self._weights[name] * value for name, value in parts.items())
        return RewardBreakdown(total=total, parts=parts, weights=dict(self._weights))

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown a caption, in order; see `RewardFn`."""
        check_pairs(samples, captions)
        return [self._score_sample(sample, caption) for sample, caption in zip(samples, captions, strict=True)]

    def _score_sample(self, sample: Sample, caption: str) -> RewardBreakdown:
        if not sample.references:
            raise RewardError(f"sample {sample.id!r} has no references, which the caption reward needs; add some")
        ended = not isinstance(caption, TruncatedCaption) if self._eos else None
        return self._score(caption, sample.references, ended)

    def _detail(self, tokens: Sequence[str], references: tuple[str, ...]) -> float:
        grounding, largest = self._prepare(references)
        if largest == 0.0:
            return 0.0
        counted = {t for t in tokens if t in grounding} if self._grounded else set(tokens)
        return min(1.0, self._information(counted) / largest)

    def _prepare_references(self, references: tuple[str, ...]) -> tuple[frozenset[str], float]:
        """Every word of any reference, and the largest information among the references."""
        vocabularies = [frozenset(words(reference, self._tokenizer)) for reference in references]
        return frozenset().union(*vocabularies), max(map(self._information, vocabularies))

    def _information(self, distinct: set[str] | frozenset[str]) -> float:
        # fsum is exact, so that the order of a set, which differs between processes, does not show in the reward.
        return math.fsum(self._idf.get(word, 0.0) for word in distinct)
