"""`rollout:` and `learner:` — how completions are sampled and learned from; and the names that `algorithm:` takes.

Advantage, loss, aggregation, regularisers and optimiser are each a separate choice; an algorithm's name stands for
defaults of these keys. The algorithms are in a higher layer (`algorithms/registry.py`), which is imported by name when
a config is read, as a user's own class is.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

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


_RESERVED = {
    "model": "it is model.path",
    "tokenizer": "it is the model's",
    "revision": "it is model.revision",
    "trust_remote_code": "code of a checkpoint is never run",
    "logprobs_mode": "log-probs are those of the distribution that is sampled from",
    "enable_lora": "the adapter is the policy",
    "max_lora_rank": "it is model.lora.r",
    "worker_extension_cls": "adapters come in memory",
    "limit_mm_per_prompt": "pictures are the prompt's",
    "mm_processor_kwargs": "it is model.processor",
    "generation_config": "a checkpoint's own temperature and filters are not the policy's",
    "speculative_config": "drafts change what is sampled from",
    "logits_processors": "they change what is sampled from",
    "disable_log_stats": "its counters are among the run's metrics",
    "distributed_executor_backend": "the parts of a model are processes beside the worker, and end with it",
    "data_parallel_size": "rollout.workers has more engines",
}
"""vLLM's arguments that are not a user's, and why."""
_VLLM_ALONE = (
    *("python", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "max_num_seqs", "enforce_eager"),
    "args",
)
_TOLD = ("dtype", "quantization")
"""Arguments of vLLM's, or what a server's are."""
_OPENAI_ALONE = ("url", "adapters", "model", "api_key_env")
_NEEDED = {"url": "of a vLLM server", "adapters": "a folder that the server and the rollout workers see"}


def _url_problems(url: str) -> dict[str, bool]:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return {"engine.url is no URL: write http://host:port": True}
    return {
        f"engine.url={url}: write http://host:port or https://host": not usable and "@" not in url,
        "engine.url holds a user or a password, and a config is written into the run's folder: name the environment "
        "variable of a key in engine.api_key_env": "@" in url or bool(parts.query),
    }


class EngineSection(Section):
    """What samples. Whatever it is, the worker's own model scores: reference log-probs, states."""

    kind: Literal["local", "vllm", "openai"] = "local"
    """`local`: the worker itself, exact, and the same bit for bit each time. `vllm`: vLLM in a process beside the
    worker, for GPUs; without value heads, and a resumed run does not sample the same tokens again. `openai`: the same
    on a vLLM server that somebody else runs."""
    python: str | None = None
    """With `vllm`: an interpreter that has it; by default the one that `mmrl engine install vllm` has made."""
    tensor_parallel_size: int | None = Field(None, ge=1)
    """vLLM's argument, as those below: GPUs that share the model; as many as `resources.rollout.gpus`. On CPUs, as many
    processes."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory (or a CPU's machine's) that it takes; the worker's own model lies beside it. On CPUs, by
    default, it has room for keys and values of an assignment instead, of 1 GiB at most (`args.kv_cache_memory_bytes`).
    """
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The worker's own by default; another makes log-probs of another policy. With `openai`: the one that the server
    was started with."""
    quantization: str | None = None
    """None by default. With `openai`: the one that the server was started with."""
    max_model_len: int | None = Field(None, ge=1)
    """Tokens of a prompt and its completion; the model's context by default, on CPUs as far as 1 GiB goes."""
    max_num_seqs: int | None = Field(None, ge=1)
    """Completions at a time; on CPUs those of an assignment by default."""
    enforce_eager: bool | None = None
    """Without compiling and CUDA graphs: it starts in seconds, and samples slower on a GPU."""
    start_timeout_s: float = Field(240.0, gt=0)
    """An engine that has not loaded and compiled the model by then, or a server that does not answer, is an error."""
    args: dict[str, Any] = {}
    """Further arguments of vLLM's `EngineArgs`, by its names for them; one that it does not know is refused."""
    url: str | None = None
    """With `openai`: of the server, with or without `/v1`."""
    adapters: str | None = None
    """With `openai`: a folder that rollout workers write versions of the adapter to and the server reads them from,
    under the same path. What a run leaves there at its end may be deleted."""
    model: str | None = None
    """With `openai`: the server's name for the model without adapter; by default the first that it serves."""
    api_key_env: str | None = None
    """With `openai`: the environment variable that holds the server's key, where rollout workers run."""

    @property
    def told(self) -> str | None:
        """What a run should know of it before it begins."""
        if self.kind == "local":
            return None
        return (
            "vLLM samples: a resumed run goes on with other tokens than it would have sampled, each group by the "
            "version that its step says; value heads do not decode"
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """vLLM's, those that are written."""
        named = {name: getattr(self, name) for name in (*_VLLM_ALONE, *_TOLD) if name not in ("python", "args")}
        return {**{name: value for name, value in named.items() if value is not None}, **self.args}

    def itemsize(self, own: int) -> int:
        """Bytes of a number of vLLM's, where one of the worker's has `own`."""
        return own if self.dtype is None else {"float32": 4}.get(self.dtype, 2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        keys = {"vllm": (*_VLLM_ALONE, *_TOLD), "openai": (*_OPENAI_ALONE, *_TOLD)}
        own = keys.get(self.kind, ())
        refuse(
            {
                **{
                    f"{', '.join(others)}: keys of engine.kind={kind}, and this is kind={self.kind}": bool(others)
                    for kind, names in keys.items()
                    if (others := [n for n in names if n not in own and getattr(self, n) not in (None, {})])
                },
                **{f"args.{name} is not yours to choose: {why}": name in self.args for name, why in _RESERVED.items()},
                **{f"args.{name}: write it as engine.{name}": name in self.args for name in (*_VLLM_ALONE, *_TOLD)},
                **{
                    f"engine.kind=openai needs {name}: {what}": self.kind == "openai" and getattr(self, name) is None
                    for name, what in _NEEDED.items()
                },
                **(_url_problems(self.url) if self.url is not None else {}),
            }
        )
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
