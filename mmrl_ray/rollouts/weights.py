"""Adapter weights by version: from the learner through the controller to whichever worker samples next.

A version travels as one array of safetensors bytes: a header, and all weights one behind the other, as they are in one
buffer before and after (`adapter_state`). The controller puts it into the object store itself, because an object dies
with the process that put it there and versions must outlive a learner group that restarts: so the adapter's bytes, 120
MB at r = 16 of a model of 3 B parameters, pass through the controller once a step, the one exception to bulk data going
around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from mmrl_ray.errors import RolloutError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
"""By the name that safetensors gives them: what adapters and value heads are made of, and numbers beside them."""


def encode_state(state: Mapping[str, torch.Tensor]) -> np.ndarray:
    """uint8 [bytes]: an array, which Ray moves without copying, unlike bytes or tensors."""
    return np.frombuffer(save({name: tensor.contiguous() for name, tensor in state.items()}), dtype=np.uint8)


def decode_state(encoded: np.ndarray) -> dict[str, torch.Tensor]:
    """What `encode_state` was given, by one copy: the tensors are views of one buffer."""
    start = 8 + int.from_bytes(encoded[:8].tobytes(), "little")
    header = json.loads(encoded[8:start].tobytes())
    header.pop("__metadata__", None)
    buffer = torch.empty(encoded.size - start, dtype=torch.uint8)
    buffer.numpy()[:] = encoded[start:]
    return {
        name: buffer[slice(*entry["data_offsets"])].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.items()
    }


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
