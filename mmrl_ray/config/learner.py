"""`rollout:` and `learner:` — how completions are sampled and learned from; and the names that `algorithm:` takes.

Advantage, loss, aggregation, regularisers and optimiser are each a separate choice; an algorithm's name stands for
defaults of these keys. The algorithms are in a higher layer (`algorithms/registry.py`), which is imported by name when
a config is read, as a user's own class is.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mmrl_ray.config.blind import BlindCheckSection
from mmrl_ray.config.engine import EngineSection
from mmrl_ray.config.sections import Section, refuse
from mmrl_ray.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from mmrl_ray.algorithms.base import Algorithm as Family

Advantage = Literal["none", "batch_mean", "greedy", "leave_one_out", "group"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


MICRO_BATCH_TOKENS = 16384
"""Where `learner.micro_batch_tokens` is not set."""


def registry() -> ModuleType:
    """`mmrl_ray.algorithms.registry`."""
    return importlib.import_module("mmrl_ray.algorithms.registry")


def _one_of(names: tuple[str, ...], value: Any) -> Any:
    """A name among these, or a class of the user's own that is there."""
    found = registry()
    if isinstance(value, str) and found.is_path(value):
        try:
            found.own_class(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    elif isinstance(value, str) and "." in value:
        module, _, name = value.rpartition(".")
        raise ValueError(f"{value!r} is no algorithm's name; a class of your own is module:Class: {module}:{name}?")
    elif value not in names:
        quoted = [f"'{name}'" for name in names]
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": f"{', '.join(quoted[:-1])} or {quoted[-1]}"}
        )
    return value


def _schema(names: tuple[str, ...]) -> dict[str, Any]:
    return {"anyOf": [{"enum": list(names), "type": "string"}, {"pattern": "^[\\w.]+:\\w+$", "type": "string"}]}


_ALGORITHMS: tuple[str, ...] = registry().ALGORITHMS
_LOSSES: tuple[str, ...] = registry().LOSSES

if TYPE_CHECKING:
    Algorithm = str
    Loss = str
else:
    Algorithm = Annotated[
        str, BeforeValidator(lambda value: _one_of(_ALGORITHMS, value)), WithJsonSchema(_schema(_ALGORITHMS))
    ]
    Loss = Annotated[str, BeforeValidator(lambda value: _one_of(_LOSSES, value)), WithJsonSchema(_schema(_LOSSES))]


def section_fields(place: str, *, optional: bool = False) -> dict[str, Any]:
    """Fields for `create_model`: the sections of algorithms that stand at that place of a config."""
    found: dict[str, Any] = {}
    for family in registry().sections(place):
        kind: type[Section] = family.section
        name = family.section_name
        told = f"Of `loss: {family.losses[0]}`." if family.losses else f"The agent of `algorithm: {name}`."
        found[name] = (
            (kind | None, Field(None, description=told)) if optional else (kind, Field(kind(), description=told))
        )
    return found


def with_defaults(written: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`written` over `defaults`, section by section: writing `kl.estimator` leaves the preset's `kl.weight` alone."""
    merged: dict[str, Any] = {**defaults}
    for key, value in written.items():
        nested = isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
        merged[key] = with_defaults(value, defaults[key]) if nested else value
    return merged


_RESOLVED = {
    "passes",
    "advantage",
    "loss",
    "aggregation",
    "off_policy_cap",
    "betas",
    "max_failures",
    "keep_checkpoints",
}
"""All of them are written in a resolved config alone."""


def with_preset(config: Any) -> Any:
    """A config that is not validated yet, the defaults of its preset written into its `learner:`."""
    if not isinstance(config, dict) or not isinstance(config.get("learner"), dict):
        return config  # the ordinary validation says what is wrong
    algorithm = config.get("algorithm", "grpo")
    try:
        preset = registry().preset_of(algorithm) if isinstance(algorithm, str) else None
    except ConfigError:
        return config  # and here
    # A resolved config has every key of the version that wrote it: what a preset has gained since is not the run's.
    if preset is None or config["learner"].keys() >= _RESOLVED:
        return config
    return {**config, "learner": with_defaults(config["learner"], preset)}


class WorkersRange(Section):
    """Workers that come and go: rollout workers with what there is to do, learners with the room there is for them."""

    min: int = Field(..., ge=1)
    """Workers at least: a run begins with so many rollout workers, and waits for room for so many learners."""
    max: int = Field(..., ge=1)
    """Workers at most."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        refuse({f"min={self.min} is above max={self.max}": self.min > self.max})
        return self


class RolloutSection(Section):
    """How completions are drawn, and by how many workers."""

    engine: EngineSection = EngineSection()
    """What draws them."""
    group_size: int = Field(8, ge=1, le=1024)
    """G, completions an image."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Sampling temperature; the policy that learns is the softmax at this temperature."""
    max_new_tokens: int = Field(32, ge=1)
    """Completion tokens at most."""
    top_k: int = 0
    """Refused unless 0: a filter would make the recorded log-probs belong to another distribution."""
    top_p: float = 1.0
    """Refused unless 1."""
    min_new_tokens: int = 0
    """Refused unless 0."""
    max_staleness: int = Field(0, ge=0)
    """Policy versions a group may lag behind when the learner consumes it; 0 is strictly on-policy."""
    workers: Annotated[int, Field(ge=1)] | WorkersRange = 1
    """Rollout worker actors: a number, or `{min, max}` to have the run add and retire them itself, by what the learner
    waits for them and they for it. `mmrl scale` changes them while a run goes on."""
    min_workers: int = Field(1, ge=1)
    """Below so many healthy workers for `worker_deadline_s` the run stops."""
    groups_per_assignment: int = Field(8, ge=1)
    """Groups that one worker decodes together: fixed by the step, never by how many workers there are."""
    buffer_groups: int | None = Field(None, ge=1)
    """Scored groups the controller holds at most; by default what `max_staleness` can use."""
    assignment_timeout_s: float = Field(300.0, gt=0)
    """A worker that has not handed an assignment back by then is replaced."""
    worker_deadline_s: float = Field(60.0, gt=0)
    """How long the pool may stay below `min_workers` before the run stops."""
    vision_cache_mb: int = Field(256, ge=0)
    """Bytes of vision features a process keeps; none from one assignment or step to the next where learners and workers
    take turns on a GPU (`resources.placement: shared`)."""
    ship_vision_mb: int = Field(64, ge=0)
    """Vision features of one assignment travel to the learner up to this size; beyond it they are made again."""

    @property
    def first_workers(self) -> int:
        """Workers that a run begins with."""
        return self.workers.min if isinstance(self.workers, WorkersRange) else self.workers

    @property
    def most_workers(self) -> int:
        """Workers that a run has at most, unless it is told otherwise while it goes on."""
        return self.workers.max if isinstance(self.workers, WorkersRange) else self.workers

    @model_validator(mode="after")
    def _no_filters(self) -> Self:
        problems = {
            f"{name}={getattr(self, name)} is refused in training rollouts: the recorded log-probs would "
            f"belong to another distribution than the policy that learns; leave it at {neutral}": getattr(self, name)
            != neutral
            for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_new_tokens", 0))
        }
        refuse(
            {
                **problems,
                f"temperature={self.temperature:g} is above 2, the most that engine.kind={self.engine.kind} takes": (
                    self.engine.kind != "local" and self.temperature > 2
                ),
                f"min_workers={self.min_workers} is above workers={self.first_workers}": (
                    self.min_workers > self.first_workers
                ),
            }
        )
        return self


class KlSection(Section):
    """KL(policy || policy that RL started from)."""

    weight: float = Field(0.0, ge=0)
    """0 turns it off, and with it the pass that makes reference log-probs."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """k1 enters the reward; k2 and k3 are loss terms (k3's gradient is biased)."""


class OverlongSection(Section):
    """What a caption loses that comes near `rollout.max_new_tokens` (DAPO, arXiv:2503.14476)."""

    penalty: float = Field(0.0, ge=0)
    """Taken off the reward of a caption that is as long as may be; 0 turns it off."""
    buffer: float = Field(0.2, gt=0, le=1)
    """The last share of `rollout.max_new_tokens`, over which the penalty grows from 0."""


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
    entropy_bonus: float = Field(0.0, ge=0)
    """Weight of the policy's entropy, which the loss is lowered by: over the whole vocabulary, at each token."""
    dynamic_sampling: bool = False
    """Go on sampling until `groups_per_step` groups have captions of different rewards, and learn from those alone."""
    max_oversampling: float = Field(4.0, ge=1)
    """With `dynamic_sampling`: groups that are sampled for a step at most, ÷ `groups_per_step`. The step is then filled
    up with the first groups of equal rewards (event `dynamic_sampling_bound`)."""
    overlong: OverlongSection = OverlongSection()
    """A penalty on captions that are nearly too long."""
    mask_truncated: bool = False
    """Learn nothing from the tokens of captions that ran into `rollout.max_new_tokens`; their rewards stay part of the
    baselines."""
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
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Prompt and completion tokens one forward and backward pass holds at most. By default 16,384, and on a GPU fewer
    where its free memory says so. A pass that runs out of memory is halved, here and in all later steps."""
    gradient_checkpointing: bool = False
    """Make activations again in the backward pass instead of keeping them: less memory, one more forward pass."""
    importance_every: int = Field(10, ge=0)
    """Steps between two looks at how much of one caption hangs on picture and prompt (`importance/…`); 0: never."""
    blind_check: BlindCheckSection = BlindCheckSection()
    """Looks at whether the policy looks at its pictures (`blind/…`), where there are held-out captions."""
    workers: Annotated[int, Field(ge=1)] | WorkersRange = 1
    """Learner workers (Ray Train): a number, or `{min, max}` to follow what the cluster has room for."""
    sharding: Literal["none", "fsdp2"] = "none"
    """none: each learner holds the whole base; fsdp2: the frozen layers are split over the learners, and each reads its
    part alone."""
    max_failures: int = Field(3, ge=0)
    """Restarts of the learner group from the newest valid checkpoint."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""

    @property
    def token_budget(self) -> int:
        """Tokens of a pass at most, before anybody has looked at a device."""
        return self.micro_batch_tokens or MICRO_BATCH_TOKENS

    @property
    def min_workers(self) -> int:
        """With fewer learners the run does not start."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        """Never more learners than these."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def family(self) -> Family:
        """The algorithm that `loss` belongs to."""
        made: Family = registry().family_of_loss(self.loss)(self)
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
