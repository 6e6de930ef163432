"""What a rollout engine asks of the policy, and the real thing: a model with its adapter, decoder and vision cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from mmrl_ray.analysis.attribution import caption_states
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import CaptionState, Completion, EncodedPrompt, VisionFeatures
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, GroupOutput, decode_groups
from mmrl_ray.policy.heads import decoding_heads, split_heads
from mmrl_ray.policy.lora.adapter import MergedAdapter, adapter_state, load_adapter_state, reference_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import Comparison, choose_path
from mmrl_ray.policy.prompts import check_context, encode_caption, encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import VisionCache, vision_features

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """The policy as a rollout engine sees it."""

    @property
    def ships_vision(self) -> bool:
        """Whether the vision features of a group may travel to the learner."""
        ...

    def load(self, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Makes these the adapter's weights; None: as it was made. With them may come value heads, or none."""
        ...

    def encode(self, sample: Sample, max_new_tokens: int) -> EncodedPrompt:
        """One prompt, with room for its completions.

        Raises:
            DataError, ModelError: this sample cannot be used.
        """
        ...

    def decode(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        """Completions of each request, in order."""
        ...

    def reference_logprobs(
        self, prompts: Sequence[EncodedPrompt], outputs: Sequence[GroupOutput], temperature: float
    ) -> list[list[torch.Tensor]]:
        """float32 [T] of each completion of each group, under the policy without its adapter."""
        ...

    def states(self, prompts: Sequence[EncodedPrompt], outputs: Sequence[GroupOutput]) -> list[CaptionState | None]:
        """What each group's first completion looks like from inside (`analysis/attribution.py`), where that can be
        told."""
        ...

    def features(self, prompts: Sequence[EncodedPrompt]) -> list[VisionFeatures] | None:
        """What the vision tower makes of each prompt's pictures; None where features do not travel."""
        ...

    def text_of(self, tokens: torch.Tensor) -> str:
        """The caption that tokens int64 [T] say."""
        ...

    def caption_tokens(self, text: str) -> torch.Tensor:
        """int64 [T] of a caption that was not sampled, its end token included.

        Raises:
            DataError: it holds a special token.
        """
        ...

    def score_captions(
        self,
        prompts: Sequence[EncodedPrompt],
        captions: Sequence[Sequence[str]],
        temperature: float,
        *,
        under_policy: bool,
    ) -> list[GroupOutput]:
        """Captions that were not sampled as the completions of a group, with their reference log-probs.

        Their `logprobs` are the policy's, or with `under_policy` off the reference's once more: who wrote them is not
        known, so that there is no behaviour policy.
        """
        ...

    def counters(self) -> dict[str, float]:
        """`vision_hits`, `vision_misses` since the last call, and `naive_path` 1 or 0."""
        ...


class PolicyBackend:
    """A `Backend` on a loaded policy with an adapter. One thread at a time."""

    def __init__(self, policy: Policy, *, vision_cache_bytes: int, max_rows: int, temperature: float) -> None:
        """`max_rows` completions are decoded at the same time; `temperature` is for the start-up check of the path."""
        self.policy = policy
        # An adapter on the vision tower changes the features with every version: neither kept nor shipped then.
        self._vision_trains = policy.vision_trainable
        self._cache = VisionCache(vision_cache_bytes)
        policy.model.requires_grad_(False)
        self._as_made = adapter_state(policy.model)
        self._merged = MergedAdapter(policy.model) if policy.dtype == torch.float32 else None
        self._decoder = Decoder(policy, vision_cache=None if self._vision_trains else self._cache, max_rows=max_rows)
        self._temperature = temperature
        self._choice: Comparison | None = None
        self._counted = (0, 0)

    @property
    def ships_vision(self) -> bool:
        """See `Backend`."""
        return self.policy.inject_vision and not self._vision_trains

    def load(self, weights: Mapping[str, torch.Tensor] | None) -> None:
        """See `Backend`.

        Raises:
            AdapterError: the weights do not fit the adapter, or the value heads the model.
        """
        adapter, heads = split_heads(self._as_made if weights is None else weights)
        load_adapter_state(self.policy.model, adapter)
        self.policy.value_heads.clear()
        if heads:
            self.policy.value_heads[None] = decoding_heads(self.policy, heads)
        if self._merged is not None:
            self._merged.refresh()

    def encode(self, sample: Sample, max_new_tokens: int) -> EncodedPrompt:
        """See `Backend`."""
        (prompt,) = encode_prompts(self.policy, [sample])
        check_context(self.policy, prompt, max_new_tokens)
        return prompt

    def decode(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        """See `Backend`."""
        self._check_path([request.prompt for request in requests[:2]])
        with self._adapted():
            return decode_groups(self._decoder, requests)

    def reference_logprobs(
        self, prompts: Sequence[EncodedPrompt], outputs: Sequence[GroupOutput], temperature: float
    ) -> list[list[torch.Tensor]]:
        """See `Backend`."""
        # Features that the adapter had a part in are not the reference's.
        vision = [output.vision for output in outputs if output.vision is not None and not self._vision_trains]
        features = vision if len(vision) == len(outputs) else None
        completions = [[c.token_ids for c in output.completions] for output in outputs]
        with reference_policy(self.policy.model):
            return self._logprobs(prompts, features, completions, temperature)

    def features(self, prompts: Sequence[EncodedPrompt]) -> list[VisionFeatures] | None:
        """See `Backend`."""
        return vision_features(self.policy, prompts, self._cache) if self.ships_vision else None

    def text_of(self, tokens: torch.Tensor) -> str:
        """See `Backend`."""
        return str(self.policy.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def caption_tokens(self, text: str) -> torch.Tensor:
        """See `Backend`."""
        return encode_caption(self.policy, text)

    def score_captions(
        self,
        prompts: Sequence[EncodedPrompt],
        captions: Sequence[Sequence[str]],
        temperature: float,
        *,
        under_policy: bool,
    ) -> list[GroupOutput]:
        """See `Backend`."""
        features = self.features(prompts)
        tokens = [[self.caption_tokens(text) for text in group] for group in captions]
        with reference_policy(self.policy.model):
            reference = self._logprobs(prompts, features, tokens, temperature)
        own = self._logprobs(prompts, features, tokens, temperature) if under_policy else reference
        return [
            GroupOutput(
                completions=tuple(
                    Completion(ids, logprobs, text, "stop", referenced)
                    for ids, logprobs, text, referenced in zip(*group, strict=True)
                ),
                greedy=None,
                vision=None if features is None else features[i],
            )
            for i, group in enumerate(zip(tokens, own, captions, reference, strict=True))
        ]

    @torch.no_grad()
    def _logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        features: Sequence[VisionFeatures] | None,
        completions: Sequence[Sequence[torch.Tensor]],
        temperature: float,
    ) -> list[list[torch.Tensor]]:
        """float32 [T] of each completion of each group, under the policy as it stands."""
        path = self._check_path(prompts[:2]).path
        scores = score_completions(self.policy, prompts, features, completions, temperature, path=path)
        rows = iter(zip(scores.logprobs.cpu(), scores.mask.cpu(), strict=True))
        return [[_valid(*next(rows)) for _ in group] for group in completions]

    def states(self, prompts: Sequence[EncodedPrompt], outputs: Sequence[GroupOutput]) -> list[CaptionState | None]:
        """See `Backend`."""
        vision = [output.vision for output in outputs if output.vision is not None]
        features = vision if len(vision) == len(outputs) else None
        captions = [output.completions[0].token_ids for output in outputs]
        try:
            with self._adapted():
                return [*caption_states(self.policy, prompts, features, captions)]
        except ModelError as error:
            logger.warning("captions are evaluated without their states: %s", error)
            return [None] * len(prompts)

    def counters(self) -> dict[str, float]:
        """See `Backend`."""
        hits, misses = self._counted
        self._counted = (self._cache.hits, self._cache.misses)
        naive = self._choice is not None and self._choice.path == "naive"
        return {
            "vision_hits": self._cache.hits - hits,
            "vision_misses": self._cache.misses - misses,
            "naive_path": int(naive),
        }

    def _adapted(self) -> AbstractContextManager[None]:
        """Within it the adapter is merged, where that saves time."""
        return self._merged.active() if self._merged is not None else nullcontext()

    def _check_path(self, prompts: Sequence[EncodedPrompt]) -> Comparison:
        """Once, on the first prompts that come: they are real ones."""
        if self._choice is None:
            self._choice = choose_path(self.policy, prompts, temperature=self._temperature)
            logger.warning("scoring path: %s (%s)", self._choice.path, self._choice.reason)
        return self._choice


def _valid(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return logprobs[mask].float().clone()
