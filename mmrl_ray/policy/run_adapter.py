"""The adapter that a run begins with, the same in each of its processes."""

from __future__ import annotations

from safetensors.torch import load as load_tensors

from mmrl_ray.config import Config
from mmrl_ray.experience.seeds import derive_seed
from mmrl_ray.policy.adapter import WEIGHTS_FILE, add_adapter, load_adapter_state
from mmrl_ray.policy.load import Policy
from mmrl_ray.run_dir import RunDir

STARTING_ADAPTER = f"adapter/{WEIGHTS_FILE}"
"""In the folder that `data.rollouts.run` names."""


def add_run_adapter(policy: Policy, cfg: Config) -> None:
    """A fresh adapter, or with `data.rollouts.policy: adapter` that of the run whose rollouts are learnt from.

    Raises:
        AdapterError: the model does not take it.
        RunError: its file cannot be read.
    """
    add_adapter(policy, cfg.model.lora, derive_seed(cfg.run.seed, "adapter"))
    stored = cfg.data.rollouts
    if stored is not None and stored.policy == "adapter":
        load_adapter_state(policy.model, load_tensors(RunDir.at(stored.run).read_bytes(STARTING_ADAPTER)))
