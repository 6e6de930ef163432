"""Advantages: what a completion earned beyond a baseline; and what its length takes off its reward before.

Pure functions from rewards [M, G] to advantages [M, G], `M` groups of the step and `G` completions a group. A mask,
[M] or [M, G], names the valid groups or completions (ragged groups are padded to G); masked ones take no part in any
baseline and get exactly 0. Where the rewards behind a baseline differ by no more than the resolution of their
magnitude (`metrics/statistics.py`) the advantages are exactly 0, not rounding noise blown up by a small standard
deviation; a true spread gives the same `group` advantages at any scale and offset.

**Rewards whose parts are normalised by their group** before they are weighed (GDPO, Liu et al. 2026, arXiv:2601.05242):

    z_k = (r_k - mean of its group) / std of its group        for each part k
    s = Σ_k w_k z_k
    R = (s - mean of the step) / std of the step

Summing first and normalising then, as GRPO does, lets the part with the largest spread decide, and gives different
mixtures of parts the same advantage. `K` parts, `M` groups of the step, `G` completions a group. Standard deviations
are the sample's (ddof = 1); values that differ by no more than the resolution of their magnitude
(`metrics/statistics.py`) are equal, and 0 after it. Masked completions take no part.
"""

from __future__ import annotations

import torch

from mmrl_ray.metrics.statistics import resolution


def advantages(
    name: str,
    rewards: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    greedy: torch.Tensor | None = None,
    divide_by_std: bool = True,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advantages [M, G] by the name of the baseline: none, batch_mean, greedy, leave_one_out or group.

    Args:
        name: the baseline.
        rewards: [M, G].
        mask: bool [M] or [M, G]; all valid by default.
        greedy: [M], reward of each group's greedy completion; `greedy` needs it.
        divide_by_std: for `group` only.
        magnitude: [M, G], how large the numbers were that each reward was summed from, which says how exact it is;
            the reward's own size by default.

    Raises:
        ValueError: an unknown name, wrong shapes, a reward that counts is not finite, or G below 2 where the
            baseline comes from the other completions.
    """
    if name == "none":
        return none(rewards, mask)
    if name == "batch_mean":
        return batch_mean(rewards, mask, magnitude=magnitude)
    if name == "greedy":
        if greedy is None:
            raise ValueError("advantage 'greedy' needs the rewards of the greedy completions [M], got none")
        return greedy_baseline(rewards, greedy, mask, magnitude=magnitude)
    if name == "leave_one_out":
        return leave_one_out(rewards, mask, magnitude=magnitude)
    if name == "group":
        return group(rewards, mask, divide_by_std=divide_by_std, magnitude=magnitude)
    raise ValueError(f"unknown advantage {name!r}; choose none, batch_mean, greedy, leave_one_out or group")


def none(rewards: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A = R, the formula of docs/equations.md 14 to the letter."""
    return _prepare(rewards, mask)[0]


def batch_mean(
    rewards: torch.Tensor, mask: torch.Tensor | None = None, *, magnitude: torch.Tensor | None = None
) -> torch.Tensor:
    """A = R minus the mean of all valid rewards of the step (Williams 1992, with a mean baseline)."""
    values, valid = _prepare(rewards, mask)
    centred = values - values.sum() / valid.sum().clamp(min=1)
    sizes = _sizes(values, magnitude)
    differ = spreads(values.reshape(1, -1), valid.reshape(1, -1), sizes.reshape(1, -1))
    return torch.where(valid & differ, centred, 0.0)


def greedy_baseline(
    rewards: torch.Tensor,
    greedy: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """A = R minus the reward of the group's greedy completion (SCST, Rennie et al. 2017, arXiv:1612.00563)."""
    values, valid = _prepare(rewards, mask)
    if greedy.shape != rewards.shape[:1]:
        raise ValueError(f"greedy must be [M] = {list(rewards.shape[:1])}, got {list(greedy.shape)}")
    used = valid.any(dim=1)
    if not torch.isfinite(greedy[used]).all():
        raise ValueError(f"greedy rewards of valid groups must be finite, got {greedy[used].tolist()}")
    gained = values - greedy[:, None]
    sizes = torch.maximum(_sizes(values, magnitude), greedy.abs()[:, None])
    return torch.where(valid & (gained.abs() > resolution(sizes)), gained, 0.0)


def leave_one_out(
    rewards: torch.Tensor, mask: torch.Tensor | None = None, *, magnitude: torch.Tensor | None = None
) -> torch.Tensor:
    """A = R minus the mean reward of the group's other completions (RLOO, Ahmadian et al. 2024, arXiv:2402.14740).

    A completion that is alone in its group after masking has no baseline and gets 0.
    """
    values, valid = _prepare(rewards, mask, at_least=2)
    count = valid.sum(dim=1, keepdim=True)
    others = (values.sum(dim=1, keepdim=True) - values) / (count - 1).clamp(min=1)
    signal = valid & (count > 1) & spreads(values, valid, _sizes(values, magnitude))
    return torch.where(signal, values - others, 0.0)


def group(
    rewards: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    divide_by_std: bool = True,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """A = R minus the group's mean, divided by the group's standard deviation unless `divide_by_std` is off.

    With the division GRPO (Shao et al. 2024, arXiv:2402.03300), without Dr. GRPO (Liu et al. 2025, arXiv:2503.20783).
    The standard deviation is the sample's (ddof = 1). A completion that is alone in its group gets 0.
    """
    values, valid = _prepare(rewards, mask, at_least=2)
    count = valid.sum(dim=1, keepdim=True)
    centred = torch.where(valid, values - values.sum(dim=1, keepdim=True) / count.clamp(min=1), 0.0)
    if divide_by_std:
        # By the largest first: squares of very small or large rewards would leave the range of numbers.
        centred = centred / centred.abs().amax(dim=1, keepdim=True)
        centred = centred / (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(valid & spreads(values, valid, _sizes(values, magnitude)), centred, 0.0)


def _prepare(
    rewards: torch.Tensor, mask: torch.Tensor | None, *, at_least: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards with masked ones at 0, and the mask as [M, G]; raises ValueError as `advantages` says."""
    if rewards.ndim != 2 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating-point [M, G], got {list(rewards.shape)} {rewards.dtype}")
    if rewards.shape[1] < at_least:
        raise ValueError(
            f"this baseline needs at least {at_least} completions a group, got rewards {list(rewards.shape)}"
        )
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    if valid.dtype != torch.bool or valid.shape not in (rewards.shape, rewards.shape[:1]):
        raise ValueError(
            f"mask must be bool [M] or [M, G] for rewards {list(rewards.shape)}, got {list(valid.shape)} {valid.dtype}"
        )
    valid = valid[:, None].expand_as(rewards) if valid.ndim == 1 else valid
    values = torch.where(valid, rewards, 0.0)
    if not torch.isfinite(values).all():
        raise ValueError("rewards that count must be finite; mask the samples whose reward failed")
    return values, valid


def spreads(values: torch.Tensor, valid: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Whether the valid values of each row (the last dimension, kept) differ by more than their magnitude resolves."""
    high = torch.where(valid, values, -torch.inf).amax(dim=-1, keepdim=True)
    low = torch.where(valid, values, torch.inf).amin(dim=-1, keepdim=True)
    return high - low > resolution(torch.where(valid, magnitude, 0.0).amax(dim=-1, keepdim=True))


def _sizes(values: torch.Tensor, magnitude: torch.Tensor | None) -> torch.Tensor:
    """[M, G], of what each value was made from: at least its own."""
    if magnitude is None:
        return values.abs()
    if magnitude.shape != values.shape:
        raise ValueError(f"magnitude must be [M, G] = {list(values.shape)}, got {list(magnitude.shape)}")
    return torch.maximum(values.abs(), magnitude)


def decoupled_rewards(parts: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """R [M, G] from parts [K, M, G] and weights [K]; mask, bool [M, G], names the completions that count.

    A part that is equal over a group, a step whose sums are all equal, and masked completions give exactly 0.

    Raises:
        ValueError: wrong shapes, a part that counts is not finite, or G below 2.
    """
    if parts.ndim != 3 or not parts.is_floating_point() or weights.shape != parts.shape[:1]:
        raise ValueError(
            f"parts must be floating-point [K, M, G] and weights [K], got {list(parts.shape)} {parts.dtype} and "
            f"{list(weights.shape)}"
        )
    if parts.shape[2] < 2:
        raise ValueError(f"normalising by the group needs 2 completions or more in it, got parts {list(parts.shape)}")
    valid = torch.ones_like(parts[0], dtype=torch.bool) if mask is None else mask
    if valid.dtype != torch.bool or valid.shape != parts.shape[1:]:
        raise ValueError(f"mask must be bool [M, G] for parts {list(parts.shape)}, got {list(valid.shape)}")
    parts = torch.where(valid, parts, 0.0)
    if not torch.isfinite(parts).all():
        raise ValueError("parts that count must be finite; mask the completions whose reward failed")
    weighed = weights.to(parts.dtype)[:, None, None] * _standardised(parts, valid.expand_as(parts), parts.abs())
    sums, sizes = weighed.sum(dim=0), weighed.abs().sum(dim=0)  # sums of parts that cancel are as exact as the parts
    return _standardised(sums.flatten(), valid.flatten(), sizes.flatten()).reshape(sums.shape)


def _standardised(values: torch.Tensor, valid: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Along the last dimension; exactly 0 where masked, and where what counts does not differ."""
    count = valid.sum(dim=-1, keepdim=True)
    mean = torch.where(valid, values, 0.0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(valid, values - mean, 0.0)
    centred = centred / centred.abs().amax(dim=-1, keepdim=True)
    std = (centred.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(valid & spreads(values, valid, magnitude), centred / std, 0.0)


def overlong_penalty(lengths: torch.Tensor, max_tokens: int, buffer: float, penalty: float) -> torch.Tensor:
    """What a caption of `lengths` tokens earns less, float64 of their shape: DAPO's equation 13 (arXiv:2503.14476).

    Nothing up to the last `buffer` of the limit, from there on linearly more, and `penalty` at the limit. The paper's
    L_max is `max_tokens`, its L_cache `buffer · max_tokens`, its penalty 1 and its share 0.2.

    Raises:
        ValueError: buffer is outside (0, 1], or a length above the limit.
    """
    if not 0 < buffer <= 1 or max_tokens < 1 or bool((lengths > max_tokens).any()):
        raise ValueError(
            f"buffer={buffer} must be above 0 and at most 1, and lengths at most {max_tokens}, got up to "
            f"{lengths.max().item():g}"
        )
    cache = buffer * max_tokens
    return penalty * ((lengths.double() - (max_tokens - cache)) / cache).clamp(min=0.0)
