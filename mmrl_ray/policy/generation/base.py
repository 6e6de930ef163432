"""What goes into the decode loop and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mmrl_ray.experience.carriers import Completion, EncodedPrompt, FinishReason, SamplingParams, VisionFeatures


class Event(NamedTuple):
    """One token of one row."""

    handle: int
    row: int
    """Place in the group; the greedy extra comes after the n samples."""
    token_id: int
    logprob: float
    text: str
    """What the token adds to the reported text; always empty unless the group was admitted with `stream`."""
    finish_reason: FinishReason | None
    """Set with the row's last token."""


class Failure(NamedTuple):
    """A group that could not go on, and why."""

    handle: int
    error: Exception


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """What `Decoder.admit` takes, as a value."""

    prompt: EncodedPrompt
    n: int
    sampling: SamplingParams
    greedy_extra: bool = False
    features: VisionFeatures | None = None


@dataclass(frozen=True, slots=True)
class GroupOutput:
    """What became of one admitted group."""

    completions: tuple[Completion, ...]
    greedy: Completion | None
    vision: VisionFeatures | None
    """The features that its prompt was encoded with; None if it was cancelled before."""
