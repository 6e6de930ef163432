"""Checkpoints: a PEFT adapter folder that also holds everything a resume needs.

    checkpoints/step-000040/
        adapter_model.safetensors  adapter_config.json     loads by `PeftModel.from_pretrained(base, folder)`
        value_heads.safetensors                            of a run that learns values: Q, its targets, V
        state.safetensors  state.json                      optimiser, schedule, random generators; no pickle
        controller/…                                       the controller's bytes, one file each
        manifest.json                                      sha256 of every file above, written last

`step` counts finished optimiser steps, so it is also the policy version that the adapter is. `LearnerState` is what a
learner must remember to go on as if nothing had happened: tensors and JSON, no pickle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from mmrl_ray.errors import CheckpointError, RunError
from mmrl_ray.policy.heads import LearningHeads, read_heads_state, save_value_heads
from mmrl_ray.policy.lora.adapter import load_adapter_state, save_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.run_records.checkpoint_choice import prune_checkpoints
from mmrl_ray.run_records.run_dir import LIVE_FOLDER, WEIGHTS_FILE, RunDir, checkpoint_name, steps_in

_LIVE_KEPT = 3
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class LearnerState:
    """Optimiser, schedule and random generators of one learner."""

    tensors: Mapping[str, torch.Tensor]
    """By name, on the CPU: `optimizer/<parameter>/<field>`, `rng/…`."""
    facts: Mapping[str, Any]
    """JSON-like: counters, schedule, the optimiser's settings."""


def capture_rng() -> LearnerState:
    """Torch's (CPU and every GPU), Python's and NumPy's global generators."""
    tensors = {"rng/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng/cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    tensors["rng/python"] = torch.tensor(words, dtype=torch.int64)
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["rng/numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    facts = {"python": [version, gauss], "numpy": [str(kind), int(position), int(has_gauss), float(cached)]}
    return LearnerState(tensors, {"rng": facts})


def restore_rng(state: LearnerState) -> None:
    """Undoes whatever was drawn since `capture_rng`. A GPU that was not there then keeps its generator as it is."""
    torch.set_rng_state(state.tensors["rng/torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"rng/cuda.{i}" in state.tensors:
                torch.cuda.set_rng_state(state.tensors[f"rng/cuda.{i}"], i)
    version, gauss = state.facts["rng"]["python"]
    random.setstate((version, tuple(state.tensors["rng/python"].tolist()), gauss))
    kind, position, has_gauss, cached = state.facts["rng"]["numpy"]
    np.random.set_state((kind, state.tensors["rng/numpy"].numpy().astype(np.uint32), position, has_gauss, cached))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint gives back; the adapter is in the model already."""

    step: int
    learner: LearnerState
    controller: Mapping[str, Any]
    """As it was given to `save_checkpoint`."""


def save_checkpoint(
    run: RunDir,
    step: int,
    *,
    policy: Policy,
    learner: LearnerState,
    controller: Mapping[str, Any],
    keep: int,
    also: Sequence[int] = (),
) -> str:
    """Writes the checkpoint of `step` finished steps, then removes all but the newest `keep`; returns its name.

    Args:
        run: the run's folder; only one process may save into it.
        step: finished optimiser steps.
        policy: its adapter is saved in the PEFT layout, and its value heads, if any, beside it.
        learner: `LearnerStep.state()`.
        controller: JSON-like values; `bytes` values become files of their own.
        keep: how many checkpoints stay, this one included; at least 1.
        also: steps whose checkpoints stay beside them.

    Raises:
        RunError: it cannot be written (a full disk, …); what was there before is as it was.
    """
    name = checkpoint_name(step)
    blobs = {key: value for key, value in controller.items() if isinstance(value, bytes)}
    facts = {
        "format": _FORMAT,
        "step": step,
        "learner": dict(learner.facts),
        "controller": {key: value for key, value in controller.items() if key not in blobs},
        "blobs": sorted(blobs),
    }
    with run.staging_folder() as folder:
        _write_adapter(policy, folder, run.full_path(name), whole=True)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in learner.tensors.items()}
        (folder / "state.safetensors").write_bytes(dump_tensors(tensors))
        (folder / "controller").mkdir()
        for key, blob in blobs.items():
            (folder / "controller" / key).write_bytes(blob)
        _write_facts(folder / "state.json", facts)
        run.commit_folder(name, folder, facts={"step": step})
    prune_checkpoints(run, step, keep, also)
    return name


def load_checkpoint(run: RunDir, step: int, policy: Policy) -> Checkpoint:
    """Puts the checkpoint's adapter into `policy`, which has one already, and gives back the rest.

    Value heads that learn go on from the checkpoint's, too.

    Raises:
        CheckpointError: it is missing, damaged, without the value heads that the policy has, or of a later format.
        AdapterError: the adapter or the heads do not fit the model.
    """
    name = checkpoint_name(step)
    run.verify_manifest(name)
    with run.local_copy(name) as folder:
        load_adapter_state(policy.model, load_tensors((folder / WEIGHTS_FILE).read_bytes()))
        if isinstance(heads := policy.value_heads.get(None), LearningHeads):
            if (stored := read_heads_state(folder)) is None:
                raise CheckpointError(f"{run.full_path(name)} has no value heads: it is of another kind of run")
            heads.load_whole(stored[0])
        facts = run.read_json(f"{name}/state.json")
        if facts["format"] != _FORMAT:
            raise CheckpointError(f"{run.full_path(name)} has format {facts['format']}, this version reads {_FORMAT}")
        tensors: dict[str, torch.Tensor] = load_tensors((folder / "state.safetensors").read_bytes())
        blobs = {key: (folder / "controller" / key).read_bytes() for key in facts["blobs"]}
    return Checkpoint(
        step=int(facts["step"]),
        learner=LearnerState(tensors, facts["learner"]),
        controller={**facts["controller"], **blobs},
    )


def save_adapter_folder(run: RunDir, name: str, policy: Policy, step: int) -> None:
    """Commits the policy's adapter after `step` steps as the folder `name` of the run, in the PEFT layout.

    Of value heads only what decoding needs is in it.

    Raises:
        RunError: it cannot be written.
    """
    with run.staging_folder() as folder:
        _write_adapter(policy, folder, run.full_path(name), whole=False)
        run.commit_folder(name, folder, facts={"step": step})


def save_live_version(run: RunDir, policy: Policy, step: int) -> None:
    """Puts the adapter after `step` steps where whoever serves the run finds it, and removes all but the newest few.

    Raises:
        RunError: it cannot be written.
    """
    save_adapter_folder(run, f"{LIVE_FOLDER}/step-{step:06d}", policy, step)
    for old in live_versions(run)[:-_LIVE_KEPT]:
        run.delete(f"{LIVE_FOLDER}/step-{old:06d}")


def live_versions(run: RunDir) -> list[int]:
    """Steps of the versions in `live/`, ascending."""
    return steps_in(run, LIVE_FOLDER)


def _write_adapter(policy: Policy, folder: Path, target: str, *, whole: bool) -> None:
    try:
        save_adapter(policy.model, folder)
        if (heads := policy.value_heads.get(None)) is not None:
            save_value_heads(heads, folder, whole=whole)
    except SafetensorError as error:
        # The Rust writer reports a full disk in words of its own.
        full = "StorageFull" in str(error) or "No space left" in str(error)
        remedy = "the disk is full; free some space and continue with --resume" if full else str(error)
        raise RunError(f"{target}: {remedy}") from error


def _write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    # Not `RunDir.write_json`: that turns NaN into null, and a state must come back as it was.
    path.write_text(json.dumps(facts))
