"""OpenAI's chat completions as far as they are served here: requests, answers, their chunks, and models.

Requests are read strictly: a parameter that would change the answer and is not served here is refused, one that changes
nothing is taken and ignored, and one that nobody knows is refused too, for it is most likely misspelt.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.serving.http_errors import TAG, wrong_parameter
from mmrl_ray.serving.protocols import Role, ServedFinishReason, TokenInfo

_GREEDY_BELOW = 1e-3
"""A temperature so low that only rounding errors would compete with the likeliest token."""
_SEEDS = 2**64
_LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for a probability of nothing; JSON has no infinity."""


class Strict(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Reply(BaseModel):
    """What a client is sent: every key is there, those that are always the same as well."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


def _list_tag(value: Any) -> str:
    return TAG + ("list" if isinstance(value, list) else "text")


TextOrTexts = Annotated[
    Annotated[str, Tag(TAG + "text")] | Annotated[list[str], Tag(TAG + "list")], Discriminator(_list_tag)
]


class Sampled(Strict):
    """How completions are drawn."""

    n: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**64)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    """0 takes the likeliest token."""
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=2**31)] = None
    """Not OpenAI's; 0 and -1 keep every token."""
    min_tokens: Annotated[int | None, Field(ge=0)] = None
    """Not OpenAI's; by default what the model's generation config says."""
    stop: TextOrTexts | None = None
    """Up to 4 texts that end a completion and are not part of it."""

    # Other servers' parameters, served only with the value that changes nothing.
    min_p: Annotated[float | None, Field(ge=0, le=0, description="Not served.")] = None
    typical_p: Annotated[float | None, Field(ge=1, le=1, description="Not served.")] = None
    repetition_penalty: Annotated[float | None, Field(ge=1, le=1, description="Not served.")] = None
    length_penalty: Annotated[float | None, Field(ge=1, le=1, description="Not served.")] = None
    best_of: Annotated[Literal[1] | None, Field(description="Not served.")] = None
    use_beam_search: Annotated[Literal[False] | None, Field(description="Not served.")] = None
    ignore_eos: Annotated[Literal[False] | None, Field(description="Not served.")] = None
    skip_special_tokens: Annotated[Literal[True] | None, Field(description="Always so.")] = None
    spaces_between_special_tokens: Any = None
    """Taken and ignored: no special tokens are shown."""
    stop_token_ids: Annotated[list[Any] | None, Field(max_length=0, description="Not served.")] = None
    include_stop_str_in_output: Annotated[Literal[False] | None, Field(description="Not served.")] = None

    @field_validator("stop", mode="after")
    @classmethod
    def _stops_fit(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop == "" or (isinstance(stop, list) and (len(stop) > 4 or not all(stop))):
            raise ValueError("send up to 4 texts, none of them empty")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop`, always as several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, max_tokens: int, temperature: float) -> SamplingParams:
        """What the policy is asked for; `temperature` where the request names none. Without a seed, a random one."""
        chosen = temperature if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        greedy = chosen < _GREEDY_BELOW or top_p == 0
        return SamplingParams(
            temperature=1.0 if greedy else chosen,
            max_new_tokens=max_tokens,
            min_new_tokens=None if self.min_tokens is None else min(self.min_tokens, max_tokens),
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if greedy else top_p,
            greedy=greedy,
            stop=self.stops,
            seed=secrets.randbits(63) if self.seed is None else self.seed % _SEEDS,
        )


class ImageUrl(Strict):
    """Where a picture is."""

    url: str
    """`data:image/png;base64,…`, or an `https://` URL where the server allows it."""
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Taken and ignored: the model's processor decides."""


class _Part(Strict):
    """What other servers' clients say of any part; taken and ignored."""

    cache_control: Any = None
    uuid: Any = None


class TextPart(_Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(_Part):
    """A picture."""

    type: Literal["image_url"]
    image_url: Annotated[
        ImageUrl,
        BeforeValidator(lambda v: {"url": v} if isinstance(v, str) else v, json_schema_input_type=ImageUrl | str),
    ]
    """A URL alone stands for an object with it."""


def _part_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return TAG + str(kind)


Part = Annotated[
    Annotated[TextPart, Tag(TAG + "text")] | Annotated[ImagePart, Tag(TAG + "image_url")],
    Discriminator(
        _part_tag,
        custom_error_type="unknown_part",
        custom_error_message='type must be "text" or "image_url"',
    ),
]
Content = Annotated[
    Annotated[str, Tag(TAG + "text")] | Annotated[list[Part], Field(fail_fast=True), Tag(TAG + "list")],
    Discriminator(_list_tag),
]


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    """An assistant's may be left out, and is empty then."""
    name: str | None = None
    """Taken and ignored."""
    cache_control: Any = None
    """Taken and ignored."""
    tool_calls: Annotated[list[Any] | None, Field(max_length=0, description="Not served.")] = None
    annotations: Any = None
    """Of an answer that comes back; taken and ignored."""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise wrong_parameter("content", "this parameter is required", code="missing_required_parameter")
        return self

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """`content`, always as parts."""
        content = self.content or ""
        return [TextPart(type="text", text=content)] if isinstance(content, str) else content

    @property
    def turn_role(self) -> Role:
        """As the policy knows it."""
        return "system" if self.role == "developer" else self.role


class StreamOptions(Strict):
    """What a stream holds beside text."""

    include_usage: bool | None = None
    """End with a chunk that counts the tokens."""
    include_obfuscation: bool | None = None
    """Taken and ignored."""


class TextFormat(Strict):
    """The only format there is."""

    type: Literal["text"]


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Log-probabilities of the distribution that was drawn from."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Ignored without `stream`."""
    add_generation_prompt: Annotated[Literal[True] | None, Field(description="Always so.")] = None
    continue_final_message: Annotated[Literal[False] | None, Field(description="Not served.")] = None
    echo: Annotated[Literal[False] | None, Field(description="Not served.")] = None

    # Served only with the value that changes nothing.
    top_logprobs: Annotated[Literal[0] | None, Field(description="Not served.")] = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=0, description="Not served.")] = None
    presence_penalty: Annotated[float | None, Field(ge=0, le=0, description="Not served.")] = None
    logit_bias: Annotated[dict[str, float] | None, Field(max_length=0, description="Not served.")] = None
    tools: Annotated[list[Any] | None, Field(max_length=0, description="Not served.")] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, Field(description="Not served.")] = None
    functions: Annotated[list[Any] | None, Field(max_length=0, description="Not served.")] = None
    function_call: Annotated[Literal["none", "auto"] | None, Field(description="Not served.")] = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None

    # Taken and ignored: they change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise wrong_parameter("max_completion_tokens", "it is another name of max_tokens: send one of them")
        return self

    @property
    def token_limit(self) -> int | None:
        """Tokens of a completion, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


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


class AnswerMessage(Reply):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One completion."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: ServedFinishReason


class ChatCompletion(Reply):
    """The answer, whole."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
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


class ModelCard(Reply):
    """One model or adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mmrl_ray"
    root: str
    """Base model that it runs on."""
    parent: str | None
    """Base model that an adapter was trained on; null for a base."""
    step: int
    """Training step of its newest version; 0 for a base."""


class ModelList(Reply):
    """All of them, the base first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
