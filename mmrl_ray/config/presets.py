"""`algorithm:` — presets under their usual names; each only names defaults of `learner:` keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

Algorithm = Literal[
    "reinforce", "scst", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "dpo", "ilql", "value_based"
]

PRESETS: dict[str, dict[str, Any]] = {
    # Williams 1992, with the batch's mean reward as the baseline.
    "reinforce": {"advantage": "batch_mean", "loss": "reward_guided", "aggregation": "sequence_sum"},
    # Rennie et al. 2017, arXiv:1612.00563: the greedy caption's reward is the baseline.
    "scst": {"advantage": "greedy", "loss": "reward_guided", "aggregation": "sequence_sum"},
    # Ahmadian et al. 2024, arXiv:2402.14740.
    "rloo": {"advantage": "leave_one_out", "loss": "reward_guided", "aggregation": "sequence_sum"},
    # Shao et al. 2024, arXiv:2402.03300.
    "grpo": {
        "advantage": "group",
        "advantage_std": True,
        "loss": "clipped",
        "aggregation": "sequence_mean",
        "kl": {"weight": 0.04, "estimator": "k3"},
    },
    # Liu et al. 2025, arXiv:2503.20783.
    "dr_grpo": {"advantage": "group", "advantage_std": False, "loss": "clipped", "aggregation": "constant"},
    # Yu et al. 2025, arXiv:2503.14476: clip-higher, token-level mean, no KL.
    "dapo": {
        "advantage": "group",
        "advantage_std": True,
        "loss": "clipped",
        "clip_high": 0.28,
        "aggregation": "token_mean",
    },
    # Zheng et al. 2025, arXiv:2507.18071: the ratio of whole sequences, with its narrow clip range.
    "gspo": {
        "advantage": "group",
        "advantage_std": True,
        "loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
    },
    # MiniMax-M1 2025, arXiv:2506.13585: clip the importance weight, keep every token's gradient.
    "cispo": {
        "advantage": "group",
        "advantage_std": True,
        "loss": "cispo",
        "clip_low": 1.0,
        "clip_high": 2.0,
        "aggregation": "token_mean",
    },
    # Rafailov et al. 2023, arXiv:2305.18290: pairs of `data.preferences` in place of rollouts and rewards.
    "dpo": {"advantage": "none", "loss": "dpo", "aggregation": "sequence_sum"},
    # Snell et al. 2022, arXiv:2206.11871: rollouts of `data.rollouts`; each weighs what it earned, with no baseline.
    "ilql": {"advantage": "none", "loss": "ilql", "aggregation": "token_mean"},
}

SECTIONS = frozenset({"value_based"})
"""Algorithms with a section of their own in place of a preset."""

assert set(PRESETS) | SECTIONS == set(get_args(Algorithm))


def with_defaults(written: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`written` over `defaults`, section by section: writing `kl.estimator` leaves the preset's `kl.weight` alone."""
    merged: dict[str, Any] = {**defaults}
    for key, value in written.items():
        nested = isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
        merged[key] = with_defaults(value, defaults[key]) if nested else value
    return merged


def with_preset(config: Any) -> Any:
    """A config that is not validated yet, the defaults of its preset written into its `learner:`."""
    if not isinstance(config, dict) or not isinstance(config.get("learner"), dict):
        return config  # the ordinary validation says what is wrong
    algorithm = config.get("algorithm", "grpo")
    preset = PRESETS.get(algorithm) if isinstance(algorithm, str) else None
    return config if preset is None else {**config, "learner": with_defaults(config["learner"], preset)}
