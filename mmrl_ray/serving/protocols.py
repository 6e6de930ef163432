"""What travels between gateway, policy, reward and jobs, and the first two services as the gateway sees them.

Frozen, slotted, picklable: each value crosses from one Serve replica to another.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from mmrl_ray.experience.carriers import SamplingParams, Score

Role = Literal["system", "user", "assistant"]
ServedFinishReason = Literal["stop", "length"]
TuningStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    parts: tuple[str | int, ...]
    """Text, or the place of an image in `GenerateRequest.images`, in the order they were written."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """n completions of one conversation."""

    id: str
    model: str
    """Id of an adapter, or of the base."""
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]
    """Encoded files; every one is named once by a part."""
    sampling: SamplingParams
    n: int = 1
    caller: str | None = None
    """Whose key asks, for each to get its share; None where nobody shares."""


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One sampled token."""

    text: str
    """Of this token alone."""
    token_id: int
    logprob: float
    data: bytes | None = None
    """Its own bytes, where a token may be part of a character; None: those of `text`."""


@dataclass(frozen=True, slots=True)
class Served:
    """Which weights answer, fixed when the request is admitted."""

    model: str
    version: int
    """Training step of the adapter; 0 for a base."""
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished completion."""

    index: int
    text: str
    finish_reason: ServedFinishReason
    tokens: tuple[TokenInfo, ...]


@dataclass(frozen=True, slots=True)
class Generated:
    """The answer to a request that was not streamed."""

    served: Served
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one or several steps added to one choice."""

    index: int
    text: str
    tokens: tuple[TokenInfo, ...]
    finish_reason: ServedFinishReason | None = None
    """Set with the choice's last delta."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One line of `/v1/models`."""

    id: str
    created: int
    """Unix seconds."""
    root: str
    """Id of the base model that it runs on."""
    parent: str | None
    """Id of the base an adapter was trained on; None for a base."""
    version: int
    """Training step of the newest version."""


class PolicyService(Protocol):
    """The policy deployment.

    Raises (every method): `UnknownModelError` no such id; `OverloadedError` the queue is full; `DataError`,
    `ContextLengthError`, `ConfigError` this request cannot be answered; `ServingError` anything else that went wrong.
    """

    async def generate(self, request: GenerateRequest) -> Generated:
        """All choices, finished. Cancelling the call frees its rows."""
        ...

    def stream(self, request: GenerateRequest) -> AsyncIterator[Served | Delta]:
        """`Served` first, then deltas as they are made. Closing the iterator frees its rows."""
        ...

    async def models(self) -> list[ModelInfo]:
        """The base first, then adapters by id."""
        ...

    async def ready(self) -> bool:
        """Whether the model is loaded and warmed up."""
        ...


@dataclass(frozen=True, slots=True)
class RewardItem:
    """One picture with the captions to score."""

    images: tuple[bytes, ...]
    captions: tuple[str, ...]
    references: tuple[str, ...]
    prompt: str = ""
    image_hash: str | None = None
    """Hex SHA-256 of a picture that the reward has seen before, in place of `images`."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of one request, by item and caption, and which reward gave them."""

    scores: tuple[tuple[Score, ...], ...]
    """A breakdown, or why that caption has none."""
    reward: str
    version: str
    image_hashes: tuple[str | None, ...]
    """Of each item's picture: good for `RewardItem.image_hash` from now on."""


class RewardService(Protocol):
    """The reward deployment.

    Raises (every method): `RewardError` the reward as a whole cannot answer, or ran out of time; `UnknownImageError` no
    picture of that hash; `OverloadedError` the queue is full.
    """

    async def score(self, items: tuple[RewardItem, ...]) -> Scored:
        """One score a caption, in order."""
        ...

    async def describe(self) -> Mapping[str, str]:
        """`reward` and `version`."""
        ...

    async def ready(self) -> bool:
        """Whether the reward answers."""
        ...


@dataclass(frozen=True, slots=True)
class TuningOrder:
    """What a client asked to have trained; ids are on the allow-list."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    """Begins the name of the result, in place of the model's id."""
    seed: int = 0
    epochs: int | None = None
    """Passes over the training data; gives the steps."""
    steps: int | None = None
    """Optimiser steps; the recipe's where neither is given."""
    batch_size: int | None = None
    """Images a step."""
    lr_multiplier: float | None = None
    """Scales the recipe's learning rate."""
    metadata: Mapping[str, str] | None = None
    """The client's own notes."""


@dataclass(frozen=True, slots=True)
class TuningJob:
    """One job as it stands."""

    id: str
    order: TuningOrder
    run: str
    """Name of its run, which is what its result is called."""
    status: TuningStatus
    created_at: int
    """Unix seconds."""
    finished_at: int | None = None
    error: str | None = None
    """Why it failed."""
    trained_tokens: int | None = None
    """Completion tokens that it learnt from; known when it is over."""
    result_files: tuple[str, ...] = ()
    """Ids of `RayJobService.result`."""


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file that a job has written."""

    name: str
    created_at: int
    data: bytes
