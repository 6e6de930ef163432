"""The rollouts of a run that learns from another one's: its own copy of them, and of the policy that they weigh.

They are copied into the run's folder at the start, as `stored/train`: a run that is resumed goes on in the very same
ones, whatever becomes of the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.config.sections import RolloutsSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.data.writing import ShardWriter
from mmrl_ray.errors import ConfigError, RunError
from mmrl_ray.learner.checkpoints import ADAPTER_FOLDER
from mmrl_ray.policy.lora.adapter import CONFIG_FILE, STARTING_ADAPTER
from mmrl_ray.rollouts.stored import COLUMNS, sample_of
from mmrl_ray.run_records.rollout_log import LoggedPictures, logged_groups
from mmrl_ray.run_records.run_dir import RunDir

FOLDER = "stored"
TRAIN = f"{FOLDER}/train"


def check_stored(cfg: Config) -> int:
    """Groups of the log that a run learns from; 0 of any run that learns from none.

    Raises:
        RunError: that run is not there, or has no log.
        ConfigError: none of its steps is among those asked for, its groups are of another size, or its adapter is
            asked for and is not there or of another shape.
    """
    if (wanted := cfg.data.rollouts) is None:
        return 0
    source = RunDir.at(wanted.run)
    count = 0
    for rows in _groups(source, wanted, ()):
        count += 1
        if len(rows) != cfg.rollout.group_size:
            raise ConfigError(
                f"rollout.group_size={cfg.rollout.group_size}, and the groups of {wanted.run} have {len(rows)} "
                f"completions: write rollout.group_size: {len(rows)}"
            )
    if not count:
        last = "its end" if wanted.last_step is None else f"step {wanted.last_step}"
        raise ConfigError(f"the rollout log of {wanted.run} has no group from step {wanted.first_step} to {last}")
    if wanted.policy == "adapter":
        _check_adapter(cfg, source)
    return count


def logged_pictures(wanted: RolloutsSection) -> Iterator[str]:
    """Hash of each group's picture, of those that a run learns from.

    Raises:
        RunError: that run is not there, or has no log.
    """
    return (rows[0]["image_hash"] for rows in _groups(RunDir.at(wanted.run), wanted, ("image_hash",)))


def stored_data(cfg: Config, run: RunDir) -> Config:
    """The config of a run that learns from stored rollouts, its `data.train` its own copy of them.

    Any other config is given back as it is.

    Raises:
        RunError: the other run cannot be read.
        DataError: the copy cannot be written.
    """
    if (wanted := cfg.data.rollouts) is None:
        return cfg
    if not run.exists(TRAIN):
        source = RunDir.at(wanted.run)
        if wanted.policy == "adapter":
            run.write_bytes(f"{FOLDER}/{STARTING_ADAPTER}", source.read_bytes(STARTING_ADAPTER))
        several = any(name.endswith(".json") for name in source.list("images"))
        # The last to come: where it is, all is.
        with ShardWriter(f"{run.location}/{TRAIN}", several_images=several) as writer:
            for sample in _samples(source, wanted):
                writer.write(sample)
    rollouts = wanted.model_copy(update={"run": f"{run.location}/{FOLDER}"})
    data = cfg.data.model_copy(update={"train": f"{run.location}/{TRAIN}", "rollouts": rollouts})
    return cfg.model_copy(update={"data": data})


def decoding_beta(cfg: Config) -> float:
    """The β that captions of a finished run are decoded with; 0 without values."""
    return cfg.learner.family.decoding_beta


def _samples(source: RunDir, wanted: RolloutsSection) -> Iterator[Sample]:
    pictures = LoggedPictures(source)
    for rows in _groups(source, wanted, COLUMNS):
        yield sample_of(rows, pictures[rows[0]["image_hash"]])


def _groups(source: RunDir, wanted: RolloutsSection, columns: tuple[str, ...]) -> Iterator[list[dict[str, Any]]]:
    for rows in logged_groups(source, columns):
        step = rows[0]["step"]
        if step >= wanted.first_step and (wanted.last_step is None or step <= wanted.last_step):
            yield rows


def _check_adapter(cfg: Config, source: RunDir) -> None:
    name = f"{ADAPTER_FOLDER}/{CONFIG_FILE}"
    if not source.exists(name) or not source.exists(STARTING_ADAPTER):
        raise ConfigError(
            f"data.rollouts.policy=adapter, and {source.location} has no {ADAPTER_FOLDER}/: let it finish with "
            "mmrl train --resume, or write policy: base"
        )
    try:
        written = json.loads(source.read_text(name))
        theirs = (written["r"], float(written["lora_alpha"]))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{source.full_path(name)} cannot be read: {error}") from error
    lora = cfg.model.lora
    if theirs != (lora.r, lora.alpha):
        raise ConfigError(
            f"model.lora has r={lora.r} and alpha={lora.alpha:g}, the adapter of {source.location} has r={theirs[0]} "
            f"and alpha={theirs[1]:g}: write the same"
        )
