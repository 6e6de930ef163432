"""`LearnerStep`: one step plan in, one (or `passes`) optimiser updates done, metrics out. No Ray here.

    micro-batches ──shared prefix──▶ log-probs ──▶ loss share ──backward──▶ one flat gradient buffer
                                                                               │ summed over ranks, by hand
                                         AdamW, cosine schedule ◀── clipped ◀──┘

Every loss share is over the plan's one denominator, so shares add up over micro-batches and ranks, and the ranks need
not agree on how many backward passes they make: a rank without work adds zeros. Nothing is divided by the world size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import ConfigError, LearnerError, MMRLError, NonFiniteError
from mmrl_ray.experience.carriers import PlannedGroup, RolloutGroup, StepPlan
from mmrl_ray.learner.objective import WIDTH, Share, kl_in_loss, micro_batch_share, regularisers, step_figures
from mmrl_ray.learner.ranks import Ranks
from mmrl_ray.learner.schedule import cosine_scheduler
from mmrl_ray.learner.state import LearnerState, capture_rng, restore_rng
from mmrl_ray.policy.adapter import adapter_parameters
from mmrl_ray.policy.collate import LearnerBatch, collate
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.prefix import ScorePath, score_completions
from mmrl_ray.policy.vision import VisionCache

Payloads = Callable[[Sequence[PlannedGroup]], Sequence[RolloutGroup]]
"""Fetches the groups behind the payloads of a micro-batch, in order."""

_SHOWN_SAMPLES = 8


class LearnerStep:
    """Owns the optimiser over a policy's adapter. All ranks call `run` with the same plans.

    Args:
        policy: with an adapter; its trainable parameters are what is learnt.
        cfg: loss, regularisers, optimiser.
        path: which forward is active on this model (`policy/parity.py` decides).
        vision_cache: for groups whose vision features did not travel with them.
        ranks: the learners that share a step.

    Raises:
        ConfigError: the policy's dtype cannot be trained.
        AdapterError: the policy has no adapter.
    """

    def __init__(
        self,
        policy: Policy,
        cfg: LearnerSection,
        *,
        path: ScorePath = "shared_prefix",
        vision_cache: VisionCache | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if policy.dtype == torch.float16:
            raise ConfigError("model.dtype=float16 would need loss scaling to train: use bfloat16 or float32")
        self.policy = policy
        self.cfg = cfg
        self.updates = 0
        """Optimiser updates so far: finished steps times `passes`."""
        self.path: ScorePath = path
        """Which forward is active."""
        self._cache = vision_cache
        self._ranks = ranks if ranks is not None else Ranks()
        self._parameters = adapter_parameters(policy.model)
        self._gradient = _flat_gradient(self._parameters)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
        self._scheduler = cosine_scheduler(
            self._optimizer, total_steps=cfg.steps * cfg.passes, lr_min=cfg.lr_min, warmup_steps=cfg.warmup_steps
        )

    def run(self, plan: StepPlan, payloads: Payloads) -> dict[str, float | bool]:
        """Consumes a plan: every rank its own micro-batches, then one update together (`passes` of them).

        Returns metrics of the whole step, equal on all ranks but for `seconds/…`; of several passes, the last one's.

        Raises:
            NonFiniteError: a loss or the gradient norm is NaN or infinite; the optimiser has not moved then.
            LearnerError: the plan is for another number of ranks, or a batch does not fit the device's memory.
            MMRLError: whatever `payloads` raised. All ranks raise the same error.
        """
        if len(plan.micro_batches) != self._ranks.size:
            raise LearnerError(
                f"plan of step {plan.step} is for {len(plan.micro_batches)} learners, and there are {self._ranks.size}"
            )
        batches = self._worth_a_pass(plan)
        # π_prox is π_θ before the first update: the first pass sees it anyway, and later ones remember it.
        proximal: list[torch.Tensor | None] = [None] * len(batches)
        clock = _Clock()
        metrics: dict[str, float] = {}
        for _ in range(self.cfg.passes):
            metrics = self._update(plan, batches, proximal, payloads, clock)
        return {
            **metrics,
            "tokens/completion": float(sum(sum(g.completion_tokens) for g in plan.groups)),
            "shared_prefix": self.path == "shared_prefix",
            **clock.seconds,
        }

    def state(self) -> LearnerState:
        """Optimiser, schedule and random generators, for `restore`."""
        optimizer = self._optimizer.state_dict()
        tensors = {
            f"optimizer/{index}/{name}": value
            for index, fields in optimizer["state"].items()
            for name, value in fields.items()
        }
        rng = capture_rng()
        facts = {"updates": self.updates, "scheduler": self._scheduler.state_dict(), **rng.facts}
        return LearnerState({**tensors, **rng.tensors}, facts)

    def restore(self, state: LearnerState) -> None:
        """Continues as the learner that `state` was taken of; the adapter is loaded separately."""
        fields: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in state.tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                fields.setdefault(int(index), {})[name] = value
        self._scheduler.load_state_dict(dict(state.facts["scheduler"]))
        groups = self._optimizer.state_dict()["param_groups"]
        for group, rate in zip(groups, self._scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self._optimizer.load_state_dict({"state": fields, "param_groups": groups})
        self.updates = int(state.facts["updates"])
        restore_rng(state)

    # -- one update ------------------------------------------------------------------------------------------------

    def _update(
        self,
        plan: StepPlan,
        batches: Sequence[Sequence[PlannedGroup]],
        proximal: list[torch.Tensor | None],
        payloads: Payloads,
        clock: _Clock,
    ) -> dict[str, float]:
        sums = torch.zeros(WIDTH, dtype=torch.float64, device=self.policy.device)
        local: MMRLError | None = None
        self._gradient.zero_()
        try:
            self._accumulate(plan, batches, proximal, payloads, sums, clock)
        except MMRLError as error:
            local = error  # the others wait in the reduction: meet them there first
        with clock.phase("seconds/reduce"):
            if self._ranks.any(local is not None):
                self._ranks.raise_first(local)
        with clock.phase("seconds/forward_backward"):
            values = self._add_regularisers()
        with clock.phase("seconds/reduce"):
            self._ranks.sum_(sums)
            self._ranks.sum_(self._gradient)
        with clock.phase("seconds/optimizer"):
            rate = float(self._optimizer.param_groups[0]["lr"])
            norm = self._clip(plan)
            self._optimizer.step()
            self._scheduler.step()
            self.updates += 1
        return {**step_figures(sums.cpu(), values), "grad_norm": norm, "lr": rate}

    def _accumulate(
        self,
        plan: StepPlan,
        batches: Sequence[Sequence[PlannedGroup]],
        proximal: list[torch.Tensor | None],
        payloads: Payloads,
        sums: torch.Tensor,
        clock: _Clock,
    ) -> None:
        """Forward and backward over this rank's micro-batches."""
        losses: list[torch.Tensor] = []
        for i, planned in enumerate(batches):
            with clock.phase("seconds/fetch"):
                groups = payloads(planned)
            with clock.phase("seconds/forward_backward"):
                try:
                    batch = collate(self.policy, list(zip(groups, planned, strict=True)), self._cache)
                    share, logprobs = self._one(plan, batch, proximal[i])
                except torch.OutOfMemoryError as error:
                    raise LearnerError(
                        f"step {plan.step}: a micro-batch of {len(planned)} groups does not fit the device's memory; "
                        f"lower learner.micro_batch_tokens={self.cfg.micro_batch_tokens}"
                    ) from error
                proximal[i] = logprobs if proximal[i] is None else proximal[i]
                losses.append(share.loss.detach())
                sums += share.sums
        with clock.phase("seconds/forward_backward"):
            for planned, loss in zip(batches, losses, strict=True):
                _check_finite("loss", float(loss), plan.step, planned)

    def _one(self, plan: StepPlan, batch: LearnerBatch, proximal: torch.Tensor | None) -> tuple[Share, torch.Tensor]:
        with self._autocast():
            scores = score_completions(
                self.policy,
                batch.prompts,
                batch.features,
                batch.completions,
                batch.temperature,
                path=self.path,
                entropy=True,
            )
        share = micro_batch_share(self.cfg, plan.denominator, batch, scores, proximal)
        share.loss.backward()
        return share, scores.logprobs.detach()

    def _add_regularisers(self) -> dict[str, float]:
        """Once an update: rank 0 adds the gradient, every rank reports the value."""
        terms = regularisers(self.cfg, self.policy.model)
        if terms and self._ranks.rank == 0:
            torch.stack(list(terms.values())).sum().backward()
        return {name: float(term.detach()) for name, term in terms.items()}

    def _clip(self, plan: StepPlan) -> float:
        """Scales the gradient down to `max_grad_norm`; returns its norm before.

        Raises:
            NonFiniteError: the norm is NaN or infinite.
        """
        norm = float(torch.linalg.vector_norm(self._gradient))
        _check_finite("gradient norm", norm, plan.step, plan.groups)
        if norm > self.cfg.max_grad_norm:
            self._gradient.mul_(self.cfg.max_grad_norm / norm)
        return norm

    def _worth_a_pass(self, plan: StepPlan) -> list[list[PlannedGroup]]:
        """This rank's micro-batches without the groups whose every gradient is 0."""
        mine = [[plan.groups[i] for i in batch] for batch in plan.micro_batches[self._ranks.rank]]
        if not kl_in_loss(self.cfg):
            mine = [[group for group in batch if group.has_signal] for batch in mine]
        return [batch for batch in mine if batch]

    def _autocast(self) -> AbstractContextManager[None]:
        if self.policy.device.type == "cuda" and self.policy.dtype == torch.bfloat16:
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()


class _Clock:
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


def _flat_gradient(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """One buffer whose pieces are the parameters' `.grad`: backward adds into it, one reduction sums it over ranks."""
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
    offset = 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return flat


def _check_finite(metric: str, value: float, step: int, groups: Sequence[PlannedGroup]) -> None:
    if math.isfinite(value):
        return
    ids = [group.sample_id for group in groups]
    more = f" and {len(ids) - _SHOWN_SAMPLES} more" if len(ids) > _SHOWN_SAMPLES else ""
    raise NonFiniteError(
        f"step {step}: {metric} is {value} on samples {', '.join(ids[:_SHOWN_SAMPLES])}{more}; this update was "
        "not made and the last checkpoint is good: lower learner.lr, or look at these samples"
    )
