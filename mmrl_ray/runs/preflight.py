"""What would stop a run, found in seconds and before its folder exists."""

from __future__ import annotations

from mmrl_ray.config import Config
from mmrl_ray.config.model import ModelSection
from mmrl_ray.data.samples import Sample, read_split
from mmrl_ray.errors import DataError
from mmrl_ray.policy.load import load_skeleton
from mmrl_ray.policy.prompts import check_context, encode_prompts
from mmrl_ray.policy.targets import left_out_line, resolve_targets
from mmrl_ray.policy.tokens import answer_opening
from mmrl_ray.policy.trial import try_quickly
from mmrl_ray.rewards.build import check_reward


def evaluation_split(cfg: Config) -> list[Sample]:
    """The held-out samples a run is evaluated on; none without `data.eval`.

    Raises:
        DataError: the split is missing, empty or broken, or has rows without references.
    """
    if cfg.data.eval is None:
        return []
    samples = read_split(cfg.data.eval, prompt=cfg.data.prompt, limit=cfg.data.eval_samples)
    bare = next((sample.id for sample in samples if not sample.references), None)
    if bare is not None:
        raise DataError(f"{cfg.data.eval}: sample {bare!r} has no references to evaluate against")
    return samples


def with_opening(cfg: Config, model: ModelSection) -> Config:
    """The config with what the template of `model` writes before an answer, where a part of the reward needs it.

    Raises:
        ModelError: the model's config or processor cannot be used.
    """
    if not cfg.reward.needs_opening:
        return cfg
    # The captions of a value-based run come from no template.
    opening = "" if cfg.value_based is not None else answer_opening(load_skeleton(model).processor)
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
    """Model, processor, adapter targets and the first training prompt; a small model is loaded and tried.

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
    for prompt in encode_prompts(policy, read_split(cfg.data.train, prompt=cfg.data.prompt, limit=1)):
        check_context(policy, prompt, cfg.rollout.max_new_tokens)
    try_quickly(cfg.model)
    return [left_out] if left_out is not None else []
