"""Q-learning: the target and the step towards it (docs/equations.md 3).

    Q(s, a) ← Q(s, a) + α[R + γ max_a' Q(s', a') − Q(s, a)]

Watkins & Dayan 1992. `B` transitions, `A` actions. A terminal state has no value: nothing is bootstrapped past it.
"""

from __future__ import annotations

import torch


def q_learning_target(
    reward: torch.Tensor,
    next_q: torch.Tensor,
    terminated: torch.Tensor,
    gamma: float,
    next_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """R + γ max_a' Q(s', a') over the valid actions, [B]; R alone where the episode has ended.

    Double Q-learning (van Hasselt et al. 2016, arXiv:1509.06461) is this with `next_valid` true for nothing but the
    action that the other network would take.

    Args:
        reward: [B].
        next_q: [B, A], of the states that followed; what it holds after the end, NaN included, does not count.
        terminated: bool [B], True where the next state is terminal (one that was only cut off there is not).
        gamma: the discount, in [0, 1].
        next_valid: bool [B, A], True for the actions that the next state allows; all of them by default.

    Raises:
        ValueError: shapes that do not fit, gamma outside [0, 1], or a state that goes on without any valid action.
    """
    if next_q.ndim != 2 or reward.shape != next_q.shape[:1] or terminated.shape != reward.shape:
        raise ValueError(
            "q_learning_target needs reward [B], next_q [B, A] and terminated [B], got "
            f"{list(reward.shape)}, {list(next_q.shape)} and {list(terminated.shape)}"
        )
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} must be in [0, 1]")
    ended = terminated.bool()
    if next_valid is not None:
        if next_valid.shape != next_q.shape or next_valid.dtype != torch.bool:
            raise ValueError(
                f"next_valid must be bool {list(next_q.shape)}, got {next_valid.dtype} {list(next_valid.shape)}"
            )
        stuck = (~next_valid.any(dim=1) & ~ended).nonzero().flatten().tolist()
        if stuck:
            raise ValueError(f"row {stuck[0]} of next_valid allows no action, and its episode has not ended")
        next_q = torch.where(next_valid, next_q, -torch.inf)
    best = torch.where(ended, torch.zeros_like(reward), next_q.amax(dim=1))
    return reward + gamma * best


def q_learning_update(q: torch.Tensor, target: torch.Tensor, alpha: float) -> torch.Tensor:
    """Q + α(target − Q), [B].

    The loss ½(q − stopgrad(q_learning_update(q, target, α)))² has the gradient −α(target − q): a step of size 1 down it
    is this update.

    Args:
        q: [B], the values of the actions that were taken.
        target: [B], as `q_learning_target` makes it.
        alpha: the step size, in [0, 1].

    Raises:
        ValueError: shapes that differ or are not [B], or alpha outside [0, 1].
    """
    if q.ndim != 1 or target.shape != q.shape:
        raise ValueError(f"q and target must both be [B], got {list(q.shape)} and {list(target.shape)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be in [0, 1]")
    return q + alpha * (target - q)
