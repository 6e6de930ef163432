"""What a generation engine does, and the values that go into one and come out.

    weights of a version ──load──▶ GenerationEngine
    DecodeRequest, one a group ──generate──▶ GroupOutput: completions with the log-probs they were drawn with

That is all: prompts are encoded, completions given by others are scored, and states and reference log-probs are made
by the scorer (`rollouts/scorer.py`), whatever samples. What an engine cannot do it says in its `Capabilities`, and is
refused where that is asked for: by `require` at the start of a run, by `generate` for each request.

Log-probs are those of π, the distribution that the learner computes: the softmax at the request's temperature with
image tokens forbidden. The comparison at start (`policy/parity.py`) holds those of the run's engine against the
learner's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError
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
    """A group to sample: what `GenerationEngine.generate` takes, and `Decoder.admit` as a value."""

    prompt: EncodedPrompt
    n: int
    """Completions; all alike if `sampling.greedy`."""
    sampling: SamplingParams
    """For every one of them; completion i draws from the stream (sampling.seed, i)."""
    greedy_extra: bool = False
    """One more completion that takes the likeliest token each time, beside the n."""
    features: VisionFeatures | None = None
    """The prompt's vision features where the caller has them."""


@dataclass(frozen=True, slots=True)
class GroupOutput:
    """What became of one request."""

    completions: tuple[Completion, ...]
    """The n samples: tokens, behaviour log-probs, text, finish reason."""
    greedy: Completion | None
    vision: VisionFeatures | None
    """The features that its prompt was encoded with, from an engine that hands them on; None if it was cancelled
    before."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do beside sampling."""

    value_guided: bool
    """Decodes with log π + β(Q − V) (`SamplingParams.value_beta`), by value heads among the weights."""
    greedy_extra: bool
    """Gives a group's greedy completion in the same call (`DecodeRequest.greedy_extra`)."""
    vision_features: bool
    """Takes ready-made vision features and hands on those that it made, so that no other process makes them again."""
    exact_logprobs: bool
    """Log-probs differ from the learner's by no more than float rounding in the model's dtype."""
    reproducible: bool
    """The same requests under the same weights give the same tokens and log-probs, bit for bit on a CPU."""
    greedy_logprobs: bool = True
    """Log-probs of greedy completions are those at the request's temperature, too; if not, the scorer makes them."""


class GenerationEngine(ABC):
    """Samples completions of groups of prompts under one version of the weights. One thread at a time.

    Example: ::

        engine.load(3, weights)
        (group,) = engine.generate([DecodeRequest(prompt, n=8, sampling=SamplingParams(seed=1))])
        group.completions[0].logprobs  # float32 [T]
    """

    name: ClassVar[str]
    """What messages call it."""
    capabilities: ClassVar[Capabilities]
    remedy: ClassVar[str] = ""
    """Added to the message where its log-probs are not the model's: what to look at."""

    @abstractmethod
    def load(self, version: int, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Makes these the adapter's weights, with which every later request is answered.

        Args:
            version: of the policy. One version always has the same weights, so that an engine may keep what it made
                under a version, and must not use it under another.
            weights: as `adapter_state` names them, float32 on the CPU; with them may come value heads (`published`).
                None: the adapter as it was made.

        Raises:
            AdapterError: they do not fit; nothing may be generated then before another `load` went well.
        """

    @abstractmethod
    def _generate(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        """`generate`, for requests that ask for nothing but what the engine can do."""

    def give_back(self) -> None:  # noqa: B027 - an engine may keep nothing
        """Frees what is kept for later calls in the memory of a device that another process is going to use.

        By default there is nothing.
        """

    def prepared(self, prompt: EncodedPrompt, sample: Sample) -> EncodedPrompt:
        """The prompt of a sample with what this engine needs beside it; by default as it is."""
        return prompt

    def counters(self) -> dict[str, float]:
        """What the engine has counted since the last call, for the metrics of a step; by default nothing.

        `prefix_cache_queries` and `prefix_cache_hits` are tokens of prompts, `mm_cache_queries` and `mm_cache_hits`
        pictures.
        """
        return {}

    def close(self) -> None:  # noqa: B027 - an engine may hold nothing
        """Ends what the engine has beside this process; by default there is nothing."""

    def sample_for_comparison(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        """A few completions for the comparison at start: by default those that `generate` gives.

        An engine that can leaves out what ends them early or fills caches, but draws from the same distribution.
        """
        return self._generate(requests)

    @final
    def generate(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        """Completions of each request, in order.

        Raises:
            ConfigError: a request asks for what the engine cannot do, or its parameters are out of range.
            ContextLengthError: a prompt and its completions exceed the model's context.
            ModelError: the model gives NaN.
        """
        self.require(
            value_guided=any(request.sampling.value_beta > 0 for request in requests),
            greedy_extra=any(request.greedy_extra for request in requests),
        )
        return self._generate(requests)

    @final
    def require(self, *, value_guided: bool = False, greedy_extra: bool = False) -> None:
        """Refuses what is asked for and not offered.

        Raises:
            ConfigError: naming the engine, what it cannot do and the remedy.
        """
        if value_guided and not self.capabilities.value_guided:
            raise ConfigError(
                f"the {self.name} engine cannot decode by value heads (value_beta above 0): leave beta at 0, or use "
                "the local engine"
            )
        if greedy_extra and not self.capabilities.greedy_extra:
            raise ConfigError(
                f"the {self.name} engine gives no greedy completion beside the samples, which learner.advantage: "
                "greedy needs: choose another advantage, or use the local engine"
            )
