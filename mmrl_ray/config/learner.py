"""`learner:` — advantage, loss, aggregation, regularisers, optimiser; each a separate choice."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.base import Section, refuse

Advantage = Literal["none", "batch_mean", "greedy", "leave_one_out", "group"]
Loss = Literal["reward_guided", "clipped", "gspo", "cispo", "dpo", "ilql"]
OFFLINE = ("dpo", "ilql")
"""Losses that learn from what is stored."""
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


class KlSection(Section):
    """KL(policy || policy that RL started from)."""

    weight: float = Field(0.0, ge=0)
    """0 turns it off, and with it the pass that makes reference log-probs."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """k1 enters the reward; k2 and k3 are loss terms (k3's gradient is biased)."""


class DpoSection(Section):
    """Of `loss: dpo` alone (arXiv:2305.18290)."""

    beta: float = Field(0.1, gt=0)
    """How dear it is to leave the policy that training started from; small values let it go far."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a label is wrong, as far as the loss is concerned."""


class IlqlSection(Section):
    """Of `loss: ilql` alone (arXiv:2206.11871): values of next tokens, learnt from the rollouts of another run."""

    beta: float = Field(4.0, ge=0)
    """How much decoding makes of the values: log π + β(Q − V). 0 is π alone; it can be chosen anew when captioning."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount a token; the reward comes with the last one."""
    expectile: float = Field(0.8, gt=0, lt=1)
    """τ: at 0.5 V is the mean of what was said in a state, towards 1 the best of it."""
    conservative: float = Field(0.1, ge=0)
    """α: how much tokens that were not said are pulled down."""
    target_rate: float = Field(0.05, gt=0, le=1)
    """How far the targets follow the learning Qs, an update."""
    bc_weight: float = Field(0.0, ge=0)
    """w: above 0 the adapter learns, too, by the likelihood of the stored tokens and through the values; at 0 the
    policy stays as it is, and the heads read its hidden states."""
    width: int | None = Field(None, ge=1)
    """Of the layer inside each head; twice the model's hidden width by default. A head over the vocabulary has
    width × vocabulary weights, and there are four of them in a learner."""


class LearnerRange(Section):
    """As many learners as there is room for, between the two."""

    min: int = Field(..., ge=1)
    """Below it the run waits for room."""
    max: int = Field(..., ge=1)
    """Above it the run does not grow."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        refuse({f"min={self.min} is above max={self.max}": self.min > self.max})
        return self


class LearnerSection(Section):
    """One optimiser step consumes `groups_per_step` groups."""

    steps: int = Field(..., ge=1)
    """Optimiser steps of the whole run."""
    groups_per_step: int = Field(16, ge=1)
    """Images a step; each brings `rollout.group_size` completions."""
    passes: int = Field(1, ge=1)
    """Optimiser updates over the groups of one step."""
    advantage: Advantage = "group"
    """The baseline: none, the batch's mean, the greedy caption's reward (SCST), leave-one-out, or the group's mean."""
    advantage_std: bool = True
    """Divide `group` advantages by the group's standard deviation."""
    loss: Loss = "clipped"
    """The policy-gradient loss; or `dpo`, which learns from the pairs of `data.preferences` instead of rollouts; or
    `ilql`, which learns values from the stored rollouts of `data.rollouts`."""
    dpo: DpoSection = DpoSection()
    """Of `loss: dpo`."""
    ilql: IlqlSection = IlqlSection()
    """Of `loss: ilql`."""
    clip_low: float = Field(0.2, ge=0)
    """The ratio is clipped below 1 - this."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above 1 + this."""
    off_policy_cap: float = Field(2.0, ge=1)
    """c: the detached ratio to the behaviour policy is capped here."""
    aggregation: Aggregation = "token_mean"
    """One number from token losses: ÷ tokens, mean of means, sums ÷ completions, or ÷ completions × maximum length."""
    kl: KlSection = KlSection()
    """The pull back to the policy that RL started from."""
    adapter_l2: float = Field(0.0, ge=0)
    """beta of docs/equations.md 7."""
    l2_to_pretrained: float = Field(0.0, ge=0)
    """lambda of docs/equations.md 4."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    lr_min: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up before the cosine."""
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False)
    """AdamW's two decay rates."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    max_sampler_gap: float | None = Field(None, ge=0)
    """Largest |log(π_learner ÷ π_sampler)| in nats that a token may have which this very version sampled; the mean may
    be a tenth of it. Beyond, sampler and learner do not compute one policy, and the run stops. By default 0.01 in
    float32 and 2 in bfloat16; 0: only measured (`sampler_gap/…`)."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Prompt and completion tokens one forward and backward pass holds at most."""
    gradient_checkpointing: bool = False
    """Make activations again in the backward pass instead of keeping them: less memory, one more forward pass."""
    importance_every: int = Field(10, ge=0)
    """Steps between two looks at how much of one caption hangs on picture and prompt (`importance/…`); 0: never."""
    workers: Annotated[int, Field(ge=1)] | LearnerRange = 1
    """Learner workers (Ray Train): a number, or `{min, max}` to follow what the cluster has room for."""
    sharding: Literal["none", "fsdp2"] = "none"
    """none: each learner holds the whole base; fsdp2: the frozen layers are split over the learners."""
    max_failures: int = Field(3, ge=0)
    """Restarts of the learner group from the newest valid checkpoint."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""

    @property
    def min_workers(self) -> int:
        """With fewer learners the run does not start."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        """Never more learners than these."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def trains_adapter(self) -> bool:
        """Whether the adapter's weights move."""
        return self.loss != "ilql" or self.ilql.bc_weight > 0

    @property
    def wants_packed_rows(self) -> bool:
        """Whether layers are called once a pass, without a cache of the prompt."""
        return self.gradient_checkpointing or self.sharding != "none"

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        refuse(
            {
                f"warmup_steps={self.warmup_steps} must be below steps={self.steps}": self.warmup_steps >= self.steps,
                f"lr_min={self.lr_min} is above lr={self.lr}": self.lr_min > self.lr,
                f"advantage={self.advantage} has no meaning with loss={self.loss}: write advantage: none": (
                    self.loss in OFFLINE and self.advantage != "none"
                ),
                f"kl.weight={self.kl.weight:g} is refused with loss=dpo, which has its own pull, dpo.beta: leave it at "
                "0": self.loss == "dpo" and self.kl.weight > 0,
                f"kl.weight={self.kl.weight:g} is refused with loss=ilql, which samples nothing: leave it at 0": (
                    self.loss == "ilql" and self.kl.weight > 0
                ),
                f"sharding={self.sharding} is refused with loss=ilql: its heads are not split": self.loss == "ilql"
                and self.sharding != "none",
                "adapter_l2 and l2_to_pretrained have nothing to hold where ilql.bc_weight=0 leaves the adapter as it "
                "is: leave them at 0": not self.trains_adapter and self.adapter_l2 + self.l2_to_pretrained > 0,
            }
        )
        return self
