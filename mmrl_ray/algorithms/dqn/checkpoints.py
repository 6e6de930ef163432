"""Checkpoints of a value-based run, beside those of other runs in the folder and by the same rules.

checkpoints/step-000800/
    agent.safetensors  agent.json     loads by `Agent.load`
    state.safetensors                 learner (target network, optimiser) and replay buffer; no pickle
    state.json                        counters
    manifest.json                     sha256 of every file above, written last
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from mmrl_ray.algorithms.dqn.agent import AGENT_FOLDER, Agent
from mmrl_ray.errors import CheckpointError
from mmrl_ray.learner.checkpoints import checkpoint_name, prune_checkpoints
from mmrl_ray.run_records.run_dir import RunDir

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ValueState:
    """What a run goes on from."""

    words: int
    """Said by all workers since the run began."""
    learner: Mapping[str, torch.Tensor]
    """As `TemporalDifferenceLearner.captured` names them."""
    replay: Mapping[str, torch.Tensor]
    """As `replay.episodes_to_tensors` names them."""


def save_value_checkpoint(run: RunDir, step: int, agent: Agent, state: ValueState, keep: int) -> None:
    """Writes the checkpoint of `step` optimiser steps, then removes all but the newest `keep`.

    Raises:
        RunError: it cannot be written; what was there before is as it was.
    """
    tensors = {f"learner/{name}": tensor for name, tensor in state.learner.items()}
    tensors |= {f"replay/{name}": tensor for name, tensor in state.replay.items()}
    with run.staging_folder() as folder:
        agent.save(folder)
        (folder / "state.safetensors").write_bytes(dump_tensors({k: t.contiguous() for k, t in tensors.items()}))
        (folder / "state.json").write_text(json.dumps({"format": _FORMAT, "step": step, "words": state.words}))
        run.commit_folder(checkpoint_name(step), folder, facts={"step": step})
    prune_checkpoints(run, step, keep)


def load_value_checkpoint(run: RunDir, step: int) -> ValueState:
    """What `save_value_checkpoint` wrote.

    Raises:
        CheckpointError: it is missing, damaged, or of a later format.
    """
    name = checkpoint_name(step)
    run.verify_manifest(name)
    facts = run.read_json(f"{name}/state.json")
    if facts["format"] != _FORMAT:
        raise CheckpointError(f"{run.full_path(name)} has format {facts['format']}, this version reads {_FORMAT}")
    tensors = load_tensors(run.read_bytes(f"{name}/state.safetensors"))
    parts: dict[str, dict[str, torch.Tensor]] = {"learner": {}, "replay": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition("/")
        parts[part][rest] = tensor
    return ValueState(int(facts["words"]), parts["learner"], parts["replay"])


def save_agent_folder(run: RunDir, agent: Agent, step: int) -> None:
    """Commits the final agent.

    Raises:
        RunError: it cannot be written.
    """
    with run.staging_folder() as folder:
        agent.save(folder)
        run.commit_folder(AGENT_FOLDER, folder, facts={"step": step})
