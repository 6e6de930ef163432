"""What would stop a run, found in seconds and before its folder exists."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mmrl_ray.config import Config
from mmrl_ray.config.paths import local_paths
from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data.held_out import Overlap, overlap_with_data, overlap_with_hashes, same_place
from mmrl_ray.data.samples import Quarantine, Sample, iter_references, read_split
from mmrl_ray.errors import DataError
from mmrl_ray.policy.load import load_skeleton, try_quickly
from mmrl_ray.policy.lora.targets import left_out_line, resolve_targets
from mmrl_ray.policy.prompts import check_context, encode_prompts
from mmrl_ray.policy.tokens import answer_opening
from mmrl_ray.rewards.build import check_reward
from mmrl_ray.training.preferences import trained_pictures
from mmrl_ray.training.stored import logged_pictures


def first_sample(cfg: Config) -> Sample:
    """The first good training row: one that is broken does not stand for the set.

    Raises:
        DataError: the training split cannot be read, or has no good row.
        QuarantineError: more broken rows before it than a run tolerates.
    """
    quarantine = Quarantine(cfg.data.max_quarantined, source=cfg.data.train)
    return read_split(cfg.data.train, prompt=cfg.data.prompt, limit=1, quarantine=quarantine)[0]


def check_references(cfg: Config) -> None:
    """Whether the training split has what document frequencies and rewards are made of.

    Raises:
        DataError: it cannot be read, no row has a reference, or one that an agent is paid by has none.
    """
    if not any(iter_references(cfg.data.train)):
        raise DataError(f"no row of {cfg.data.train} has a reference: a run needs some, for its document frequencies")
    if (agent := cfg.agent) is not None:
        rows = islice(iter_references(cfg.data.train), agent.max_pictures)
        bare = next((number for number, references in enumerate(rows) if not references), None)
        if bare is not None:
            raise DataError(f"{cfg.data.train}: row {bare} has no references to be paid by; leave it out")


def refuse_moved(cfg: Config, *, base_is_kept: bool) -> None:
    """Refuses to go on with a run whose data or model are not where its config, written then, says.

    Raises:
        DataError: one line a place, with what to add to the command.
    """
    needed = [*(() if cfg.data.scenes else ("data.train", "data.eval")), *(() if base_is_kept else ("model.path",))]
    places = {key: place for key, place in local_paths(cfg).items() if key in needed}
    missing = {key: place for key, place in places.items() if not Path(place).expanduser().exists()}
    if missing:
        raise DataError(
            "\n".join(
                f"{key}={place} is not there any more: where it was moved, add --set {key}=PLACE"
                for key, place in missing.items()
            )
        )


def held_out_quarantine(cfg: Config) -> Quarantine:
    """For `evaluation_split`: as many broken rows as the run tolerates."""
    return Quarantine(cfg.data.max_quarantined, source=cfg.data.eval or "")


def evaluation_split(cfg: Config, quarantine: Quarantine) -> list[Sample]:
    """The held-out samples a run is evaluated on; none without `data.eval`. `quarantine` has those that are broken.

    Raises:
        DataError: the split is missing or empty, no row is good, or rows have no references.
        QuarantineError: more broken rows than the quarantine's budget.
    """
    if cfg.data.eval is None:
        return []
    samples = read_split(cfg.data.eval, prompt=cfg.data.prompt, limit=cfg.data.eval_samples, quarantine=quarantine)
    bare = next((sample.id for sample in samples if not sample.references), None)
    if bare is not None:
        raise DataError(f"{cfg.data.eval}: sample {bare!r} has no references to evaluate against")
    return samples


def trained_on(cfg: Config, samples: list[Sample], *, resume: bool = False) -> Iterator[Overlap]:
    """Held-out samples whose pictures the run trains on, for each place that it takes pictures from.

    A resumed run has copies of its pairs and rollouts, and needs neither the store nor the other run any more.

    Raises:
        DataError, RunError: such a place cannot be read.
    """
    if not samples:
        return
    if cfg.data.eval is not None and same_place(cfg.data.eval, cfg.data.train):
        ids = tuple(sample.id for sample in samples)
        yield Overlap("data.train, which data.eval is, too", len(ids), ids, len(ids), len(ids))
    else:
        yield overlap_with_data(samples, cfg.data.train)
    if cfg.data.preferences is not None and not resume:
        yield overlap_with_hashes(samples, trained_pictures(cfg.data.preferences), "data.preferences")
    if cfg.data.rollouts is not None and not resume:
        yield overlap_with_hashes(samples, logged_pictures(cfg.data.rollouts), "data.rollouts")


def with_opening(cfg: Config, model: ModelSection) -> Config:
    """The config with what the template of `model` writes before an answer, where a part of the reward needs it.

    Raises:
        ModelError: the model's config or processor cannot be used.
    """
    if not cfg.reward.needs_opening:
        return cfg
    # The captions of a value-based run come from no template.
    opening = "" if cfg.agent is not None else answer_opening(load_skeleton(model).processor)
    return cfg.model_copy(update={"reward": cfg.reward.with_opening(opening)})


def check_run(cfg: Config) -> list[str]:
    """Reward and model, before anything is started; returns what `check_model` does.

    Raises:
        ConfigError: a reward part cannot be made, or the reward's risk has no trained sigma.
        MMRLError: as `check_model`.
    """
    check_reward(cfg.reward)
    return check_model(cfg)


def check_model(cfg: Config) -> list[str]:
    """Model, processor, adapter targets and the first good training row's prompt; a small model is loaded and tried.

    Returns:
        what a user should know, a line each: the weights that the adapter leaves out.

    Raises:
        ModelError: the checkpoint, its processor or its chat template cannot be used.
        ConfigError: a setting of `model.processor` cannot.
        AdapterError: LoRA targets that match nothing, or more than the language model.
        ContextLengthError: prompt and longest completion do not fit the model.
        DataError: the training split cannot be used.
    """
    policy = load_skeleton(cfg.model)
    left_out = left_out_line(policy.hf_model, resolve_targets(policy.hf_model, cfg.model.lora))
    for prompt in encode_prompts(policy, [first_sample(cfg)]):
        check_context(policy, prompt, cfg.rollout.max_new_tokens)
    try_quickly(cfg.model)
    return [left_out] if left_out is not None else []
