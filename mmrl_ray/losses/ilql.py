"""Implicit Q-learning of what each next token is worth, from stored completions (Snell et al. 2022, arXiv:2206.11871).

A completion is an episode: a state is what was said so far, an action the next token, and the reward comes with the
last one. Of the token a_t said in state s_t, with two Q heads, their slowly following copies Q̂ and V:

    y_t  = γ·V(s_{t+1}),  the reward where the completion ends                                the target of Q
    u_t  = min_k Q̂_k(s_t, a_t) − V(s_t)
    L_t  = Σ_k (Q_k(s_t, a_t) − y_t)²  +  |τ − 1(u_t < 0)|·u_t²  +  α·Σ_k −log softmax(Q_k(s_t, ·))(a_t)
           − w·log π(a_t | s_t)

The second term is an expectile (Kostrikov et al. 2021, arXiv:2110.06169): at τ = ½ V is the mean of what was said in
that state, towards 1 its best, and no token that nobody said is ever asked for its value. The third is conservative:
it pulls down the values of tokens that the data lacks. The last one clones the data, where the policy learns, too.

`K` = 2 heads, `B` completions, `T` tokens, right-padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from mmrl_ray.losses.aggregation import Sums, check_denominator, check_tokens, masked_sum
from mmrl_ray.losses.td import q_learning_target


@dataclass(frozen=True, slots=True)
class IlqlStats(Sums):
    """Detached sums over tokens, which add over micro-batches and ranks."""

    tokens: torch.Tensor
    td: torch.Tensor
    """Squared distance of Q from its target, the mean over heads."""
    expectile: torch.Tensor
    """The term of V."""
    conservative: torch.Tensor
    """−log softmax(Q) of the token, the mean over heads."""
    q: torch.Tensor
    """The smaller Q̂ of the token."""
    v: torch.Tensor
    nll: torch.Tensor
    """−log π of the token."""

    def metrics(self) -> dict[str, float]:
        """Means over tokens for the metrics line."""
        tokens = max(self.tokens.item(), 1.0)
        mean = {name: getattr(self, name).item() / tokens for name in _MEANS}
        return {
            **{f"ilql/{name}": value for name, value in mean.items()},
            "ilql/advantage": mean["q"] - mean["v"],
        }


_MEANS = ("td", "expectile", "conservative", "q", "v", "nll")


@dataclass(frozen=True, slots=True)
class IlqlLoss:
    """One micro-batch's share of the step's loss."""

    loss: torch.Tensor
    """Scalar with gradient, already over the step's denominator."""
    stats: IlqlStats


@dataclass(frozen=True, slots=True)
class TokenValues:
    """What the heads say of the tokens of `B` completions; what is padded does not count."""

    q: torch.Tensor
    """[K, B, T], Q_k(s_t, a_t), with gradient."""
    conservative: torch.Tensor
    """[K, B, T], −log softmax(Q_k(s_t, ·))(a_t), with gradient."""
    target_q: torch.Tensor
    """[K, B, T], of the copies Q̂; detached here."""
    v: torch.Tensor
    """[B, T], V(s_t), with gradient."""


def expectile_loss(u: torch.Tensor, expectile: float) -> torch.Tensor:
    """|τ − 1(u < 0)|·u², elementwise; τ in (0, 1). Its minimum over V of u = x − V is the τ-expectile of x.

    Raises:
        ValueError: τ is out of range.
    """
    if not 0 < expectile < 1:
        raise ValueError(f"expectile={expectile} must be above 0 and below 1")
    squared = u.square()
    return torch.where(u < 0, (1.0 - expectile) * squared, expectile * squared)


def ilql_loss(
    values: TokenValues,
    logprobs: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    *,
    scales: torch.Tensor,
    denominator: float | torch.Tensor,
    gamma: float,
    expectile: float,
    conservative_weight: float,
    bc_weight: float = 0.0,
) -> IlqlLoss:
    """Σ over tokens of scale · L_t ÷ denominator.

    Args:
        values: of the tokens of each completion.
        logprobs: [B, T], log π(a_t | s_t); with gradient where the policy learns.
        rewards: [B], earned with the last token.
        mask: bool [B, T], True at completion tokens, from the first one on.
        scales: [B], each completion's weight a token.
        denominator: of the whole step.
        gamma: the discount a token, in [0, 1].
        expectile: τ, in (0, 1).
        conservative_weight: α, at least 0.
        bc_weight: w, at least 0.

    Raises:
        ValueError: shapes that do not fit, a completion without tokens or with a hole, or a number out of range.
    """
    check_tokens(logprobs, mask)
    rows = logprobs.shape[0]
    shape = list(mask.shape)
    if rewards.shape != (rows,) or scales.shape != (rows,) or list(values.v.shape) != shape:
        raise ValueError(
            f"logprobs {shape} need rewards [B], scales [B] and v of the same shape, got {list(rewards.shape)}, "
            f"{list(scales.shape)} and {list(values.v.shape)}"
        )
    for name in ("q", "conservative", "target_q"):
        if list(getattr(values, name).shape[1:]) != shape or getattr(values, name).ndim != 3:
            raise ValueError(f"{name} must be [K, B, T] with {shape} tokens, got {list(getattr(values, name).shape)}")
    if conservative_weight < 0 or bc_weight < 0:
        raise ValueError(f"conservative_weight={conservative_weight} and bc_weight={bc_weight} must be at least 0")
    # Where it is padded, not even a NaN may get into the gradient.
    q, conservative, target_q, v, logprobs = (
        torch.where(mask, each, 0.0)
        for each in (values.q, values.conservative, values.target_q.detach(), values.v, logprobs)
    )
    td = (q - token_targets(v.detach(), rewards, mask, gamma)).square()
    smallest = target_q.amin(dim=0)
    value = expectile_loss(smallest - v, expectile)
    per_token = td.sum(dim=0) + value
    if conservative_weight > 0:
        per_token = per_token + conservative_weight * conservative.sum(dim=0)
    if bc_weight > 0:
        per_token = per_token - bc_weight * logprobs
    loss = (masked_sum(per_token, mask, dim=1) * scales).sum() / check_denominator(denominator)

    def total(each: torch.Tensor) -> torch.Tensor:
        return masked_sum(each.detach(), mask)

    stats = IlqlStats(
        tokens=mask.sum().to(loss.dtype),
        td=total(td.mean(dim=0)),
        expectile=total(value),
        conservative=total(conservative.mean(dim=0)),
        q=total(smallest),
        v=total(v),
        nll=total(-logprobs),
    )
    return IlqlLoss(loss, stats)


def token_targets(v: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """y [B, T]: γ·V of the next state, the reward at a completion's last token, 0 where `mask` is False.

    It is the target of docs/equations.md 3 with V(s′) in the place of max Q(s′, ·), which the expectile stands for.

    Args:
        v: [B, T], V(s_t).
        rewards: [B].
        mask: bool [B, T], True at completion tokens, from the first one on.
        gamma: the discount, in [0, 1].

    Raises:
        ValueError: a completion has no token, or one behind padding; gamma is out of range.
    """
    goes_on = pad(mask[:, 1:], (0, 1))
    if not bool(mask[:, 0].all()) or bool((goes_on & ~mask).any()):
        raise ValueError("every completion has its tokens one after the other, from the first place on")
    ends = mask & ~goes_on
    earned = torch.where(ends, rewards[:, None].to(v.dtype), 0.0)
    following = pad(v[:, 1:], (0, 1))
    targets = q_learning_target(earned[mask], following[mask][:, None], ends[mask], gamma)
    return torch.zeros_like(v).masked_scatter(mask, targets)
