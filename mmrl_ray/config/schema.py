"""Everything a user writes for one run (`Config`), and what its actors ask Ray for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from pydantic import create_model, model_validator

from mmrl_ray.config.learner import Algorithm, LearnerSection, RolloutSection, registry, section_fields, with_preset
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.sections import (
    ActorResources,
    DataSection,
    DeploySection,
    EvalSection,
    ModelSection,
    ResourcesSection,
    RunSection,
    Section,
    TeacherSection,
    refuse,
)
from mmrl_ray.config.serving import MAX_VLLM_RANK, ServingSection
from mmrl_ray.config.sft import SftSection
from mmrl_ray.config.tracking import TrackingSection

if TYPE_CHECKING:
    from mmrl_ray.algorithms.base import Algorithm as Family


_OLD_SAMPLES = "eval_samples"
"""Of `data:`, in configs and run folders from before `eval.samples`."""


class _Sections(Section):
    run: RunSection
    """Name, seed and place of the run."""
    model: ModelSection
    """The checkpoint and its adapter."""
    data: DataSection
    """The datasets."""
    algorithm: Algorithm = "grpo"
    """A preset: it only names defaults of `learner:` keys, each of which can be written instead."""
    sft: SftSection | None = None
    """A supervised warm start before reinforcement learning; none by default."""
    teacher: TeacherSection | None = None
    """What a student is distilled from; none by default."""
    rollout: RolloutSection = RolloutSection()
    """Sampling and its workers."""
    reward: RewardSection = RewardSection()
    """What a caption earns."""
    eval: EvalSection = EvalSection()
    """Held-out captions: when, how many, and which checkpoint they make the best."""
    learner: LearnerSection
    """Loss, optimiser and steps."""


if TYPE_CHECKING:

    class _WithAgents(_Sections):
        value_based: Any = None

else:
    _WithAgents = create_model(
        "_WithAgents", __base__=_Sections, __module__=__name__, **section_fields("top", optional=True)
    )


class Config(_WithAgents):
    """One run, whole. Keys of `learner:` that are not written take the preset's value."""

    resources: ResourcesSection = ResourcesSection()
    """What the actors ask Ray for."""
    tracking: TrackingSection = TrackingSection()
    """Where figures, pictures and results go while the run runs; `[tensorboard, wandb]` is short for `{to: […]}`."""
    serving: ServingSection | None = None
    """How the policy is served, while it trains or after; the defaults of `mmrl serve` where it is not written."""
    deploy: DeploySection = DeploySection()
    """Where the run's pods get what they need, on Kubernetes."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, value: Any) -> Any:
        return with_preset(_moved_keys(value))

    @property
    def family(self) -> Family:
        """How the run learns."""
        found: Family = registry().family_of_algorithm(self.algorithm, self.learner)
        return found

    @property
    def agent(self) -> Any | None:
        """The section of an algorithm whose samples come from an environment; None of any other run."""
        family = self.family
        return getattr(self, family.section_name or "") if family.samples == "environment" else None

    @property
    def looks_every(self) -> int:
        """Steps from one look at the policy's sight to the next; 0: never."""
        if self.family.samples == "environment":
            return 0
        return self.learner.blind_check.cadence(is_held_out=self.data.eval is not None)

    def is_look_due(self, step: int) -> bool:
        """Whether the policy of so many finished steps is looked at beside the learning."""
        return self.looks_every > 0 and step > 0 and step % self.looks_every == 0

    def wants_captions(self, step: int) -> bool:
        """Whether held-out captions are asked for beside the learning after so many finished steps: a checkpoint."""
        return self.eval.is_due(step) or self.is_look_due(step)

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        family = self.family
        refuse(
            {
                **self._section_problems(),
                **self._teacher_problems(),
                **self._base_problems(),
                **self._adapter_problems(),
                **({} if family.samples == "environment" else self._step_problems()),
                **family.problems(self),
                **self.eval.problems([*self.reward.parts], self.learner.steps, is_held_out=self.data.eval is not None),
                **self.learner.blind_check.problems(
                    is_held_out=self.data.eval is not None, has_workers=family.samples != "environment"
                ),
                "sft.eval_every="
                f"{self.sft and self.sft.eval_every} looks at held-out pictures, and there are none: write data.eval": (
                    self.sft is not None and self.sft.eval_every is not None and self.data.eval is None
                ),
                f"eval.every={self.eval.every} asks rollout workers for captions, and algorithm: {self.algorithm} has "
                "none: it is evaluated before and after; take it away": (
                    self.eval.every is not None and family.samples == "environment"
                ),
                **self._stored_problems("pairs", "data.preferences", "{store: 'sqlite:///preferences.db'}"),
                **self._stored_problems("stored", "data.rollouts", "{run: runs/quickstart}"),
                **({} if family.samples == "environment" else self._normalization_problems()),
            }
        )
        return self

    def _section_problems(self) -> dict[str, bool]:
        """Sections of agents that this is no run of."""
        return {
            f"{name}: is the section of algorithm: {name}, and this is algorithm: {self.algorithm}": (
                getattr(self, name) is not None and self.algorithm != name
            )
            for name in section_fields("top", optional=True)
        }

    def _teacher_problems(self) -> dict[str, bool]:
        """A teacher that is missing, that nobody asks, or that has another kind of path."""
        teacher, wanted, readers = self.teacher, type(self.family).has_teacher, registry().losses_with_teacher()
        return {
            f"learner.loss={self.learner.loss} needs teacher: write its model, as in {{path: org/larger-model}}": (
                wanted and teacher is None
            ),
            f"teacher: is read by learner.loss={readers} alone: take it away, or write algorithm: {readers}": (
                not wanted and teacher is not None
            ),
            "teacher.path is a built-in model, which nothing was taught: name a folder or a hub id": (
                teacher is not None and teacher.path.startswith("builtin:")
            ),
        }

    def _base_problems(self) -> dict[str, bool]:
        """Where a quantised base cannot be, and engines that have no such base or adapter."""
        base, sharding, rollout = self.model.quantization, self.learner.sharding, self.rollout.engine
        served = self.serving.policy.engine if self.serving is not None and self.serving.live_policy else None
        return {
            f"learner.sharding={sharding} splits weights over learners, and those of model.quantization cannot be "
            "split: set learner.sharding: none (a quantised base is small), or take model.quantization away": (
                base is not None and sharding == "fsdp2"
            ),
            "model.quantization is about a language model that learns, and this is an agent's picture encoder: take it "
            "away": base is not None and self.family.samples == "environment",
            **self.model.engine_problems(rollout.kind, rollout.quantization, "rollout.engine"),
            **(
                self.model.engine_problems(served.kind, served.quantization, "serving.policy.engine")
                if served is not None
                else {}
            ),
        }

    def _adapter_problems(self) -> dict[str, bool]:
        """Kinds of adapters that a part of the run cannot have."""
        lora, learner, serving = self.model.lora, self.learner, self.serving
        in_warm_start = self.sft is not None and self.sft.mode == "lora"
        unlike = [f"model.lora.{name}" for name in lora.beyond_pool]
        held = [name for name in ("adapter_l2", "l2_to_pretrained") if getattr(learner, name) > 0]
        return {
            f"model.lora.dropout={lora.dropout:g}: learner.loss={learner.loss} takes ratios to the log-probs that the "
            "sampler drew with, which has no dropout: on the same weights they would not be 1. It is for a warm start "
            "with sft.mode: lora, and for algorithms of pairs or stored rollouts (dpo, ilql): set it to 0": (
                lora.dropout > 0 and not in_warm_start and not self.family.is_offline
            ),
            f"{' and '.join(unlike)}: learner.sharding={learner.sharding} leaves no learner the whole weights that "
            "they are made of: set learner.sharding: none": bool(unlike) and learner.sharding == "fsdp2",
            f"{' and '.join(unlike)}: serving.live_policy serves the run's adapter beside others, whose rows share one "
            "base: set it to false, and serve the merged export (mmrl export --merged)": (
                bool(unlike) and serving is not None and serving.live_policy
            ),
            f"learner.{' and learner.'.join(held)}: model.lora.dora=true trains magnitudes, which do not begin at 0, "
            "and its change of a weight is not s·BA: set it to 0": lora.dora and bool(held),
        }

    def _step_problems(self) -> dict[str, bool]:
        """Of a run whose steps are made of groups."""
        rollout, learner, groups = self.rollout, self.learner, self.learner.groups_per_step
        return {
            f"rollout.buffer_groups={rollout.buffer_groups} is smaller than one step "
            f"(learner.groups_per_step={groups}): the run would wait for ever": (rollout.buffer_groups or groups)
            < groups,
            f"learner.workers={learner.max_workers} is above learner.groups_per_step={groups}: "
            "some learners would never work": groups < learner.max_workers,
            f"rollout.engine.kind={rollout.engine.kind} samples, and this algorithm learns from what others have "
            "sampled: take it away": rollout.engine.kind != "local" and self.family.is_offline,
            f"rollout.engine.start_timeout_s={rollout.engine.start_timeout_s:g} is above resources.placement_timeout_s="
            f"{self.resources.placement_timeout_s:g}, after which a worker that is not ready is replaced: raise that, "
            "too": (
                rollout.engine.kind != "local" and rollout.engine.start_timeout_s > self.resources.placement_timeout_s
            ),
            f"rollout.engine.tensor_parallel_size={rollout.engine.tensor_parallel_size} wants as many GPUs a worker, "
            f"and resources.rollout.gpus={self.resources.rollout.gpus:g}": (
                self.resources.rollout.gpus > 0
                and (rollout.engine.tensor_parallel_size or 1) > max(1, self.resources.rollout.gpus)
            ),
            f"model.lora.r={self.model.lora.r} is above {MAX_VLLM_RANK}, the most that rollout.engine.kind="
            f"{rollout.engine.kind} takes": rollout.engine.kind != "local" and self.model.lora.r > MAX_VLLM_RANK,
            f"rollout.group_size={rollout.group_size} is too small: learner.advantage={learner.advantage} "
            "needs 2 or more": learner.advantage in ("leave_one_out", "group") and rollout.group_size < 2,
            f"rollout.group_size={rollout.group_size} is too small: learner.dynamic_sampling looks for captions of a "
            "group that differ in their rewards": learner.dynamic_sampling and rollout.group_size < 2,
            **self._own_captions_problems(),
        }

    def _own_captions_problems(self) -> dict[str, bool]:
        """Keys about captions that the run samples itself, where it learns from others."""
        learner, source = self.learner, self.family.samples
        written = {
            "dynamic_sampling=true": learner.dynamic_sampling,
            f"overlong.penalty={learner.overlong.penalty:g}": learner.overlong.penalty > 0,
            "mask_truncated=true": learner.mask_truncated,
            f"entropy_bonus={learner.entropy_bonus:g}": learner.entropy_bonus > 0,
        }
        return {
            f"learner.{name} is about captions that the run samples itself, and learner.loss={learner.loss} learns "
            "from others: take it away": on and source != "rollouts"
            for name, on in written.items()
        }

    def _stored_problems(self, source: str, key: str, example: str) -> dict[str, bool]:
        """Data that something has to read, and what reads it."""
        family, readers = self.family, registry().readers_of(source)
        found = getattr(self.data, key.removeprefix("data."))
        said = (
            f"algorithm: {self.algorithm}" if family.samples == "environment" else f"learner.loss={self.learner.loss}"
        )
        where = "its store" if source == "pairs" else "the run whose rollouts it learns from"
        instead = "" if family.samples == "environment" else f", or write algorithm: {readers}"
        return {
            f"{said} needs {key}: write {where}, as in {example}": family.samples == source and found is None,
            f"{key} is read by learner.loss={readers} alone, not by {said}: take it away{instead}": (
                family.samples != source and found is not None
            ),
        }

    def _normalization_problems(self) -> dict[str, bool]:
        """Where parts are normalised by their group, what would undo or contradict it."""
        rollout, learner = self.rollout, self.learner
        on = self.reward.normalize == "group"
        return {
            f"reward.normalize=group needs rollout.group_size of 2 or more, not {rollout.group_size}": on
            and rollout.group_size < 2,
            "reward.normalize=group divides by standard deviations already: set learner.advantage_std to false": on
            and learner.advantage == "group"
            and learner.advantage_std,
            "reward.normalize=group has no place for the greedy caption, which is in no group: choose another "
            "learner.advantage": on and learner.advantage == "greedy",
        }


def _moved_keys(config: Any) -> Any:
    """A config that is not validated yet, its keys under the names that they have today."""
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or _OLD_SAMPLES not in data:
        return config
    data, written = dict(data), config.get("eval") or {}
    samples = data.pop(_OLD_SAMPLES)
    if not isinstance(written, dict):
        return config  # the ordinary validation says what is wrong
    if written.get("samples") not in (None, samples):
        raise ValueError(
            f"data.{_OLD_SAMPLES}={samples} is called eval.samples now, which is {written['samples']} here: write that "
            "alone"
        )
    return {**config, "data": data, "eval": {**written, "samples": samples}}


@dataclass(frozen=True, slots=True)
class Demand:
    """Actors of one kind, all of which ask for the same."""

    kind: str
    """`learner`, `rollout`, …: what a user calls it."""
    count: int
    cpus: float
    gpus: float
    """Of one actor. Below 1 it is a part of one GPU, from 1 on they are whole ones."""
    count_key: str
    """The config key to lower if there is no room for so many."""
    share_key: str
    """And the one for what each asks for."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """A node without them takes none."""

    @property
    def amounts(self) -> str:
        """What one asks for, in words."""
        return f"{self.cpus:g} CPU, {self.gpus:g} GPU{self.where}"

    @property
    def where(self) -> str:
        """The labels in words; nothing for any node."""
        return f" on nodes labelled {label_pairs(self.labels)}" if self.labels else ""

    @property
    def bundle(self) -> dict[str, float]:
        """What one asks for, as Ray has it; without what is 0."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


def demands_of(cfg: Config, *, at_most: bool = False) -> list[Demand]:
    """Everything that a run asks Ray for; what asks for nothing is left out.

    Counts are those that a run cannot begin without, or with `at_most` those that it may grow to.
    """
    resources, serving = cfg.resources, cfg.serving or ServingSection()
    learners = cfg.learner.max_workers if at_most else cfg.learner.min_workers
    rollouts = cfg.rollout.most_workers if at_most else cfg.rollout.first_workers
    found = [
        _demand("learner", learners, resources.learner, "learner.workers", "resources.learner"),
        _demand("rollout", rollouts, resources.rollout, "rollout.workers", "resources.rollout"),
    ]
    if cfg.teacher is not None:
        found.append(_demand("teacher", cfg.teacher.workers, resources.teacher, "teacher.workers", "resources.teacher"))
    if cfg.reward.host == "serve":
        key = "serving.reward.min_replicas"
        found.append(_demand("reward", serving.reward.min_replicas, resources.reward, key, "resources.reward"))
    if serving.live_policy:
        for kind, section in (("gateway", serving.gateway), ("policy", serving.policy)):
            key = f"serving.{kind}"
            found.append(
                _demand(kind, section.min_replicas, section.resources, f"{key}.min_replicas", f"{key}.resources")
            )
    return [demand for demand in found if demand.cpus or demand.gpus or demand.labels]


def cpu_processes(cfg: Config) -> int:
    """Processes of a run that calculate on CPUs: its learners, its first rollout workers, replicas of its servers."""
    resources, serving = cfg.resources, cfg.serving or ServingSection()
    counts = [(cfg.learner.max_workers, resources.learner), (cfg.rollout.first_workers, resources.rollout)]
    if cfg.teacher is not None:
        counts.append((cfg.teacher.workers, resources.teacher))
    if cfg.reward.host == "serve" and resources.reward.cpus:  # one of words works while others wait
        counts.append((serving.reward.min_replicas, resources.reward))
    if serving.live_policy:
        counts.append((serving.policy.min_replicas, serving.policy.resources))
    return sum(count for count, share in counts if not share.gpus)


def torch_threads(cfg: Config, share: ActorResources, cores: int) -> int:
    """Threads of one learner or rollout worker on a node of so many cores.

    From the config and the machine alone, since sums depend on it bit for bit: how many workers there are later on
    does not count. More threads than cores, all in all, wait for each other most of the time.
    """
    if share.threads is not None:
        return share.threads
    return max(1, int(share.cpus), 0 if share.gpus else cores // max(1, cpu_processes(cfg)))


def label_pairs(labels: Mapping[str, str]) -> str:
    """`name=value, …`."""
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def _demand(kind: str, count: int, share: ActorResources, count_key: str, share_key: str) -> Demand:
    return Demand(kind, count, share.cpus, share.gpus, count_key, share_key, share.node_labels)
