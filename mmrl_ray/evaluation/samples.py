"""Greedy captions of samples by a loaded policy and the one decode loop: of evaluations, and of warm starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mmrl_ray.analysis.attribution import caption_states
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ModelError
from mmrl_ray.evaluation.records import MAX_STATES
from mmrl_ray.experience.carriers import CaptionState, SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.generation.rules import GenerationRules
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.telemetry.terminal import ProgressFn

logger = logging.getLogger(__name__)

BATCH = 64
"""Images whose captions are decoded together."""


def caption_samples(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int = BATCH,
    beta: float = 0.0,
    states: list[CaptionState] | None = None,
    progress: ProgressFn | None = None,
    rules: GenerationRules | None = None,
    vision_cache: VisionCache | None = None,
) -> list[str]:
    """One greedy caption a sample, in order, of π or with `beta` of log π + β(Q − V).

    `states` is filled with the states of the first `MAX_STATES` of them, in order, where the model's can be told.
    With `rules` the captions are those that `generate` gives, penalties of the checkpoint and all. Features that are in
    `vision_cache` are not made again.

    Raises:
        DataError, ImageError: a sample cannot be encoded.
        ContextLengthError: a prompt leaves no room for `max_new_tokens`.
    """
    decoder = Decoder(policy, max_rows=max(1, batch_size), rules=rules, vision_cache=vision_cache)
    sampling = SamplingParams(greedy=True, max_new_tokens=max_new_tokens, min_new_tokens=None, value_beta=beta)
    captions: list[str] = []
    for start in range(0, len(samples), batch_size):
        prompts = encode_prompts(policy, samples[start : start + batch_size])
        outputs = decode_groups(decoder, [DecodeRequest(prompt, 1, sampling) for prompt in prompts])
        captions += [output.completions[0].caption for output in outputs]
        if states is not None and (left := MAX_STATES - start) > 0:
            vision = [output.vision for output in outputs[:left] if output.vision is not None]
            tokens = [output.completions[0].token_ids for output in outputs[:left]]
            try:
                found = caption_states(policy, prompts[:left], vision, tokens)
            except ModelError as error:
                logger.warning("captions without their states: %s", error)
                states = None
            else:
                states += found
        if progress is not None:
            progress(len(captions), len(samples), {})
    return captions
