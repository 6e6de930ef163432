"""The engine of this process: the policy itself, with the decode loop of `decode.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mmrl_ray.policy.generation.base import Capabilities, DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.policy.generation.decode import Decoder, decode_endlessly, decode_groups
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.memory import DecodeLimits
from mmrl_ray.policy.vision import VisionCache, give_back


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
