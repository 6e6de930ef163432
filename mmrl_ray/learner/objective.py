"""The loss of one micro-batch, and the sums behind a step's figures. Pure; `N` completions, `T` tokens.

    loss = policy gradient + kl.weight · KL(π_θ || π_ref) + adapter_l2 · ‖φ‖² + l2_to_pretrained · ‖θ − θ_pretrained‖²

Or the loss of DPO or ILQL in place of the policy gradient. The first two are shares over the step's denominator, one a
micro-batch; the last two are added once an update.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn

from mmrl_ray.config.learner import OFFLINE, LearnerSection
from mmrl_ray.errors import LearnerError
from mmrl_ray.losses.dpo import DpoLoss, DpoStats, dpo_loss
from mmrl_ray.losses.ilql import IlqlLoss, IlqlStats, TokenValues, ilql_loss
from mmrl_ray.losses.kl import kl_loss, kl_per_token
from mmrl_ray.losses.masked import masked_sum
from mmrl_ray.losses.policy_gradient import policy_loss
from mmrl_ray.losses.regularizers import adapter_l2, l2_to_pretrained
from mmrl_ray.losses.stats import LossStats, PolicyLoss
from mmrl_ray.policy.collate import LearnerBatch
from mmrl_ray.policy.prefix import Scores

NAMES = ("policy", "kl_term", "kl", "kl_tokens", "entropy", "tokens", "vision_recomputed")
"""Of the sums before those of the loss's own statistics."""
_STATS: dict[str, type[LossStats | DpoStats | IlqlStats]] = {"dpo": DpoStats, "ilql": IlqlStats}


@dataclass(frozen=True, slots=True)
class Share:
    """One micro-batch's part in a step."""

    loss: torch.Tensor
    """Scalar with gradient."""
    sums: torch.Tensor
    """float64 [`width`], detached: `NAMES`, then the loss's own; they add over micro-batches and ranks."""


def width(cfg: LearnerSection) -> int:
    """How many sums there are."""
    return len(NAMES) + len(fields(_stats(cfg)))


def kl_in_loss(cfg: LearnerSection) -> bool:
    """Whether KL is a term of the loss; k1 is part of the reward, and in the advantages already."""
    return cfg.kl.weight > 0 and cfg.kl.estimator != "k1"


def micro_batch_share(
    cfg: LearnerSection,
    denominator: float,
    batch: LearnerBatch,
    scores: Scores,
    proximal: torch.Tensor | None,
    values: TokenValues | None = None,
) -> Share:
    """Policy-gradient and KL terms of one micro-batch, or its share of the loss of DPO or ILQL.

    Args:
        cfg: loss, clips, cap and KL.
        denominator: the whole step's.
        batch: what was sampled, and its weights.
        scores: log-probs under π_θ, with gradient, and entropies.
        proximal: log-probs [N, T] at the start of the step, or None for those of `scores` themselves.
        values: of the same tokens, for ILQL.
    """
    gradient = _main_term(cfg, denominator, batch, scores, proximal, values)
    loss = gradient.loss
    zero = loss.new_zeros(())
    kl_term, kl, kl_tokens = zero, zero, zero
    tokens = scores.mask.sum().to(loss.dtype)
    # Stored captions were not sampled from π_θ, so that no estimator of the KL holds on them.
    if batch.reference_logprobs is not None and cfg.loss not in OFFLINE:
        if kl_in_loss(cfg):
            term = kl_loss(
                cfg.kl.estimator,
                scores.logprobs,
                batch.reference_logprobs,
                scores.mask,
                scales=batch.scales,
                denominator=denominator,
            )
            kl_term = cfg.kl.weight * term.loss
            loss = loss + kl_term
            kl, kl_tokens = term.value, term.count
        else:
            per_token = kl_per_token("k3", scores.logprobs.detach(), batch.reference_logprobs)
            kl, kl_tokens = masked_sum(per_token, scores.mask), tokens
    entropy = zero if scores.entropies is None else masked_sum(scores.entropies, scores.mask)
    recomputed = zero + batch.vision_recomputed
    head = torch.stack([gradient.loss.detach(), kl_term.detach(), kl, kl_tokens, entropy, tokens, recomputed])
    return Share(loss, torch.cat([head, gradient.stats.to_tensor()]).double())


def _main_term(
    cfg: LearnerSection,
    denominator: float,
    batch: LearnerBatch,
    scores: Scores,
    proximal: torch.Tensor | None,
    values: TokenValues | None,
) -> PolicyLoss | DpoLoss | IlqlLoss:
    if cfg.loss == "ilql":
        assert values is not None
        return ilql_loss(
            values,
            scores.logprobs,
            batch.advantages,  # with no baseline, what each completion earned
            scores.mask,
            scales=batch.scales,
            denominator=denominator,
            gamma=cfg.ilql.gamma,
            expectile=cfg.ilql.expectile,
            conservative_weight=cfg.ilql.conservative,
            bc_weight=cfg.ilql.bc_weight,
        )
    if cfg.loss == "dpo":
        if batch.reference_logprobs is None:
            raise LearnerError(f"pairs {', '.join(batch.sample_ids[:4])} came without reference log-probs")
        return dpo_loss(
            scores.logprobs,
            batch.reference_logprobs,
            batch.advantages,
            scores.mask,
            denominator=denominator,
            beta=cfg.dpo.beta,
            label_smoothing=cfg.dpo.label_smoothing,
        )
    return policy_loss(
        cfg.loss,
        scores.logprobs,
        proximal,
        batch.behaviour_logprobs,
        batch.advantages,
        scores.mask,
        scales=batch.scales,
        denominator=denominator,
        off_policy_cap=cfg.off_policy_cap,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
    )


def regularisers(cfg: LearnerSection, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weighted regularisers that are on, scalars with gradient. One rank adds them, once an update."""
    terms: dict[str, torch.Tensor] = {}
    if cfg.adapter_l2 > 0:
        terms["adapter_l2"] = cfg.adapter_l2 * adapter_l2(model)
    if cfg.l2_to_pretrained > 0:
        terms["l2_to_pretrained"] = cfg.l2_to_pretrained * l2_to_pretrained(model)
    return terms


def step_figures(cfg: LearnerSection, sums: torch.Tensor, regulariser_values: dict[str, float]) -> dict[str, float]:
    """Metrics of one update out of sums over all its micro-batches and ranks; NaN is a figure nobody measured."""
    stats = _stats(cfg).from_tensor(sums[len(NAMES) :])
    head = dict(zip(NAMES, sums[: len(NAMES)].tolist(), strict=True))
    terms = {
        "loss/policy": head["policy"],
        "loss/kl": head["kl_term"],
        "loss/adapter_l2": regulariser_values.get("adapter_l2", 0.0),
        "loss/l2_to_pretrained": regulariser_values.get("l2_to_pretrained", 0.0),
    }
    return {
        "loss": sum(terms.values()),
        **terms,
        "kl": head["kl"] / head["kl_tokens"] if head["kl_tokens"] else float("nan"),
        "entropy": head["entropy"] / head["tokens"] if head["tokens"] else float("nan"),
        "tokens/scored": head["tokens"],
        "vision/recomputed": head["vision_recomputed"],
        **stats.metrics(),
    }


def _stats(cfg: LearnerSection) -> type[LossStats | DpoStats | IlqlStats]:
    return _STATS.get(cfg.loss, LossStats)
