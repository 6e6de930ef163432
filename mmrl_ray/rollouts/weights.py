"""Adapter weights by version: from the learner through the controller to whichever worker samples next.

A version travels as one array of safetensors bytes, a single copy each way. The controller puts it into the object
store itself, because an object dies with the process that put it there and versions must outlive a learner group that
restarts: so a few MB a step pass through the controller, the one exception to bulk data going around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from mmrl_ray.errors import RolloutError


def encode_state(state: Mapping[str, torch.Tensor]) -> np.ndarray:
    """uint8 [bytes]: an array, which Ray moves without copying, unlike bytes or tensors."""
    return np.frombuffer(save({name: tensor.contiguous() for name, tensor in state.items()}), dtype=np.uint8)


def decode_state(encoded: np.ndarray) -> dict[str, torch.Tensor]:
    """What `encode_state` was given."""
    return load(encoded.tobytes())


class VersionTable:
    """The controller's references to versions: the newest, and whatever older ones are still in use.

    Version 0 needs no weights: an adapter as it is made changes nothing, and every worker can make it.
    """

    def __init__(self, put: Callable[[np.ndarray], Any]) -> None:
        """`put` turns encoded weights into what an assignment carries (`ray.put`)."""
        self._put = put
        self._references: dict[int, tuple[Any, ...]] = {0: ()}
        self.newest: int | None = 0
        """The version new assignments take; None after a rewind to a version that has to be published again."""

    def publish(self, version: int, encoded: np.ndarray) -> None:
        """Makes `encoded` the newest version."""
        self._references[version] = (self._put(encoded),)
        self.newest = version

    def reference(self, version: int) -> tuple[Any, ...]:
        """(reference,) for `Assignment.weights`, or () for the adapter as it was made.

        Raises:
            RolloutError: the version is unknown or was dropped.
        """
        if version not in self._references:
            raise RolloutError(f"policy version {version} is not held; there are {sorted(self._references)}")
        return self._references[version]

    def rewind(self, version: int) -> None:
        """Back to a version: later ones are forgotten."""
        for later in [v for v in self._references if v > version]:
            del self._references[later]
        self.newest = version if version in self._references else None

    def drop_before(self, version: int) -> None:
        """Lets go of versions that nothing will ask for any more; 0 without weights costs nothing and stays."""
        for old in [v for v in self._references if v < version and self._references[v]]:
            del self._references[old]
