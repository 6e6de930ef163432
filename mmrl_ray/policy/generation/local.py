"""The engine of this process: the policy itself, with the decode loop of `decode.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from mmrl_ray.policy.generation.base import Capabilities, DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.policy.generation.decode import Decoder, decode_endlessly, decode_groups
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.vision import VisionCache, give_back

_SHARE = 0.4
"""Of a GPU's free memory, for rows and for one pass of prompts each: pictures, scoring and gaps take the rest."""
_PROMPT_TOKENS = 1024
"""Assumed of a prompt, the pictures' tokens among them; where several rows share one they need less."""
_LOGIT_BYTES = 24
"""Of a row and word of the vocabulary, from the head's product to the sums that a token is drawn by, in float64."""


class DecodeLimits(NamedTuple):
    """How much a decode loop takes on at a time."""

    max_rows: int = 256
    """Completions."""
    prefill_tokens: int = 32768
    """Prompt tokens of one pass."""

    @classmethod
    def of(cls, policy: Policy, new_tokens: int) -> DecodeLimits:
        """What a GPU has memory for now, with the policy on it; fixed numbers on a CPU.

        `new_tokens` is what a completion may have.
        """
        if policy.device.type != "cuda":
            return cls()
        free, _ = torch.cuda.mem_get_info(policy.device)
        return cls.within(policy, int(_SHARE * free), new_tokens)

    @classmethod
    def within(cls, policy: Policy, budget: int, new_tokens: int) -> DecodeLimits:
        """What `budget` bytes are enough for: more rows than by default, and no longer passes, which gain nothing."""
        text = policy.hf_model.config.get_text_config()
        row = (_PROMPT_TOKENS + new_tokens) * policy.key_bytes + _LOGIT_BYTES * policy.vocab_size
        # Beside its keys a token has some hidden states and three of the MLP's width in use.
        inner = getattr(text, "intermediate_size", None) or 4 * policy.hidden_size
        token = policy.key_bytes + policy.dtype.itemsize * (8 * policy.hidden_size + 3 * inner)
        most = cls()
        return cls(max(1, min(4 * most.max_rows, budget // row)), max(1, min(most.prefill_tokens, budget // token)))


class LocalEngine(GenerationEngine):
    """Decodes with a policy that others in this process may use too, between two calls."""

    name = "local"
    capabilities = Capabilities(
        value_guided=True, greedy_extra=True, vision_features=True, exact_logprobs=True, reproducible=True
    )

    def __init__(
        self, policy: VersionedPolicy, cache: VisionCache, *, max_rows: int, prefill_tokens: int | None = None
    ) -> None:
        """`max_rows` completions are decoded at the same time, prompts of `prefill_tokens` encoded by one pass; `cache`
        is shared with the scorer."""
        self._policy = policy
        self._cache = cache
        # Features that change with every version are not kept.
        kept = None if policy.adapts_vision else cache
        tokens = DecodeLimits().prefill_tokens if prefill_tokens is None else prefill_tokens
        self._decoder = Decoder(policy.policy, vision_cache=kept, max_rows=max_rows, prefill_tokens=tokens)

    def load(self, version: int, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Puts the weights on the policy, for whoever else uses it, too."""
        self._policy.load(version, weights)

    def _generate(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        with self._policy.merged():
            return decode_groups(self._decoder, requests)

    def give_back(self) -> None:
        """Vision features, and what keys and values took."""
        give_back(self._policy.policy.device, self._cache)

    def sample_for_comparison(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        """Without an end, so that there is a log-prob everywhere, and by a decoder of its own."""
        return decode_endlessly(self._policy.policy, requests)
