"""The multimodal reward R = Σ_m w_m R_m(s^m, a^m) (docs/equations.md 10): the composition of all rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mmrl_ray.config.reward import Modality
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, RewardError
from mmrl_ray.rewards.base import (
    RewardBreakdown,
    RewardFailure,
    RewardFn,
    Score,
    check_pairs,
    check_scores,
    score_within,
    views,
)


class MultimodalReward:
    """A weighted sum of named rewards, of which each looks at its own modality of the state.

    The caption is every part's action; its state is what its modality says (pictures, prompt or references), or the
    whole sample where none was named. Weights need not sum to 1. The breakdown has R_m under `m` with weight w_m, and
    beside it, without weights of their own, the parts of R_m under `m/part` and its standard deviation, if it has one,
    under `m/sigma`.
    """

    def __init__(
        self,
        parts: Mapping[str, RewardFn],
        weights: Mapping[str, float],
        *,
        modalities: Mapping[str, Modality] | None = None,
        risk: float = 0.0,
    ) -> None:
        """Composes; `risk` is the kappa of `RewardBreakdown.adjusted`.

        Raises:
            ConfigError: names differ, a name is empty or has a slash, weights are negative or all 0, or so is `risk`.
        """
        if not parts or set(parts) != set(weights):
            raise ConfigError(
                f"multimodal reward: parts {sorted(parts)} and weights {sorted(weights)} must have the same names, at "
                "least one"
            )
        wrong = [name for name in parts if not name or "/" in name]
        if wrong:
            raise ConfigError(f"multimodal reward: part name {wrong[0]!r} must not be empty or hold a slash")
        if any(not math.isfinite(w) or w < 0 for w in weights.values()) or not any(weights.values()):
            raise ConfigError(f"multimodal reward: weights {dict(weights)} must be finite, not negative, and not all 0")
        if not math.isfinite(risk) or risk < 0:
            raise ConfigError(f"multimodal reward: risk={risk} must be finite and not negative")
        self._parts = dict(parts)
        self._weights = {name: float(weights[name]) for name in parts}
        named: Mapping[str, Modality] = modalities or {}
        self._modalities: dict[str, Modality] = {name: named.get(name, "sample") for name in parts}
        self._risk = float(risk)

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[Score]:
        """One score a caption; every part scores the whole batch once. See `RewardFn`.

        A caption for which a part has no score has none; a part of weight 0 is `missing` in its breakdown instead.

        Raises:
            RewardError: a part with a weight, which it names, raised anything, or returned something else than scores.
        """
        return self._scored(samples, captions, lambda part, views: part.score_batch(views, captions))

    def score_within(self, samples: Sequence[Sample], captions: Sequence[str], timeout_s: float) -> list[Score]:
        """`score_batch`, each part with so much time for the batch where it can tell; see `TimedReward`."""
        return self._scored(samples, captions, lambda part, views: score_within(part, views, captions, timeout_s))

    def _scored(
        self,
        samples: Sequence[Sample],
        captions: Sequence[str],
        ask: Callable[[RewardFn, list[Sample]], Sequence[Score]],
    ) -> list[Score]:
        check_pairs(samples, captions)
        given = {modality: views(samples, modality) for modality in sorted(set(self._modalities.values()))}
        scored: dict[str, list[Score]] = {}
        for name, part in self._parts.items():
            try:
                scored[name] = self._ask_part(name, part, given[self._modalities[name]], ask)
            except RewardError as error:
                if self._weights[name]:
                    raise
                scored[name] = [RewardFailure(str(error))] * len(captions)
        return [self._compose({name: rows[i] for name, rows in scored.items()}) for i in range(len(captions))]

    def _ask_part(
        self,
        name: str,
        part: RewardFn,
        samples: list[Sample],
        ask: Callable[[RewardFn, list[Sample]], Sequence[Score]],
    ) -> list[Score]:
        what = f"reward part {name!r}"
        try:
            scores = ask(part, samples)
        except Exception as error:  # a part is anybody's code, and whoever reads this needs its name
            told = error if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
            raise RewardError(f"{what} failed: {told}") from error
        return [
            RewardFailure(f"{what} failed: {score.reason}") if isinstance(score, RewardFailure) else score
            for score in check_scores(scores, len(samples), what)
        ]

    def _compose(self, scores: Mapping[str, Score]) -> Score:
        missing = {name: score.reason for name, score in scores.items() if isinstance(score, RewardFailure)}
        failed = next((reason for name, reason in missing.items() if self._weights[name]), None)
        if failed is not None:
            return RewardFailure(failed)
        rows = {name: score for name, score in scores.items() if isinstance(score, RewardBreakdown)}
        parts: dict[str, float] = {}
        for name, row in rows.items():
            parts[name] = row.total
            parts.update({f"{name}/{inner}": value for inner, value in row.parts.items()})
            if row.sigma is not None:
                parts[f"{name}/sigma"] = row.sigma
        total = sum(weight * rows[name].total for name, weight in self._weights.items() if name in rows)
        # Parts without a noise model count as exact, the others as independent.
        noisy = [self._weights[name] * row.sigma for name, row in rows.items() if row.sigma is not None]
        sigma = math.sqrt(math.fsum(s * s for s in noisy)) if noisy else None
        if self._risk and sigma is None:
            raise RewardError(f"risk={self._risk:g} needs a standard deviation, and none of {sorted(rows)} gave one")
        return RewardBreakdown(total, parts, dict(self._weights), sigma, self._risk, missing)
