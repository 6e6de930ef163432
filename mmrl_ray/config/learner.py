"""`learner:` — advantage, loss, aggregation, regularisers, optimiser; each a separate choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)

from mmrl_ray.config.presets import Loss, registry, section_fields
from mmrl_ray.config.sections import Section, refuse

if TYPE_CHECKING:
    from mmrl_ray.algorithms.base import Algorithm

Advantage = Literal["none", "batch_mean", "greedy", "leave_one_out", "group"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


class KlSection(Section):
    """KL(policy || policy that RL started from)."""

    weight: float = Field(0.0, ge=0)
    """0 turns it off, and with it the pass that makes reference log-probs."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """k1 enters the reward; k2 and k3 are loss terms (k3's gradient is biased)."""


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


class _Choices(Section):
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
    """What is minimised; it also says where the groups come from: most sample them, some learn from `data.preferences`
    or `data.rollouts`."""


if TYPE_CHECKING:
    _Sections = _Choices
else:
    _Sections = create_model("_Sections", __base__=_Choices, __module__=__name__, **section_fields("learner"))


class LearnerSection(_Sections):
    """One optimiser step consumes `groups_per_step` groups."""

    own: dict[str, Any] = {}
    """Keys of an algorithm of your own, `algorithm: my_module:MyAlgorithm`, which says what they may be."""
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
    def family(self) -> Algorithm:
        """The algorithm that `loss` belongs to."""
        made: Algorithm = registry().family_of_loss(self.loss)(self)
        return made

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
                    self.family.is_offline and self.advantage != "none"
                ),
                **self.family.learner_problems(),
                **self._own_problems(),
            }
        )
        return self

    def _own_problems(self) -> dict[str, bool]:
        """Of the keys of a user's own algorithm, which this file does not know."""
        family = self.family
        if type(family).section_name in type(self).model_fields or not registry().is_path(self.loss):
            return {f"own={self.own} is read by an algorithm of your own alone: take it away": bool(self.own)}
        try:
            type(family).section.model_validate(self.own)
        except ValidationError as error:
            return {f"own.{'.'.join(map(str, e['loc']))}: {e['msg']}": True for e in error.errors()}
        return {}

    @model_serializer(mode="wrap")
    def _without_sections_of_others(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A resolved config shows keys that something reads."""
        written: dict[str, Any] = handler(self)
        for family in registry().sections("learner"):
            name = family.section_name
            is_default = getattr(self, name) == family.section()
            if self.loss not in family.losses and is_default and not family.written_always:
                written.pop(name, None)
        if not self.own:
            written.pop("own", None)
        return written
