"""Where a run has its base, its checkpoints and its adapters: names alone, for whoever reads no weights."""

from __future__ import annotations

import re

from mmrl_ray.run_records.run_dir import RunDir

BASE = "base"
"""Folder of a run that keeps its base model, where a warm start made it."""
FOLDER = "checkpoints"
ADAPTER_FOLDER = "adapter"
"""Of a run that took all its steps."""
LIVE_FOLDER = "live"
"""Adapters of the versions that were published last, where the policy is served while it trains."""
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STARTING_ADAPTER = f"{ADAPTER_FOLDER}/{WEIGHTS_FILE}"
"""In the folder that `data.rollouts.run` names."""
STATISTICS = "reward/statistics.json"
"""Of the training references."""
_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_name(step: int) -> str:
    """Its folder's name in the run."""
    return f"{FOLDER}/step-{step:06d}"


def checkpoint_steps(run: RunDir) -> list[int]:
    """Steps that have a checkpoint folder, ascending, valid or not."""
    return steps_in(run, FOLDER)


def steps_in(run: RunDir, folder: str) -> list[int]:
    """Steps of which a folder of the run has something, ascending."""
    return sorted(int(match[1]) for name in run.list(folder) if (match := _NAME.fullmatch(name)))
