"""Qwen2.5-VL in the shape of its 3 B checkpoint, or smaller, made from its config: no weights and no network.

The processor is the family's own, on a word-level tokenizer made on the spot; the vocabulary keeps the checkpoint's
size, which is what memory and time depend on.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import (
    Completion,
    EncodedPrompt,
    GroupKey,
    RewardBreakdown,
    RolloutGroup,
    SamplingParams,
    ScoredGroup,
    StepPlan,
    VisionFeatures,
)
from mmrl_ray.experience.plan import build_step_plan
from mmrl_ray.policy.load import accelerate, assemble
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.tiny import words_of
from mmrl_ray.policy.tokens import NoVideo, stills_only
from tests.support.word_tokenizer import special_tokens, word_tokenizer

PROMPT = "describe the image in one sentence ."
_NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ p['text'] }}{% endif %} {% endfor %}{% endif %}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
_TEXT_3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
_VISION_3B = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
HALF = {"text": {"hidden_size": 1536, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 12}}
"""About half the 3 B shape's weights."""
SMALL = {
    "text": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"vocab_size": 512, "rope_parameters": {**_TEXT_3B["rope_parameters"], "mrope_section": [4, 6, 6]}},
    "vision": {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "fullatt_block_indexes": [1]},
}
"""Seconds on a CPU."""


def config(sizes: dict[str, dict[str, Any]] | None = None) -> Qwen2_5_VLConfig:
    """Of the 3 B checkpoint, with `sizes` ("text", "vision") over its own."""
    sizes = sizes or {}
    text = {**_TEXT_3B, **sizes.get("text", {})}
    ids = {token: i for i, token in enumerate(special_tokens(_NAMED))}
    return Qwen2_5_VLConfig(
        text_config={**text, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, "tie_word_embeddings": True},
        vision_config={**_VISION_3B, **sizes.get("vision", {}), "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=True,
        **{f"{name}_id": ids[token] for name, token in _NAMED.items()},
    )


def processor(max_tokens: int = 512) -> Any:
    """At most `max_tokens` a picture, each of 28 × 28 pixels, as configs/qwen2.5-vl-3b-coco.yaml has it."""
    words = words_of(["user assistant a picture of one red cat dog on the left :", PROMPT])
    tokenizer = word_tokenizer(words, _NAMED)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * max_tokens}
    images = Qwen2VLImageProcessorPil(size=size, patch_size=14)
    return stills_only(Qwen2_5_VLProcessor)(images, tokenizer, NoVideo(), chat_template=_TEMPLATE)


def make_policy(
    device: str,
    dtype: torch.dtype,
    sizes: dict[str, dict[str, Any]] | None = None,
    *,
    accelerated_for: str | None = None,
    seed: int = 0,
) -> Policy:
    """A policy without adapter, its weights random and made on `device`; on "meta" there are none.

    `accelerated_for` is `device` where it is not given.
    """
    made = config(sizes)
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(made, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2)
    acceleration = accelerate(model, torch.device(accelerated_for or device))
    name = "Qwen2.5-VL of random weights"
    policy = assemble(model, processor(), made, ModelSection(path=name), name, torch.device(device), dtype)
    policy.acceleration = acceleration
    return policy


def samples(count: int, *, width: int = 560, height: int = 560) -> list[Sample]:
    """Pictures of noise, each of (width ÷ 28) × (height ÷ 28) tokens."""
    made = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        made.append(Sample(id=f"noise-{i}", images=(buffer.getvalue(),), prompt=PROMPT))
    return made


def groups_of(
    sample: Sample, prompts: Sequence[EncodedPrompt], features: VisionFeatures | None, *, size: int, tokens: int
) -> list[RolloutGroup]:
    """A group of `size` completions of `tokens` random tokens behind each prompt, drawn from no policy."""
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(max_new_tokens=tokens)

    def completion() -> Completion:
        ids = torch.randint(len(special_tokens(_NAMED)), 100, (tokens,), generator=generator)
        logprobs = torch.full((tokens,), -4.0)
        return Completion(ids, logprobs, "", "length", logprobs)

    return [
        RolloutGroup(sample, prompt, tuple(completion() for _ in range(size)), 0, sampling, vision=features)
        for prompt in prompts
    ]


def plan_of(groups: Sequence[RolloutGroup], learner: LearnerSection, *, policy_version: int = 0) -> StepPlan:
    """Step 1 of these groups for one learner; of version 1 they are on-policy, and held against the sampler."""
    scored = [
        ScoredGroup(
            key=GroupKey(1, i),
            sample_id=group.sample.id,
            policy_version=policy_version,
            prompt_tokens=group.prompt.input_ids.numel(),
            completion_tokens=tuple(c.token_ids.numel() for c in group.completions),
            rewards=tuple(
                RewardBreakdown(float(j), {"r": float(j)}, {"r": 1.0}) for j in range(len(group.completions))
            ),
            payload=group,
        )
        for i, group in enumerate(groups)
    ]
    longest = max(c.token_ids.numel() for group in groups for c in group.completions)
    return build_step_plan(1, scored, learner=learner, max_new_tokens=longest, world_size=1)
