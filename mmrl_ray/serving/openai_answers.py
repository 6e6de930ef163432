"""OpenAI's answers: chat completions, their chunks, models."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel

from mmrl_ray.serving.protocols import ServedFinishReason, TokenInfo

_LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for a probability of nothing; JSON has no infinity."""


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> Self:
        """With their sum."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


def finite_logprob(logprob: float) -> float:
    """As OpenAI writes it: a token that cannot be has a number, too."""
    return logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB


class TokenLogprob(BaseModel):
    """One token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any]


class Logprobs(BaseModel):
    """Of the tokens of one choice, or of one chunk of it."""

    content: list[TokenLogprob]
    refusal: None

    @classmethod
    def of(cls, tokens: tuple[TokenInfo, ...]) -> Self:
        """Finite, whatever the tokens were."""
        return cls(
            content=[
                TokenLogprob(
                    token=token.text,
                    logprob=finite_logprob(token.logprob),
                    bytes=list(token.text.encode("utf-8", "replace") if token.data is None else token.data),
                    top_logprobs=[],
                )
                for token in tokens
            ],
            refusal=None,
        )


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One completion."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: ServedFinishReason


class ChatCompletion(BaseModel):
    """The answer, whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    """`model@version`: which weights answered."""


class ChoiceDelta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """One completion's part of a chunk."""

    index: int
    delta: ChoiceDelta
    logprobs: Logprobs | None
    finish_reason: ServedFinishReason | None


class ChatChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str


class ModelCard(BaseModel):
    """One model or adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """Base model that it runs on."""
    parent: str | None
    """Base model that an adapter was trained on; null for a base."""
    step: int
    """Training step of its newest version; 0 for a base."""


class ModelList(BaseModel):
    """All of them, the base first."""

    object: Literal["list"]
    data: list[ModelCard]
