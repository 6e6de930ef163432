"""`LearnerState`: what a learner must remember to go on as if nothing had happened. Tensors and JSON, no pickle."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


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
