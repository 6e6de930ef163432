"""The loss of one micro-batch, the sums behind a step's figures, and what is measured beside them.

`N` completions, `T` tokens:

    loss = policy gradient + kl.weight · KL(π_θ || π_ref) − entropy_bonus · H(π_θ)
           + adapter_l2 · ‖φ‖² + l2_to_pretrained · ‖θ − θ_pretrained‖²

The first is the objective of the run's algorithm (`algorithms/base.py`). The first three are shares over the step's
denominator, one a micro-batch; the last two are added once an update.

**Importance** (`ImportanceWatch`): how much captions depend on each modality, measured now and then while a run learns.

    importance/image, importance/text          I_m ÷ ΣI of one caption of the step (docs/equations.md 9)
    importance_rms/image, importance_rms/text  I_m ÷ √(L_m d)
    seconds/importance                         what that took

A measurement is of one sampled caption, under the policy that the step begins with: a forward and a backward pass of
one sequence. An image share that falls towards 0 means that captions no longer depend on the picture.

**Sampler gap** (`SamplerGap`): how far the learner's log-probs are from those that the sampler recorded, over the
completion tokens that a step scores (groups without any learning signal are not).

    sampler_gap/max, sampler_gap/mean              |log(π_learner ÷ π_sampler)| of groups that this version sampled
    sampler_gap/stale_max, sampler_gap/stale_mean  the same of older groups: what the policy has moved since is in it

The two programs compute one policy in different ways (decode steps on a cache; whole completions), so on-policy there
should be rounding alone, and more than that is a fault that importance weights would only hide: the run stops. Others
report such figures, too (TRL's `sampling/sampling_logp_difference`, verl's `rollout_probs_diff`), over on- and
off-policy tokens together. Both log-probs are at hand in a step, as they are before its first update, so that this
costs one reduction of two numbers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mmrl_ray.algorithms.base import Objective
from mmrl_ray.analysis.attribution import caption_importance
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import LearnerError, MMRLError, ModelError, NonFiniteError, first_line, raised_at, said
from mmrl_ray.experience.carriers import PlannedGroup, RolloutGroup
from mmrl_ray.learner.ranks import Ranks
from mmrl_ray.losses.aggregation import masked_sum
from mmrl_ray.losses.regularizers import adapter_l2, entropy_mean, kl_loss, kl_per_token, l2_to_pretrained
from mmrl_ray.policy.memory import ran_out
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.collate import LearnerBatch, prompts_and_features
from mmrl_ray.policy.scoring.prefix import Scores
from mmrl_ray.policy.vision import VisionCache

NAMES = ("policy", "kl_term", "entropy_term", "kl", "kl_tokens", "entropy", "tokens", "vision_recomputed")
"""Of the sums before the objective's own."""
_SHOWN_SAMPLES = 8
logger = logging.getLogger(__name__)
LARGEST = {torch.float32: 0.01, torch.float16: 0.5, torch.bfloat16: 2.0}
"""Nats, where `learner.max_sampler_gap` is not set. Rounding makes 3e-5 and 0.4 of them at 28 layers whose logits'
standard deviation is 6.6, over 72 tokens; a step has up to 10⁵, and tails."""
MEAN_SHARE = 0.1
"""The mean may be this much of the largest: a fault of every token shows there where rounding hides its size."""
WARNED_SHARE = 0.5
"""Of the bound, from which on there is a warning at each step; of the default bound where the gap stops nothing."""
_KINDS = ("", "stale_")


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


def every_token_counts(cfg: LearnerSection) -> bool:
    """Whether a term of the loss has a gradient on tokens whose advantage is 0, too."""
    return kl_in_loss(cfg) or cfg.entropy_bonus > 0


def micro_batch_share(
    objective: Objective,
    cfg: LearnerSection,
    denominator: float,
    batch: LearnerBatch,
    scores: Scores,
    proximal: torch.Tensor | None,
    place: int = 0,
) -> Share:
    """The objective's, the KL and the entropy term of one micro-batch.

    Args:
        objective: of the run's algorithm.
        cfg: KL and entropy bonus.
        denominator: the whole step's.
        batch: what was sampled, and its weights.
        scores: log-probs under π_θ, with gradient, and entropies.
        proximal: log-probs [N, T] at the start of the step, or None for those of `scores` themselves.
        place: of the micro-batch among this rank's of the step.

    Raises:
        LearnerError: the objective, which may be a user's own, raised: it would again after a restart.
    """
    loss, own = _share(objective, cfg, batch, scores, proximal, denominator, place)
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
    entropy, entropy_term = zero, zero
    if scores.entropies is not None:
        entropy = masked_sum(scores.entropies.detach(), scores.mask)
        if cfg.entropy_bonus > 0:
            mean = entropy_mean(scores.entropies, scores.mask, scales=batch.scales, denominator=denominator)
            entropy_term = -cfg.entropy_bonus * mean
            loss = loss + entropy_term
    recomputed = zero + batch.vision_recomputed
    head = torch.stack([main, kl_term.detach(), entropy_term.detach(), kl, kl_tokens, entropy, tokens, recomputed])
    return Share(loss, torch.cat([head, own.to(head.dtype)]).double())


def _share(
    objective: Objective,
    cfg: LearnerSection,
    batch: LearnerBatch,
    scores: Scores,
    proximal: torch.Tensor | None,
    denominator: float,
    place: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return objective.share(batch, scores, proximal, denominator, place)
    except (MMRLError, torch.AcceleratorError):
        raise
    except Exception as error:
        if ran_out(error):
            raise
        if cfg.sharding != "none":  # the other ranks wait in a gather, where only a restart of the group reaches them
            raise
        raise LearnerError(f"the loss {cfg.loss} raised {first_line(error)}{raised_at(error)}") from error


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
        "loss/entropy": head["entropy_term"],
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
    """Seconds by phase: the host's, and on a CUDA GPU those between marks in its queue, which nobody waits for.

    The host is often far ahead of a GPU: by its own clock the backward pass would show up in whatever waits first.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(
            ("seconds/fetch", "seconds/forward_backward", "seconds/reduce", "seconds/optimizer"), 0.0
        )
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to `name`."""
        start = time.perf_counter()
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._marks.append((name, begin, end))
            begin.record()
        try:
            yield
        finally:
            if self._on_gpu:
                end.record()
            else:
                self._seconds[name] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """So far; waits for the GPU."""
        for name, begin, end in self._marks:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._marks.clear()
        return dict(self._seconds)


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


class ImportanceWatch:
    """Measures every so many steps; where the model's modalities cannot be told it says so once, and stays quiet."""

    def __init__(self, policy: Policy, cache: VisionCache, every: int, *, alone: bool = True) -> None:
        """`every` is in steps; 0 never. `alone`: no other rank waits in a pass of this one, which may then fail."""
        self._alone = alone
        self._policy = policy
        self._cache = cache
        self._every = every

    def is_due(self, step: int) -> bool:
        """Whether `measure` should be called at this step."""
        return self._every > 0 and step % self._every == 0

    def measure(self, fetch: Callable[[], RolloutGroup]) -> dict[str, float]:
        """The figures of the first completion of a group. No parameter gets a gradient, no random number is drawn."""
        began = time.perf_counter()
        group = fetch()
        try:
            with torch.no_grad():
                (prompt,), (features,), _ = prompts_and_features(self._policy, [group], self._cache)
            found = caption_importance(
                self._policy, prompt, features, group.completions[0].token_ids, temperature=group.sampling.temperature
            )
        except (ModelError, RuntimeError) as error:
            if not (isinstance(error, ModelError) or (ran_out(error) and self._alone)):
                raise
            logger.warning("the importance of modalities is not measured: %s", said(error))
            self._every = 0
            return {}
        shares = {f"importance/{name}": value for name, value in found.share.items()}
        rms = {f"importance_rms/{name}": value for name, value in found.rms.items()}
        told = {name: value for name, value in (shares | rms).items() if math.isfinite(value)}
        return {**told, "seconds/importance": time.perf_counter() - began}


class SamplerGap:
    """The sampler gap of one step: filled micro-batch by micro-batch, then summed over ranks."""

    def __init__(self, policy: Policy, cfg: LearnerSection) -> None:
        self._policy = policy
        self.bound = cfg.max_sampler_gap if cfg.max_sampler_gap is not None else LARGEST[policy.dtype]
        """Nats; 0 stops nothing."""
        self._sums = torch.zeros(2, 2, dtype=torch.float64, device=policy.device)
        """Σ and number of tokens, of on-policy groups and of stale ones."""
        self._largest = torch.zeros(2, dtype=torch.float64, device=policy.device)

    def add(
        self,
        planned: Sequence[PlannedGroup],
        logprobs: torch.Tensor,
        behaviour: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        """Takes in a micro-batch: [N, T] each, completions in the order of the groups."""
        stale = [group.staleness > 0 for group in planned for _ in group.learned_tokens]
        rows = self._policy.place(torch.tensor(stale))[:, None]
        gap = (logprobs.detach() - behaviour).abs().double()
        # No device is waited for here.
        for kind, of in enumerate((mask & ~rows, mask & rows)):
            chosen = torch.where(of, gap, 0.0)
            self._sums[kind, 0] += chosen.sum()
            self._sums[kind, 1] += of.sum()
            self._largest[kind] = torch.maximum(self._largest[kind], chosen.max())

    def reduce(self, ranks: Ranks) -> None:
        """Over all ranks, which all call it."""
        ranks.sum_(self._sums)
        ranks.max_(self._largest)

    def metrics(self) -> dict[str, float]:
        """Figures of the step; those of a kind of groups that it did not have are missing."""
        figures = {}
        read = torch.cat([self._sums, self._largest[:, None]], dim=1).tolist()
        for name, (total, tokens, largest) in zip(_KINDS, read, strict=True):
            if tokens:
                figures[f"sampler_gap/{name}max"] = largest
                figures[f"sampler_gap/{name}mean"] = total / tokens
        return figures

    def check(self, step: int) -> None:
        """Stops a step whose on-policy tokens were not sampled from the policy that learns.

        Raises:
            LearnerError: the largest gap is above the bound, or the mean above a tenth of it.
        """
        figures = self.metrics()
        largest, mean = figures.get("sampler_gap/max", 0.0), figures.get("sampler_gap/mean", 0.0)
        warned_at = WARNED_SHARE * (self.bound or LARGEST[self._policy.dtype])
        if largest > warned_at or mean > MEAN_SHARE * warned_at:
            logger.warning(
                "step %d: |log(learner ÷ sampler)| of on-policy tokens is %.3g at most and %.3g on average: above %.3g "
                "(on average %.3g) is more than rounding explains",
                *(step, largest, mean, warned_at, MEAN_SHARE * warned_at),
            )
        if self.bound == 0 or (largest <= self.bound and mean <= MEAN_SHARE * self.bound):
            return
        raise LearnerError(
            f"step {step}: model {self._policy.path!r} ({self._policy.hf_model.config.model_type}) is sampled from by "
            f"another policy than learns: |log(learner ÷ sampler)| of on-policy tokens is {largest:.3g} at most and "
            f"{mean:.3g} on average, above learner.max_sampler_gap={self.bound:g} (on average "
            f"{MEAN_SHARE * self.bound:g}); this update was not made: look at `mmrl check {self._policy.path}`, and "
            "raise the bound only where rounding explains the gap"
        )
