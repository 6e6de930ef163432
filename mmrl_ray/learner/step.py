"""`LearnerStep`: one step plan in, one (or `passes`) optimiser updates done, metrics out. No Ray here.

    micro-batches ──shared prefix──▶ log-probs ──▶ loss share ──backward──▶ one flat gradient buffer
                                                                               │ summed over ranks, by hand
                                         AdamW, cosine schedule ◀── clipped ◀──┘

Every loss share is over the plan's one denominator, so shares add up over micro-batches and ranks, and the ranks need
not agree on how many backward passes they make: a rank without work adds zeros. Nothing is divided by the world size.

A micro-batch that does not fit the device's memory is halved, which adds up to the same; the others wait for that rank
where gradients are summed. The smaller budget is remembered, and later micro-batches of all ranks are split by it
(`token_budget`): what was too much for one soon is for the next, and all are as slow as the slowest.

Where the base is sharded they do have to: each pass gathers the layers' weights from all ranks. A rank with fewer
micro-batches then makes as many passes as the others, the further ones with a gradient of 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import ConfigError, LearnerError, MMRLError
from mmrl_ray.experience.carriers import PlannedGroup, RolloutGroup, StepPlan
from mmrl_ray.experience.plan import GroupSize, padded_tokens, split_micro_batches
from mmrl_ray.learner.checkpoints import LearnerState, capture_rng, restore_rng
from mmrl_ray.learner.objective import (
    Clock,
    SamplerGap,
    Share,
    check_finite,
    every_token_counts,
    flat_gradient,
    micro_batch_share,
    regularisers,
    step_figures,
    width,
)
from mmrl_ray.learner.ranks import Ranks
from mmrl_ray.losses.schedule import cosine_scheduler
from mmrl_ray.policy.lora.adapter import adapter_parameters
from mmrl_ray.policy.lora.variants import dropout_on
from mmrl_ray.policy.memory import ran_out
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.collate import LearnerBatch, collate
from mmrl_ray.policy.scoring.prefix import ScorePath, Scores, score_completions
from mmrl_ray.policy.vision import VisionCache

Payloads = Callable[[Sequence[PlannedGroup]], Sequence[RolloutGroup]]
"""Fetches the groups behind the payloads of a micro-batch, in order."""
_OWN = "objective/"
_NO_BUDGET = 1 << 62
"""Tokens."""
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _MicroBatch:
    groups: list[PlannedGroup]
    place: int
    """Names it to the objective, through all passes of a step; no other of the step has had it."""
    proximal: torch.Tensor | None = None
    """π_prox is π_θ before the first update: the first pass sees it anyway, and later ones remember it."""


class LearnerStep:
    """Owns the optimiser over a policy's adapter, and over what the objective learns beside it.

    All ranks call `run` with the same plans.

    Args:
        policy: with an adapter; its trainable parameters are what is learnt.
        cfg: loss, regularisers, optimiser.
        path: which forward is active on this model (`policy/parity.py` decides).
        vision_cache: for groups whose vision features did not travel with them.
        ranks: the learners that share a step.
        in_lockstep: all ranks make the same number of passes (`learner/ranks.py`).
        seed: of what the objective learns beside the adapter.

    Raises:
        ConfigError: the policy's dtype cannot be trained.
        AdapterError: the policy has no adapter.
        ValueError: the policy lacks what the objective learns (`Algorithm.prepare`).
    """

    def __init__(
        self,
        policy: Policy,
        cfg: LearnerSection,
        *,
        path: ScorePath = "shared_prefix",
        vision_cache: VisionCache | None = None,
        ranks: Ranks | None = None,
        in_lockstep: bool = False,
        seed: int = 0,
    ) -> None:
        if policy.dtype == torch.float16:
            raise ConfigError("model.dtype=float16 would need loss scaling to train: use bfloat16 or float32")
        self.policy = policy
        self.cfg = cfg
        self.updates = 0
        """Optimiser updates so far: finished steps times `passes`."""
        self.path: ScorePath = path
        """Which forward is active."""
        self._halved = 0
        self.token_budget: int | None = None
        """Tokens of a pass at most, where this device takes fewer than the plan has in a micro-batch."""
        self._cache = vision_cache
        self._ranks = ranks if ranks is not None else Ranks()
        self._in_lockstep = in_lockstep
        self._family = cfg.family
        self._objective = self._family.objective(policy, seed)
        self._parameters = adapter_parameters(policy.model) if self._family.trains_adapter else []
        self._parameters += self._objective.parameters()
        self._gradient = flat_gradient(self._parameters)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
        self._scheduler = cosine_scheduler(
            self._optimizer, total_steps=cfg.steps * cfg.passes, lr_min=cfg.lr_min, warmup_steps=cfg.warmup_steps
        )

    def run(self, plan: StepPlan, payloads: Payloads) -> dict[str, float | bool]:
        """Consumes a plan: every rank its own micro-batches, then one update together (`passes` of them).

        Returns metrics of the whole step, equal on all ranks but for `seconds/…`; of several passes, the last one's.

        Raises:
            NonFiniteError: a loss or the gradient norm is NaN or infinite; the optimiser has not moved then.
            LearnerError: sampler and learner do not compute one policy (the optimiser has not moved then), the plan is
                for another number of ranks, or a batch does not fit the device's memory.
            MMRLError: whatever `payloads` raised. All ranks raise the same error.
        """
        if len(plan.micro_batches) != self._ranks.size:
            raise LearnerError(
                f"plan of step {plan.step} is for {len(plan.micro_batches)} learners, and there are {self._ranks.size}"
            )
        batches = [_MicroBatch(g, i) for i, g in enumerate(self._worth_a_pass(plan, self._ranks.rank))]
        clock = Clock(self.policy.device)
        metrics: dict[str, float] = {}
        # Stored captions were not sampled from this policy, and after an update it is another one.
        gap = SamplerGap(self.policy, self.cfg) if not self._family.is_offline else None
        self._objective.begin_step()
        self._halved = 0
        for i in range(self.cfg.passes):
            metrics = self._update(plan, batches, payloads, clock, gap if i == 0 else None)
        if metrics.get("micro_batches/halved"):
            self.token_budget = self._ranks.least(_NO_BUDGET if self.token_budget is None else self.token_budget)
        return {
            **metrics,
            **(gap.metrics() if gap is not None else {}),
            "tokens/completion": float(sum(sum(g.learned_tokens) for g in plan.groups)),
            "shared_prefix": self.path != "naive",
            "packed_rows": self.path == "packed",
            **clock.seconds(),
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
        own = {f"{_OWN}{name}": tensor for name, tensor in self._objective.state().items()}
        return LearnerState({**tensors, **own, **rng.tensors}, facts)

    def restore(self, state: LearnerState) -> None:
        """Continues as the learner that `state` was taken of; the adapter is loaded separately."""
        fields: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in state.tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                fields.setdefault(int(index), {})[name] = value
        own = {key.removeprefix(_OWN): value for key, value in state.tensors.items() if key.startswith(_OWN)}
        self._objective.restore(own)
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
        batches: list[_MicroBatch],
        payloads: Payloads,
        clock: Clock,
        gap: SamplerGap | None,
    ) -> dict[str, float]:
        # Of the objective, and how often a micro-batch of this step was halved so far.
        sums = torch.zeros(width(self._objective) + 1, dtype=torch.float64, device=self.policy.device)
        local: MMRLError | None = None
        self._gradient.zero_()
        try:
            self._accumulate(plan, batches, payloads, sums, clock, gap)
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
            if gap is not None:
                gap.reduce(self._ranks)
                gap.check(plan.step)
        with clock.phase("seconds/optimizer"):
            rate = float(self._optimizer.param_groups[0]["lr"])
            norm = self._clip(plan)
            self._optimizer.step()
            self._scheduler.step()
            self._objective.after_update()
            self.updates += 1
        summed = sums.cpu()
        halved = {"micro_batches/halved": float(summed[-1])} if summed[-1] else {}
        return {**step_figures(self._objective, summed[:-1], values), **halved, "grad_norm": norm, "lr": rate}

    def _accumulate(
        self,
        plan: StepPlan,
        batches: list[_MicroBatch],
        payloads: Payloads,
        sums: torch.Tensor,
        clock: Clock,
        gap: SamplerGap | None,
    ) -> None:
        """Forward and backward over this rank's micro-batches, some of which may become several."""
        losses: list[torch.Tensor] = []
        while len(losses) < len(batches):
            share = self._try(plan, batches[len(losses)], payloads, clock, gap)
            if share is None:
                self._halve(plan, batches, len(losses))
            else:
                losses.append(share.loss.detach())
                sums[:-1] += share.sums
        sums[-1] = self._halved
        self._pad_passes(plan, len(batches), payloads, clock)
        with clock.phase("seconds/forward_backward"):
            # Read in one piece, when everything is queued.
            for batch, loss in zip(batches, torch.stack(losses).tolist() if losses else [], strict=True):
                check_finite("loss", loss, plan.step, batch.groups)

    def _try(
        self, plan: StepPlan, batch: _MicroBatch, payloads: Payloads, clock: Clock, gap: SamplerGap | None
    ) -> Share | None:
        """One micro-batch; None where it ran out of memory, half of it may fit, and nothing of it is left behind."""
        with self._within_memory(plan, batch.groups):
            # What later passes have to remember of a batch is not divided; it did fit once.
            if len(batch.groups) == 1 or batch.proximal is not None or self._in_lockstep:
                return self._pass(plan, batch, payloads, clock, gap)
            before = self._gradient.clone()
        try:
            return self._pass(plan, batch, payloads, clock, gap)
        except RuntimeError as error:
            if not ran_out(error):
                raise
        # Not in the handler, which keeps the frames of the pass alive, and their tensors with them.
        self._gradient.copy_(before)
        return None

    def _pass(
        self, plan: StepPlan, batch: _MicroBatch, payloads: Payloads, clock: Clock, gap: SamplerGap | None
    ) -> Share:
        made = self._batch(plan, batch.groups, payloads, clock)
        with clock.phase("seconds/forward_backward"):
            share, logprobs = self._one(plan, made, batch.proximal, batch.place)
            batch.proximal = logprobs if batch.proximal is None else batch.proximal
            if gap is not None:
                gap.add(batch.groups, logprobs, made.behaviour_logprobs, made.mask)
        return share

    def _halve(self, plan: StepPlan, batches: list[_MicroBatch], place: int) -> None:
        """Puts two halves in the place of a micro-batch, and parts in that of later ones that are as large."""
        groups = batches[place].groups
        middle = len(groups) // 2
        halves = [groups[:middle], groups[middle:]]
        self.token_budget = max(map(_tokens, halves))
        self._halved += 1
        logger.warning(
            "step %d: a micro-batch of %d groups, %d tokens, does not fit the device's memory: from here on at most %d "
            "tokens make one",
            *(plan.step, len(groups), _tokens(groups), self.token_budget),
        )
        parts = [*halves, *(part for later in batches[place + 1 :] for part in self._parts(later.groups))]
        unused = 1 + max(batch.place for batch in batches)
        batches[place:] = [_MicroBatch(part, unused + i) for i, part in enumerate(parts)]

    def _parts(self, groups: list[PlannedGroup]) -> list[list[PlannedGroup]]:
        """A micro-batch as those that the device takes."""
        if self.token_budget is None or _tokens(groups) <= self.token_budget:
            return [groups]
        (parts,) = split_micro_batches([_size(group) for group in groups], self.token_budget, 1)
        return [[groups[i] for i in part] for part in parts]

    def _batch(self, plan: StepPlan, planned: Sequence[PlannedGroup], payloads: Payloads, clock: Clock) -> LearnerBatch:
        """A micro-batch's tensors; in lockstep, an error of one rank is met by all before they gather weights."""
        with self._ranks.together() if self._in_lockstep else nullcontext():
            with clock.phase("seconds/fetch"):
                groups = payloads(planned)
            with clock.phase("seconds/forward_backward"):
                batch = collate(self.policy, list(zip(groups, planned, strict=True)), self._cache)
        return batch

    def _pad_passes(self, plan: StepPlan, done: int, payloads: Payloads, clock: Clock) -> None:
        """In lockstep, as many passes more as the busiest rank has: over the step's smallest group, with gradient 0."""
        if not self._in_lockstep:
            return
        most = max(len(self._worth_a_pass(plan, rank)) for rank in range(self._ranks.size))
        smallest = min(plan.groups, key=lambda group: group.prompt_tokens + sum(group.learned_tokens))
        for _ in range(most - done):
            with self._within_memory(plan, [smallest]):
                batch = self._batch(plan, [smallest], payloads, clock)
                with clock.phase("seconds/forward_backward"):
                    logprobs = self._score(batch).logprobs
                    logprobs.backward(torch.zeros_like(logprobs))

    @contextmanager
    def _within_memory(self, plan: StepPlan, planned: Sequence[PlannedGroup]) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not ran_out(error):
                raise
            remedy = "set learner.gradient_checkpointing: true, or lower rollout.group_size or the picture's size"
            if len(planned) > 1:
                remedy = f"set learner.micro_batch_tokens below {_tokens(planned)}"
            reason = (
                f"step {plan.step}: a micro-batch of {len(planned)} groups, {_tokens(planned)} tokens, does not fit "
                f"the device's memory; {remedy}"
            )
            if self._in_lockstep:  # the others wait in a gather, where only a restart of the group reaches them
                raise RuntimeError(reason) from error
            raise LearnerError(reason) from error

    def _one(
        self, plan: StepPlan, batch: LearnerBatch, proximal: torch.Tensor | None, place: int
    ) -> tuple[Share, torch.Tensor]:
        # Offline alone (`Config`); around the backward pass, too, which may compute layers again.
        with dropout_on(self.policy.model) if self._family.is_offline else nullcontext():
            scores = self._score(batch)
            share = micro_batch_share(self._objective, self.cfg, plan.denominator, batch, scores, proximal, place)
            share.loss.backward()
        return share, scores.logprobs.detach()

    def _score(self, batch: LearnerBatch) -> Scores:
        # Where the adapter stays as it is, nothing below the objective's own parameters needs a backward pass.
        with torch.set_grad_enabled(self._family.trains_adapter):
            return score_completions(
                self.policy,
                batch.prompts,
                batch.features,
                batch.completions,
                batch.temperature,
                path=self.path,
                entropy=True,
                entropy_gradient=self.cfg.entropy_bonus > 0,
                hidden=self._objective.needs_hidden,
            )

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
        check_finite("gradient norm", norm, plan.step, plan.groups)
        if norm > self.cfg.max_grad_norm:
            self._gradient.mul_(self.cfg.max_grad_norm / norm)
        return norm

    def _worth_a_pass(self, plan: StepPlan, rank: int) -> list[list[PlannedGroup]]:
        """A rank's micro-batches without the groups whose every gradient is 0."""
        mine = [[plan.groups[i] for i in batch] for batch in plan.micro_batches[rank]]
        if not every_token_counts(self.cfg) and not self._objective.learns_without_signal:
            mine = [[group for group in batch if group.has_signal] for batch in mine]
        return [part for batch in mine if batch for part in self._parts(batch)]


def _size(group: PlannedGroup) -> GroupSize:
    return GroupSize(group.prompt_tokens, len(group.learned), max(group.learned_tokens))


def _tokens(groups: Sequence[PlannedGroup]) -> int:
    """Of one pass, padding included."""
    return padded_tokens([_size(group) for group in groups])
