"""What `mmrl evaluate` and `mmrl caption` are pointed at: a finished run, an unfinished one, or any model."""

from __future__ import annotations

import logging as stdlib_logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from mmrl_ray.algorithms.dqn.agent import AGENT_FOLDER, FACTS_FILE, Agent
from mmrl_ray.algorithms.dqn.network import image_features
from mmrl_ray.config.blind import BlindCheckSection
from mmrl_ray.config.load import parse_config
from mmrl_ray.config.paths import RUN_CONFIG, is_run, refuse_unknown
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.sections import DataSection, ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.policy.heads import add_decoding_heads
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import load_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.tokens import answer_opening
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.run_records.checkpoint_choice import choose_checkpoint
from mmrl_ray.run_records.run_dir import STATISTICS, RunDir
from mmrl_ray.telemetry.terminal import ProgressFn, RunProgress
from mmrl_ray.training.offline import PAIRS, STORED
from mmrl_ray.training.warm_start import base_for_use

_MODEL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A policy ready to caption, with what its run was made of."""

    name: str
    policy: Policy
    """The model; of a value-based run, its frozen base."""
    prompt: str
    """For images that bring no prompt of their own."""
    max_new_tokens: int
    reward: RewardSection
    eval_data: str | None
    """The run's held-out split."""
    statistics: CorpusStatistics | None
    """Of the run's training references; None for a bare model."""
    notes: tuple[str, ...]
    """What a reader of its figures should know."""
    agent: PictureAgent | None = None
    """Of a value-based run: what captions instead of the policy."""
    trained_on: tuple[str, ...] = ()
    """Data sets whose pictures the run has learned from; none known of a bare model."""
    max_quarantined: int = DataSection.model_fields["max_quarantined"].default
    """Broken samples that are left out of an evaluation before it stops."""
    temperature: float = 1.0
    """Of the policy that learned."""
    min_gap: float = BlindCheckSection.model_fields["min_gap"].default
    """Nats a token: `learner.blind_check.min_gap`."""

    def beta(self, wanted: float | None) -> float:
        """The β to caption with: the one that is wanted, or what the run has; 0 without value heads.

        Raises:
            ConfigError: one above 0 is wanted, and there are no value heads.
        """
        heads = self.policy.value_heads.get(None)
        if heads is None and wanted:
            raise ConfigError(f"--beta {wanted:g} needs value heads, and {self.name} is no run of algorithm: ilql")
        return wanted if wanted is not None else heads.beta if heads is not None else 0.0


@dataclass(frozen=True, slots=True)
class PictureAgent:
    """An agent with what it sees by."""

    agent: Agent
    cache: VisionCache

    def captions(self, policy: Policy, samples: Sequence[Sample], progress: ProgressFn | None = None) -> list[str]:
        """One greedy caption a sample, in order.

        Raises:
            DataError, ImageError: a sample cannot be encoded.
        """
        told = None if progress is None else lambda done, total: progress(done, total, {})
        tokens = self.agent.facts.shape.image_tokens
        return self.agent.captions(image_features(policy, samples, tokens, self.cache, told))


def open_target(target: str, *, checkpoint: str | None = None, shown: RunProgress | None = None) -> ModelSource:
    """Loads a run (its base with its adapter) or a model.

    A run folder is one with a `config.yaml`; whatever else is a model folder or a hub id. Of a run, `checkpoint` says
    which (`choose_checkpoint`). `shown` tells of a base that is made anew.

    Raises:
        ConfigError: it looks like a folder, and there is none; or a model is asked for a checkpoint.
        RunError: the run has no adapter and no valid checkpoint, or not that one.
        ModelError: the model cannot be loaded.
    """
    refuse_unknown(target)
    quieten()
    if is_run(target):
        return _open_run(RunDir.at(target), checkpoint, shown)
    if checkpoint is not None:
        raise ConfigError(f"--checkpoint {checkpoint} is of a run, and {target} is a model")
    policy = load_policy(ModelSection(path=target))
    return ModelSource(
        name=Path(target).name,
        policy=policy,
        prompt=DataSection.model_fields["prompt"].default,
        max_new_tokens=_MODEL_TOKENS,
        reward=RewardSection(),
        eval_data=None,
        statistics=None,
        notes=(),
    )


def quieten() -> None:
    """What libraries say and draw while a model is loaded is not for a user of it; errors are raised all the same."""
    logging.set_verbosity_error()
    for name in ("huggingface_hub", "peft", "torch"):
        stdlib_logging.getLogger(name).setLevel(stdlib_logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|huggingface_hub)\b.*")


def _open_run(run: RunDir, checkpoint: str | None, shown: RunProgress | None) -> ModelSource:
    cfg = parse_config(run.read_text(RUN_CONFIG), run.full_path(RUN_CONFIG))
    kind = {} if cfg.agent is None else {"final": AGENT_FOLDER, "holds": FACTS_FILE}
    chosen = choose_checkpoint(run, checkpoint, **kind)
    policy = load_policy(cfg.model.model_copy(update={"path": base_for_use(cfg, run, shown)}))
    agent = None
    if cfg.agent is not None:
        with run.local_copy(chosen.folder) as local:
            agent = PictureAgent(Agent.load(local), VisionCache(cfg.rollout.vision_cache_mb * 2**20))
    else:
        with run.local_copy(chosen.folder) as local:
            load_adapter(policy, local)
            add_decoding_heads(policy, local)
    policy.model.requires_grad_(False)
    opening = answer_opening(policy.processor) if agent is None and cfg.reward.needs_opening else ""
    return ModelSource(
        name=run.name,
        policy=policy,
        prompt=cfg.data.prompt,
        max_new_tokens=cfg.rollout.max_new_tokens,
        reward=cfg.reward.with_opening(opening),
        eval_data=cfg.data.eval,
        statistics=CorpusStatistics.from_json(run.read_text(STATISTICS)) if run.exists(STATISTICS) else None,
        notes=chosen.notes,
        agent=agent,
        trained_on=(cfg.data.train, *(f"{run.location}/{own}" for own in (PAIRS, STORED) if run.exists(own))),
        max_quarantined=cfg.data.max_quarantined,
        temperature=cfg.rollout.temperature,
        min_gap=cfg.learner.blind_check.min_gap,
    )
