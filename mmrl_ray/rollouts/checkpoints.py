"""What a checkpoint of the controller holds: JSON-able values, and the buffered groups as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmrl_ray.errors import RolloutError
from mmrl_ray.experience.carriers import RolloutGroup, ScoredGroup
from mmrl_ray.rollouts.group_codec import decode_groups, encode_groups

_FORMAT = 1
_BUFFER_KEY = "buffer.arrow"


def encode_checkpoint(
    step: int, stream: Mapping[str, Any], groups: Iterable[tuple[ScoredGroup, RolloutGroup]]
) -> dict[str, Any]:
    """After `step` finished steps, the sample stream standing at `stream`, with these groups in the buffer."""
    return {"format": _FORMAT, "next_step": step, "stream": stream, _BUFFER_KEY: encode_groups(groups)}


def decode_checkpoint(
    state: Mapping[str, Any],
) -> tuple[int, Mapping[str, Any], list[tuple[ScoredGroup, RolloutGroup]]]:
    """(step, stream, groups) that `encode_checkpoint` was given.

    Raises:
        RolloutError: the state is of another format.
    """
    if (found := state.get("format")) != _FORMAT:
        raise RolloutError(f"the controller's checkpoint has format {found!r}, not {_FORMAT}")
    return int(state["next_step"]), state["stream"], decode_groups(state[_BUFFER_KEY])
