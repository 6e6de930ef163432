"""The multimodal reward R = Σ_m w_m R_m(s^m, a^m) (EQUATIONS row 10): the composition of all rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, RewardError
from mmrl_ray.rewards.base import RewardBreakdown, RewardFn
from mmrl_ray.rewards.checks import check_pairs


class MultimodalReward:
    """A weighted sum of named rewards, of which each looks at its own modality of the state.

    The caption is every part's action; a part takes what it needs of the sample (image, prompt, references) as its
    state. Weights need not sum to 1. The breakdown has R_m under `m` with weight w_m, and the parts of R_m beside it
    under `m/part`, without weights of their own.
    """

    def __init__(self, parts: Mapping[str, RewardFn], weights: Mapping[str, float]) -> None:
        """Raises ConfigError where names differ, a name is empty or has a slash, or weights are negative or all 0."""
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
        self._parts = dict(parts)
        self._weights = {name: float(weights[name]) for name in parts}

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown a caption; every part scores the whole batch once. See `RewardFn`.

        Raises:
            RewardError: a part raised it, or returned the wrong number of scores.
        """
        check_pairs(samples, captions)
        scored: dict[str, list[RewardBreakdown]] = {}
        for name, part in self._parts.items():
            scored[name] = part.score_batch(samples, captions)
            if len(scored[name]) != len(captions):
                raise RewardError(
                    f"reward part {name!r} returned {len(scored[name])} scores for {len(captions)} captions"
                )
        return [self._compose({name: rows[i] for name, rows in scored.items()}) for i in range(len(captions))]

    def _compose(self, rows: Mapping[str, RewardBreakdown]) -> RewardBreakdown:
        parts: dict[str, float] = {}
        for name, row in rows.items():
            parts[name] = row.total
            parts.update({f"{name}/{inner}": value for inner, value in row.parts.items()})
        total = sum(weight * rows[name].total for name, weight in self._weights.items())
        # Parts without a noise model count as exact, the others as independent.
        noisy = [self._weights[name] * row.sigma for name, row in rows.items() if row.sigma is not None]
        sigma = math.sqrt(math.fsum(s * s for s in noisy)) if noisy else None
        return RewardBreakdown(total=total, parts=parts, weights=dict(self._weights), sigma=sigma)
