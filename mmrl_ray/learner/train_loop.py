"""What Ray Train runs on each learner: pull a plan, take the step, publish the weights, now and then a checkpoint.

    start    load policy and adapter; newest valid checkpoint of the run folder, or none
             rank 0: controller.restore(…) and publish(version), or rewind(0)
    step s   plan(s) ─▶ LearnerStep.run ─▶ rank 0: publish(s + 1) ─▶ finish_step(s, metrics) ─▶ checkpoint(s + 1)?
    end      rank 0: a last checkpoint, and `adapter/` when every step was taken or held-out captions get no better

The steps of `eval.every` are checkpoints, too, of which the best stays: the driver makes `adapter/` of it at the end.

A restarted group comes back here and starts over from the newest checkpoint, and the controller goes back with it.

Errors of two kinds leave this loop. One of the project's own (a NaN, a full disk) would come again, so it is *returned*
as part of the outcome, after all ranks have agreed on it, and Ray Train sees a run that ended. Anything else (a dead
process, a lost node) is raised, and Ray Train restarts the group.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch

from mmrl_ray.config.schema import torch_threads
from mmrl_ray.errors import CheckpointError, MMRLError, RolloutError
from mmrl_ray.experience.carriers import PlannedGroup, RolloutGroup, StepPlan, derive_seed
from mmrl_ray.experience.plan import GroupSize
from mmrl_ray.learner.checkpoints import (
    load_checkpoint,
    save_adapter_folder,
    save_checkpoint,
    save_live_version,
)
from mmrl_ray.learner.job import LearnerJob, LearnerOutcome
from mmrl_ray.learner.objective import ImportanceWatch
from mmrl_ray.learner.ranks import Ranks, learner_mesh, shard_layers, split_layer
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.policy.heads import published
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_state, add_run_adapter
from mmrl_ray.policy.memory import fitting_tokens, free_memory, model_shape
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.packed import checkpoint_layers
from mmrl_ray.policy.scoring.prefix import ScorePath
from mmrl_ray.policy.vision import VisionCache, give_back
from mmrl_ray.rollouts.types import Stop
from mmrl_ray.run_records.checkpoint_choice import kept_for_evaluation, newest_valid_checkpoint, steps_to_judge
from mmrl_ray.run_records.run_dir import ADAPTER_FOLDER, LIVE_FOLDER
from mmrl_ray.run_records.step_log import note_event
from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.logs import CONTEXT, start_logging
from mmrl_ray.telemetry.meter import Meter
from mmrl_ray.telemetry.ray_meter import RayMeter

logger = logging.getLogger(__name__)

_MB = 2**20


def train_loop(arguments: dict[str, Any]) -> LearnerOutcome:
    """The function that `TorchTrainer` runs on each worker, with `{"job": LearnerJob}`."""
    job: LearnerJob = arguments["job"]
    torch.set_num_threads(torch_threads(job.cfg, job.cfg.resources.learner, os.cpu_count() or 1))
    run, rank = job.cfg.run, Ranks().rank
    start_logging(run.log_format, run=run.name, role=f"learner-{rank}", rank=rank)
    try:
        learner = _Learner(job, ray.train.torch.get_device(), RayMeter(run=run.name, rank=str(rank)))
    except MMRLError as error:
        return LearnerOutcome(0, finished=False, reason=str(error), error=error)
    return learner.run()


class _Learner:
    """One rank's life. Whatever only rank 0 does, the others learn how it went."""

    def __init__(self, job: LearnerJob, device: torch.device, meter: Meter | None = None) -> None:
        self._cfg, self._run, self._controller = job.cfg, job.run, job.controller
        self._ranks = Ranks()
        self._meter = meter or Meter(run=job.cfg.run.name, rank=str(self._ranks.rank))
        self._step = 0
        self._saved: int | None = None
        self._path_chosen = False
        self._late_seconds: dict[str, float] = {}
        cfg = job.cfg
        self._serves_live = cfg.serving is not None and cfg.serving.live_policy
        # One learner has nothing to split.
        sharded = cfg.learner.sharding == "fsdp2" and self._ranks.size > 1
        mesh = learner_mesh(device) if sharded else None
        seed = derive_seed(cfg.run.seed, "value_heads")
        with self._ranks.together():  # a file may be missing on one node alone
            split = partial(split_layer, mesh=mesh) if mesh is not None else None
            self._policy = load_policy(cfg.model, device=device, split=split)
            # Before the adapter is on it.
            chooses = cfg.learner.micro_batch_tokens is None and free_memory(device) is not None
            self._shape = model_shape(self._policy.hf_model, cfg.model.lora, self._policy.dtype) if chooses else None
            add_run_adapter(self._policy, cfg)
            cfg.learner.family.prepare(self._policy, seed)
            if mesh is not None:
                shard_layers(self._policy, device, mesh)
        if cfg.learner.gradient_checkpointing:
            checkpoint_layers(self._policy)
        self._cache = VisionCache(0 if self._policy.vision_trainable else cfg.rollout.vision_cache_mb * _MB)
        self._in_lockstep = sharded
        self._importance = ImportanceWatch(self._policy, self._cache, cfg.learner.importance_every, alone=not sharded)
        self._learner = LearnerStep(
            self._policy, cfg.learner, vision_cache=self._cache, ranks=self._ranks, in_lockstep=sharded, seed=seed
        )

    def run(self) -> LearnerOutcome:
        """Until all steps are taken, the controller says stop, or an error of the project ends it on any rank."""
        steps, reason, early = self._cfg.learner.steps, "all steps were taken", False
        try:
            self._restore()
            while self._step < steps:
                plan = self._next_plan()
                if isinstance(plan, Stop):
                    reason, early = plan.reason, plan.early
                    break
                self._take(plan)
            finished = early or self._step == steps
            self._on_first(lambda: self._end(finished))
        except MMRLError as error:
            return LearnerOutcome(self._step, finished=False, reason=str(error), error=error)
        return LearnerOutcome(self._step, finished=finished, reason=reason)

    def _restore(self) -> None:
        """Every rank to the newest checkpoint, or to the beginning; then the controller too."""
        found: list[int | None] = [None]

        def find() -> None:
            if not isinstance(self._cfg.learner.workers, int):
                note_event(self._run, "learners", count=self._ranks.size)
            found[0] = newest_valid_checkpoint(self._run)
            self._run.delete(LIVE_FOLDER)  # versions beyond that checkpoint are going to be made anew

        self._on_first(find)
        step = self._ranks.from_first(found[0])
        earlier: dict[int, dict[str, torch.Tensor]] = {}
        if step is not None and (self._cfg.eval.every is not None or self._cfg.looks_every):
            self._on_first(lambda: earlier.update(self._unjudged(step)))
        with self._ranks.together():
            if step is not None:
                checkpoint = load_checkpoint(self._run, step, self._policy)
                self._learner.restore(checkpoint.learner)
        if step is None:
            # Nothing to publish: version 0 is the adapter as every worker makes it.
            self._on_first(lambda: self._controller.rewind(0))
            return
        self._step = self._saved = step

        def back_to_checkpoint() -> None:
            self._controller.restore(checkpoint.controller)
            for version, weights in earlier.items():
                self._controller.evaluate(version, weights)
            self._controller.publish(step, self._weights(step))

        self._on_first(back_to_checkpoint)

    def _unjudged(self, before: int) -> dict[int, dict[str, torch.Tensor]]:
        """The weights of checkpoints that the run was to be evaluated at, and ended before it was."""
        found = {}
        for step in steps_to_judge(self._run, self._cfg, before):
            if step < before:
                try:
                    load_checkpoint(self._run, step, self._policy)
                except CheckpointError as error:
                    logger.warning("step %d stays without its evaluation: %s", step, error)
                else:
                    found[step] = {name: tensor.clone() for name, tensor in self._weights(step).items()}
        return found

    def _next_plan(self) -> StepPlan | Stop:
        """The step's plan, the same on all ranks; or that there is none, if any rank was told so."""
        answer: StepPlan | Stop | None = None
        error: MMRLError | None = None
        try:
            answer = self._controller.next_plan(self._step, self._ranks.size)
            if isinstance(answer, Stop) and answer.failed:
                error = self._controller.failure() or RolloutError(answer.reason)
        except MMRLError as failed:
            error = failed
        plan = answer if isinstance(answer, StepPlan) else None
        if not self._ranks.any(plan is None) and plan is not None:
            return plan
        self._ranks.raise_first(error)
        return self._ranks.from_first(answer if isinstance(answer, Stop) else Stop("another learner was told to stop"))

    def _take(self, plan: StepPlan) -> None:
        if not self._path_chosen:
            self._choose_path(plan)
            self._choose_budget(plan)
        CONTEXT.put(step=plan.step)
        importance = self._measure_importance(plan)
        metrics = self._learner.run(plan, self._fetch)
        if self._cfg.resources.takes_turns:  # before workers get the new version, and sample
            give_back(self._policy.device, self._cache)
        export_learner_metrics(self._meter, plan, self._ranks.rank, metrics)
        if halved := metrics.get("micro_batches/halved"):
            told = {"step": plan.step, "halved": int(halved), "tokens": self._learner.token_budget}
            self._on_first(lambda: note_event(self._run, "out_of_memory", **told))

        def publish() -> None:
            start = time.perf_counter()
            self._controller.publish(plan.step + 1, self._weights(plan.step + 1))
            if self._serves_live:
                save_live_version(self._run, self._policy, plan.step + 1)
            seconds = {**self._late_seconds, "seconds/publish": time.perf_counter() - start}
            self._controller.finish_step(plan.step, {**metrics, **importance, **seconds})

        self._on_first(publish)
        self._step = plan.step + 1
        self._late_seconds = {}
        if self._step % self._cfg.learner.checkpoint_every == 0 or self._cfg.wants_captions(self._step):
            self._on_first(self._save)

    def _weights(self, version: int) -> dict[str, torch.Tensor]:
        """What workers load. Value heads go with the versions alone that are evaluated, the only ones they decode."""
        heads = self._policy.value_heads.get(None)
        decoded = version == self._cfg.learner.steps or self._cfg.wants_captions(version)
        return {**adapter_state(self._policy.model), **(published(heads) if heads is not None and decoded else {})}

    def _measure_importance(self, plan: StepPlan) -> dict[str, float]:
        """Rank 0's affair, unless a pass needs every rank's share of the weights."""
        found: dict[str, float] = {}

        def measure() -> None:
            found.update(self._importance.measure(lambda: self._fetch(plan.groups[:1])[0]))

        if self._importance.is_due(plan.step):
            if self._in_lockstep:
                measure()
            else:
                self._on_first(measure)
        return found

    def _save(self) -> None:
        start = time.perf_counter()
        save_checkpoint(
            self._run,
            self._step,
            policy=self._policy,
            learner=self._learner.state(),
            controller=self._controller.checkpoint_state(self._step),
            keep=self._cfg.learner.keep_checkpoints,
            also=kept_for_evaluation(self._run, self._cfg),
        )
        self._saved = self._step
        # The step's own line is written already: the time shows up in the next one's.
        seconds = time.perf_counter() - start
        self._late_seconds = {"seconds/checkpoint": seconds}
        export_checkpoint_metrics(self._meter, seconds)
        logger.info("checkpoint of %d finished steps written in %.1f s", self._step, seconds)

    def _end(self, finished: bool) -> None:
        if self._step > 0 and self._saved != self._step:
            self._save()
        if finished:
            save_adapter_folder(self._run, ADAPTER_FOLDER, self._policy, self._step)

    def _choose_path(self, plan: StepPlan) -> None:
        """The start-up comparison, on a real prompt; rank 0's finding holds for all.

        Raises:
            ModelError: the model's own forward and this project's do not agree.
        """
        (group,) = self._fetch(plan.groups[:1])
        wanted: ScorePath = "packed" if self._cfg.learner.wants_packed_rows else "shared_prefix"
        with self._ranks.together():
            prompts = encode_prompts(self._policy, [group.sample])
            choice = choose_path(self._policy, prompts, temperature=self._cfg.rollout.temperature, wanted=wanted)
        self._learner.path = self._ranks.from_first(choice.path)
        self._path_chosen = True
        if self._ranks.rank == 0:
            level = logging.INFO if choice.path == wanted else logging.WARNING
            size = self._cfg.rollout.group_size
            dearer = f", which runs every prompt {size} times instead of once" if choice.path == "naive" else ""
            logger.log(level, "learner scores completions by the %s path%s: %s", choice.path, dearer, choice.reason)
            note_event(self._run, "learner_path", path=choice.path, reason=choice.reason)

    def _choose_budget(self, plan: StepPlan) -> None:
        """How many tokens the GPU takes at once, where the config does not say: the same on all ranks."""
        if self._shape is None:
            return
        give_back(self._policy.device, self._cache)
        moments = 2 * 4 * self._shape.adapter_parameters  # AdamW makes them in the first step
        free = (free_memory(self._policy.device) or 0) - moments
        largest = max(plan.groups, key=lambda group: group.prompt_tokens)
        size = GroupSize(largest.prompt_tokens, len(largest.learned), self._cfg.rollout.max_new_tokens)
        packed, checkpointed = self._learner.path == "packed", self._cfg.learner.gradient_checkpointing
        tokens = fitting_tokens(self._shape, free, size, packed=packed, checkpointed=checkpointed)
        self._learner.token_budget = self._ranks.least(min(tokens, self._cfg.learner.token_budget))
        if self._ranks.rank == 0:
            logger.info(
                "micro-batches hold up to %d tokens: %.1f GiB are free", self._learner.token_budget, free / 2**30
            )

    def _fetch(self, planned: Sequence[PlannedGroup]) -> list[RolloutGroup]:
        try:
            return self._controller.groups([group.payload for group in planned])
        except RolloutError as error:
            # Gone with their node. Not one of the project's errors: going back to the last checkpoint makes them anew.
            raise RuntimeError(f"step {self._step}: {error}") from error

    def _on_first(self, work: Callable[[], None]) -> None:
        """Rank 0 does it; an error of the project in it is raised on all ranks."""
        with self._ranks.together():
            if self._ranks.rank == 0:
                work()


def export_learner_metrics(meter: Meter, plan: StepPlan, rank: int, metrics: Mapping[str, Any]) -> None:
    """Exports a rank's own seconds and the tokens of its own groups, once a step."""
    for name, value in metrics.items():
        if name.startswith("seconds/"):
            meter.add(table.LEARNER_SECONDS, value, phase=name.removeprefix("seconds/"))
    meter.add(table.LEARNER_STEPS)
    groups = [plan.groups[index] for batch in plan.micro_batches[rank] for index in batch]
    meter.add(table.LEARNER_TOKENS, sum(group.prompt_tokens for group in groups), kind="prompt")
    meter.add(table.LEARNER_TOKENS, sum(sum(group.learned_tokens) for group in groups), kind="completion")


def export_checkpoint_metrics(meter: Meter, seconds: float) -> None:
    """A checkpoint was written, by rank 0."""
    meter.add(table.CHECKPOINTS)
    meter.observe(table.CHECKPOINT_SECONDS, seconds)
