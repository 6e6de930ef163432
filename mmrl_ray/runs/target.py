"""What `mmrl evaluate` and `mmrl caption` are pointed at: a finished run, an unfinished one, or any model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mmrl_ray.config import Config
from mmrl_ray.config.data import DataSection
from mmrl_ray.config.load import parse_config
from mmrl_ray.config.model import ModelSection
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.errors import RunError
from mmrl_ray.learner.checkpoints import checkpoint_name, newest_valid_checkpoint
from mmrl_ray.metrics.corpus import CorpusStatistics
from mmrl_ray.policy.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from mmrl_ray.policy.load import Policy, load_policy
from mmrl_ray.run_dir import RunDir
from mmrl_ray.runs.warm_start import warm_start

STATISTICS = "reward/statistics.json"
_CONFIG = "config.yaml"
_MODEL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Target:
    """A policy ready to caption, with what its run was made of."""

    name: str
    policy: Policy
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


def open_target(target: str, *, device: torch.device | str | None = None) -> Target:
    """Loads a run (its base with its adapter) or a model.

    A run folder is one with a `config.yaml`; whatever else is a model folder or a hub id.

    Raises:
        RunError: the run has no adapter and no valid checkpoint.
        ModelError: the model cannot be loaded.
    """
    if "://" in target or (Path(target).expanduser() / _CONFIG).is_file():
        return _open_run(RunDir.at(target), device)
    policy = load_policy(ModelSection(path=target), device=device)
    return Target(
        name=Path(target).name,
        policy=policy,
        prompt=DataSection.model_fields["prompt"].default,
        max_new_tokens=_MODEL_TOKENS,
        reward=RewardSection(),
        eval_data=None,
        statistics=None,
        notes=(),
    )


def _open_run(run: RunDir, device: torch.device | str | None) -> Target:
    cfg = parse_config(run.read_text(_CONFIG), run.full_path(_CONFIG))
    policy = load_policy(cfg.model.model_copy(update={"path": warm_start(cfg)}), device=device)
    folder, notes = _adapter(run)
    with _local(run, folder) as local:
        load_adapter(policy, local)
    policy.model.requires_grad_(False)
    return Target(
        name=run.name,
        policy=policy,
        prompt=cfg.data.prompt,
        max_new_tokens=cfg.rollout.max_new_tokens,
        reward=cfg.reward,
        eval_data=cfg.data.eval,
        statistics=_statistics(run, cfg),
        notes=notes,
    )


def _adapter(run: RunDir) -> tuple[str, tuple[str, ...]]:
    """The folder in the run that holds its newest adapter."""
    if run.exists(f"adapter/{CONFIG_FILE}"):
        return "adapter", ()
    step = newest_valid_checkpoint(run)
    if step is None:
        raise RunError(
            f"{run.location} has no adapter and no checkpoint yet: let it train with --resume, or name a model"
        )
    return checkpoint_name(step), (f"the run is not finished: this is its checkpoint of step {step}",)


@contextmanager
def _local(run: RunDir, folder: str) -> Iterator[Path]:
    """The adapter's files on this machine."""
    if run.is_local:
        yield run.local_path(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (Path(scratch) / name).write_bytes(run.read_bytes(f"{folder}/{name}"))
        yield Path(scratch)


def _statistics(run: RunDir, cfg: Config) -> CorpusStatistics | None:
    return CorpusStatistics.from_json(run.read_text(STATISTICS)) if run.exists(STATISTICS) else None
