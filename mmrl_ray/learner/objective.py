"""The loss of one micro-batch, and the sums behind a step's figures. Pure; `N` completions, `T` tokens.

    loss = policy gradient + kl.weight · KL(π_θ || π_ref) + adapter_l2 · ‖φ‖² + l2_to_pretrained · ‖θ − θ_pretrained‖²

The first is the objective of the run's algorithm (`algorithms/base.py`). The first two are shares over the step's
denominator, one a micro-batch; the last two are added once an update.

Small parts of a learner's step: a clock by phase, the flat gradient, the check for NaN.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mmrl_ray.algorithms.base import Objective
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import NonFiniteError
from mmrl_ray.experience.carriers import PlannedGroup
from mmrl_ray.losses.aggregation import masked_sum
from mmrl_ray.losses.kl import kl_loss, kl_per_token
from mmrl_ray.losses.regularizers import adapter_l2, l2_to_pretrained
from mmrl_ray.policy.scoring.collate import LearnerBatch
from mmrl_ray.policy.scoring.prefix import Scores

NAMES = ("policy", "kl_term", "kl", "kl_tokens", "entropy", "tokens", "vision_recomputed")
"""Of the sums before the objective's own."""
_SHOWN_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Share:
    """One micro-batch's part in a step."""

    loss: torch.Tensor
    """Scalar with gradient."""
    sums: torch.Tensor
    """float64 [`width`], detached: `NAMES`, then the objective's own; they add over micro-batches and ranks."""


def width(objective: Objective) -> int:
    """How many sums there are."""
    return len(NAMES) + len(objective.names)


def kl_in_loss(cfg: LearnerSection) -> bool:
    """Whether KL is a term of the loss; k1 is part of the reward, and in the advantages already."""
    return cfg.kl.weight > 0 and cfg.kl.estimator != "k1"


def micro_batch_share(
    objective: Objective,
    cfg: LearnerSection,
    denominator: float,
    batch: LearnerBatch,
    scores: Scores,
    proximal: torch.Tensor | None,
    place: int = 0,
) -> Share:
    """The objective's and the KL term of one micro-batch.

    Args:
        objective: of the run's algorithm.
        cfg: KL.
        denominator: the whole step's.
        batch: what was sampled, and its weights.
        scores: log-probs under π_θ, with gradient, and entropies.
        proximal: log-probs [N, T] at the start of the step, or None for those of `scores` themselves.
        place: of the micro-batch among this rank's of the step.
    """
    loss, own = objective.share(batch, scores, proximal, denominator, place)
    main = loss.detach()
    zero = loss.new_zeros(())
    kl_term, kl, kl_tokens = zero, zero, zero
    tokens = scores.mask.sum().to(loss.dtype)
    # Stored captions were not sampled from π_θ, so that no estimator of the KL holds on them.
    if batch.reference_logprobs is not None and not cfg.family.is_offline:
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
    head = torch.stack([main, kl_term.detach(), kl, kl_tokens, entropy, tokens, recomputed])
    return Share(loss, torch.cat([head, own.to(head.dtype)]).double())


def regularisers(cfg: LearnerSection, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weighted regularisers that are on, scalars with gradient. One rank adds them, once an update."""
    terms: dict[str, torch.Tensor] = {}
    if cfg.adapter_l2 > 0:
        terms["adapter_l2"] = cfg.adapter_l2 * adapter_l2(model)
    if cfg.l2_to_pretrained > 0:
        terms["l2_to_pretrained"] = cfg.l2_to_pretrained * l2_to_pretrained(model)
    return terms


def step_figures(objective: Objective, sums: torch.Tensor, regulariser_values: dict[str, float]) -> dict[str, float]:
    """Metrics of one update out of sums over all its micro-batches and ranks; NaN is a figure nobody measured."""
    own = dict(zip(objective.names, sums[len(NAMES) :].tolist(), strict=True))
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
        **objective.figures(own),
    }


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(
            ("seconds/fetch", "seconds/forward_backward", "seconds/reduce", "seconds/optimizer"), 0.0
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def flat_gradient(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """One buffer whose pieces are the parameters' `.grad`: backward adds into it, one reduction sums it over ranks."""
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
    offset = 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return flat


def check_finite(metric: str, value: float, step: int, groups: Sequence[PlannedGroup]) -> None:
    """Stops a step whose `metric` is NaN or infinite.

    Raises:
        NonFiniteError: it is; the message names the step, the metric and the samples.
    """
    if math.isfinite(value):
        return
    ids = [group.sample_id for group in groups]
    more = f" and {len(ids) - _SHOWN_SAMPLES} more" if len(ids) > _SHOWN_SAMPLES else ""
    raise NonFiniteError(
        f"step {step}: {metric} is {value} on samples {', '.join(ids[:_SHOWN_SAMPLES])}{more}; this update was "
        "not made and the last checkpoint is good: lower learner.lr, or look at these samples"
    )
