"""What a rollout engine asks of the policy beside samples: prompts, log-probs of given completions, states, features.

None of it depends on what samples: the scorer's model is in this process, and the same as the learner's. Only the
comparison at start, which says how completions are scored, holds the engine that samples against it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mmrl_ray.analysis.attribution import caption_states
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import CaptionState, Completion, EncodedPrompt, VisionFeatures
from mmrl_ray.policy.generation.base import DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.policy.lora.adapter import reference_policy
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.parity import Comparison, choose_path
from mmrl_ray.policy.prompt_pool import PromptPool
from mmrl_ray.policy.prompts import check_context, encode_caption
from mmrl_ray.policy.scoring.prefix import score_in_parts
from mmrl_ray.policy.vision import VisionCache, vision_features

logger = logging.getLogger(__name__)

_KEPT_BYTES = 64 << 20
"""Of prompts that will be asked for again, those of held-out samples."""


class Scorer:
    """Scores with a loaded policy. One thread at a time."""

    def __init__(
        self,
        policy: VersionedPolicy,
        cache: VisionCache,
        *,
        temperature: float,
        engine: GenerationEngine | None = None,
        prompts: PromptPool | None = None,
    ) -> None:
        """`temperature` and `engine`, which samples in this run, are for the comparison at start.

        `cache` may be the engine's, too. `prompts` makes the prompts, by default in this thread.
        """
        self._versions = policy
        self.policy = policy.policy
        self._cache = cache
        self._temperature = temperature
        self._engine = engine
        self._choice: Comparison | None = None
        self._prompts = prompts or PromptPool(policy.policy)
        self._counted = (0, 0, 0)
        self._kept: dict[tuple[str, str, tuple[bytes, ...]], EncodedPrompt] = {}
        self._kept_bytes = 0

    @property
    def ships_vision(self) -> bool:
        """Whether the vision features of a group may travel to the learner."""
        return self.policy.inject_vision and not self._versions.adapts_vision

    def load(self, version: int, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Makes these the weights that states and captions are scored with; see `GenerationEngine.load`."""
        self._versions.load(version, weights)

    def prepare(self, samples: Sequence[Sample]) -> None:
        """These are what `encode` will be asked for, in about this order."""
        self._prompts.prepare(samples)

    def encode(self, sample: Sample, max_new_tokens: int, *, again: bool = False) -> EncodedPrompt:
        """One prompt, with room for its completions; kept for the next time where it will be asked for `again`.

        Raises:
            DataError, ModelError: this sample cannot be used.
        """
        # Where processes make them beside the model's work, once more costs nothing.
        prompt = self._kept_prompt(sample) if again and not self._prompts.processes else self._prompts.encode(sample)
        check_context(self.policy, prompt, max_new_tokens)
        return prompt

    def _kept_prompt(self, sample: Sample) -> EncodedPrompt:
        key = (sample.id, sample.prompt, sample.images)
        if (prompt := self._kept.get(key)) is None:
            prompt = self._prompts.encode(sample)
            tensors = [prompt.input_ids, *prompt.model_inputs.values()]
            size = sum(map(len, sample.images)) + sum(tensor.nbytes for tensor in tensors)
            # Asked for in turns: what was kept last would be let go of before it is wanted.
            if self._kept_bytes + size <= _KEPT_BYTES:
                self._kept[key] = prompt
                self._kept_bytes += size
        return prompt

    def check_path(self, prompts: Sequence[EncodedPrompt]) -> Comparison:
        """How completions are scored: found out once, on the first prompts that come, since they are real ones.

        Raises:
            ModelError: sampler, learner and transformers' own forward do not agree.
        """
        if self._choice is None:
            self._choice = choose_path(self.policy, prompts[:2], temperature=self._temperature, engine=self._engine)
            dearer = ", which runs a prompt once for each of its completions" if self._choice.path == "naive" else ""
            logger.warning("scoring path: %s%s (%s)", self._choice.path, dearer, self._choice.reason)
        return self._choice

    def with_greedy_logprobs(
        self, requests: Sequence[DecodeRequest], outputs: Sequence[GroupOutput]
    ) -> list[GroupOutput]:
        """The groups with the policy's log-probs of their greedy completions, at the temperature of their requests.

        For an engine that has those of temperature 1 (`Capabilities.greedy_logprobs`); all requests are at one.
        """
        made = list(outputs)
        wanted = [
            (i, (*(o.completions if r.sampling.greedy else ()), *(() if o.greedy is None else (o.greedy,))))
            for i, (r, o) in enumerate(zip(requests, outputs, strict=True))
            if r.sampling.temperature != 1.0
        ]
        if not any(rows for _, rows in wanted):
            return made
        features = None if self._versions.adapts_vision else _features_of(outputs)
        found = self._logprobs(
            [requests[i].prompt for i, _ in wanted],
            None if features is None else [features[i] for i, _ in wanted],
            [[completion.token_ids for completion in rows] for _, rows in wanted],
            requests[0].sampling.temperature,
        )
        for (i, rows), logprobs in zip(wanted, found, strict=True):
            scored = [replace(row, logprobs=each) for row, each in zip(rows, logprobs, strict=True)]
            greedy = None if made[i].greedy is None else scored.pop()
            made[i] = replace(made[i], completions=tuple(scored) or made[i].completions, greedy=greedy)
        return made

    def reference_logprobs(
        self, prompts: Sequence[EncodedPrompt], outputs: Sequence[GroupOutput], temperature: float
    ) -> list[list[torch.Tensor]]:
        """float32 [T] of each completion of each group, under the policy without its adapter."""
        # Features that the adapter had a part in are not the reference's.
        features = None if self._versions.adapts_vision else _features_of(outputs)
        completions = [[c.token_ids for c in output.completions] for output in outputs]
        with reference_policy(self.policy.model):
            return self._logprobs(prompts, features, completions, temperature)

    def features(self, prompts: Sequence[EncodedPrompt]) -> list[VisionFeatures] | None:
        """What the vision tower makes of each prompt's pictures; None where features do not travel."""
        return vision_features(self.policy, prompts, self._cache) if self.ships_vision else None

    def text_of(self, tokens: torch.Tensor) -> str:
        """The caption that tokens int64 [T] say."""
        return str(self.policy.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def caption_tokens(self, text: str) -> torch.Tensor:
        """int64 [T] of a caption that was not sampled, its end token included.

        Raises:
            DataError: it holds a special token.
        """
        return encode_caption(self.policy, text)

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

    def policy_logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        completions: Sequence[Sequence[torch.Tensor]],
        temperature: float,
    ) -> list[list[torch.Tensor]]:
        """float32 [T] of each completion of each prompt, under the version that is loaded."""
        features = self.features(prompts)
        with self._versions.merged():
            return self._logprobs(prompts, features, completions, temperature)

    def states(self, prompts: Sequence[EncodedPrompt], outputs: Sequence[GroupOutput]) -> list[CaptionState | None]:
        """`caption_states` of each group's first completion (`analysis/attribution.py`), where they can be told."""
        captions = [output.completions[0].token_ids for output in outputs]
        try:
            with self._versions.merged():
                return [*caption_states(self.policy, prompts, _features_of(outputs), captions)]
        except ModelError as error:
            logger.warning("captions are evaluated without their states: %s", error)
            return [None] * len(prompts)

    def counters(self) -> dict[str, float]:
        """`vision_hits`, `vision_misses` and `prompts_ahead` since the last call, and `naive_path` 1 or 0."""
        hits, misses, ahead = self._counted
        self._counted = (self._cache.hits, self._cache.misses, self._prompts.ahead)
        naive = self._choice is not None and self._choice.path == "naive"
        return {
            "vision_hits": self._cache.hits - hits,
            "vision_misses": self._cache.misses - misses,
            "prompts_ahead": self._prompts.ahead - ahead,
            "naive_path": int(naive),
        }

    @torch.no_grad()
    def _logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        features: Sequence[VisionFeatures] | None,
        completions: Sequence[Sequence[torch.Tensor]],
        temperature: float,
    ) -> list[list[torch.Tensor]]:
        """float32 [T] of each completion of each group, under the policy as it stands."""
        path = self.check_path(prompts).path
        return score_in_parts(self.policy, prompts, features, completions, temperature, path=path)


def _features_of(outputs: Sequence[GroupOutput]) -> list[VisionFeatures] | None:
    """Those that came with the groups, if they came with all of them."""
    features = [output.vision for output in outputs if output.vision is not None]
    return features if len(features) == len(outputs) else None
