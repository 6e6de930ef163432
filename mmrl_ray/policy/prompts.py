"""Samples to encoded prompts: chat template, processor, and what a user may not write."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from mmrl_ray.data.images import decode_image
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ContextLengthError, DataError, ModelError
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.load import Policy

PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
"""Processor outputs with one value a token; everything else belongs to images."""


def encode_prompts(policy: Policy, samples: Sequence[Sample]) -> list[EncodedPrompt]:
    """One encoded prompt a sample: its images, then its text, then the opening of the assistant's turn.

    Raises:
        DataError: a prompt holds a special token, or a sample has no image.
        ImageError: an image cannot be decoded.
        ModelError: the processor made no place for the image.
    """
    return [_encode(policy, sample) for sample in samples]


def encode_caption(policy: Policy, text: str) -> torch.Tensor:
    """Token ids int64 [T] of an assistant's turn that says `text`, its end token included.

    Raises:
        DataError: the text holds a special token.
    """
    _refuse_reserved(text, policy.reserved_texts, "caption")
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([*ids, policy.end_id], dtype=torch.int64)


def check_context(policy: Policy, prompt: EncodedPrompt, max_new_tokens: int) -> None:
    """Refuses a prompt that leaves no room for its longest completion.

    Raises:
        ContextLengthError: prompt and completion exceed the model's context.
    """
    length = prompt.input_ids.numel()
    if length + max_new_tokens > policy.context_length:
        raise ContextLengthError(
            f"prompt of {length} tokens plus max_new_tokens={max_new_tokens} exceeds the model's context of "
            f"{policy.context_length}; shorten the prompt, lower rollout.max_new_tokens or use smaller images"
        )


def without_pixels(prompt: EncodedPrompt) -> EncodedPrompt:
    """The same prompt without its pixel tensors: all that is needed when its vision features travel with it."""
    return replace(prompt, model_inputs={k: v for k, v in prompt.model_inputs.items() if not k.startswith("pixel")})


def image_key(policy: Policy, images: Sequence[bytes]) -> str:
    """32 hex digits naming these images under this processor and these weights."""
    digest = hashlib.sha256(policy.revision_key.encode())
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:32]


def _encode(policy: Policy, sample: Sample) -> EncodedPrompt:
    if not sample.images:
        raise DataError(f"sample {sample.id!r} has no image")
    _refuse_reserved(sample.prompt, policy.reserved_texts, f"prompt of sample {sample.id!r}")
    content = [{"type": "image"} for _ in sample.images] + [{"type": "text", "text": sample.prompt}]
    processor = policy.processor
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    mark = getattr(processor, "image_token", None)
    if isinstance(mark, str) and text.count(mark) != len(sample.images):
        raise ModelError(
            f"model {policy.path!r}: its chat template put {text.count(mark)} image tokens {mark!r} into a prompt of "
            f"{len(sample.images)} images; its processor and its template do not fit together"
        )
    images = [decode_image(image) for image in sample.images]
    # Templates that write the beginning-of-sequence token themselves must not get a second one.
    bos = policy.tokenizer.bos_token
    try:
        encoded = processor(
            text=[text],
            images=[images],
            return_tensors="pt",
            return_mm_token_type_ids=True,
            add_special_tokens=not (bos and text.startswith(bos)),
            **({"images_kwargs": policy.processor_settings} if policy.processor_settings else {}),
        )
    except ValueError as error:
        sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
        raise DataError(f"sample {sample.id!r} (images {sizes}): the processor refuses it: {error}") from error
    input_ids = encoded["input_ids"][0]
    inputs = {
        name: value[0] if name in PER_TOKEN else value
        for name, value in encoded.items()
        if name not in ("input_ids", "attention_mask") and isinstance(value, torch.Tensor)
    }
    return EncodedPrompt(input_ids=input_ids, model_inputs=inputs, image_key=image_key(policy, sample.images))


def _refuse_reserved(text: str, reserved: Sequence[str], what: str) -> None:
    found = next((token for token in reserved if token in text), None)
    if found is not None:
        raise DataError(f"{what} contains the special token {found!r}; remove it: such tokens are the model's own")
