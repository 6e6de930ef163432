"""Samples and conversations to encoded prompts: chat template, processor, and what a user may not write."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from mmrl_ray.data.images import decode_image
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ContextLengthError, DataError, ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, PromptSource
from mmrl_ray.policy.checkpoint import brief

if TYPE_CHECKING:  # a process that prepares prompts needs none of what trains
    from mmrl_ray.policy.model import Policy

Turns = Sequence[tuple[str, Sequence[str | int]]]
"""A conversation: for each message its role and its parts, texts and indices of images."""

PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Processor outputs with one value a token; everything else belongs to images."""
_HARMLESS = "a"


class Prompting(Protocol):
    """What of a `Policy` its prompts are made with."""

    processor: Any
    tokenizer: Any
    processor_settings: dict[str, Any]
    image_token_ids: tuple[int, ...]
    appended_ids: tuple[int, ...]
    reserved_texts: tuple[str, ...]
    revision_key: str
    path: str


def encode_prompts(
    policy: Prompting, samples: Sequence[Sample], decode: Callable[[bytes], Image.Image] = decode_image
) -> list[EncodedPrompt]:
    """One encoded prompt a sample: its images, then its text, then the opening of the assistant's turn.

    `decode` gives and raises what `decode_image` does.

    Raises:
        DataError: a prompt holds a special token, or a sample has no image.
        ImageError: an image cannot be decoded.
        ModelError: the processor made no place for the image.
    """
    prompts = []
    for sample in samples:
        what = f"sample {sample.id!r}"
        if not sample.images:
            raise DataError(f"{what} has no image")
        _check_text(policy, sample.prompt, f"prompt of {what}")
        turns = [("user", [*range(len(sample.images)), sample.prompt])]
        prompts.append(_encode(policy, turns, sample.images, what, decode=decode))
    return prompts


def encode_conversation(
    policy: Prompting, turns: Turns, images: Sequence[bytes], pictures: Sequence[Image.Image] | None = None
) -> EncodedPrompt:
    """A conversation that goes on with the assistant's turn.

    Args:
        policy: the model.
        turns: messages of the roles "system", "user" and "assistant".
        images: encoded files; each is named once, by a part of a user's message.
        pictures: what `decode_image` makes of them, where that has been done.

    Raises:
        DataError: a text holds a special token, several make one, a text is no Unicode, there is no image, images and
            parts do not match, or the chat template refuses this order of messages.
        ImageError: an image cannot be decoded.
        ModelError: the processor made no place for an image.
    """
    for i, (role, parts) in enumerate(turns):
        what = f"message {i} ({role})"
        if role != "user" and any(isinstance(part, int) for part in parts):
            raise DataError(f"{what} holds an image; images belong into the user's messages")
        for text in _runs_of_text(parts):
            _check_text(policy, text, what)
    if not turns:
        raise DataError("the conversation has no message")
    if not images:
        raise DataError("the conversation has no image, and this model describes images: add an image to a message")
    if turns[-1][0] == "assistant":
        raise DataError("the conversation ends with an assistant's message: nothing is left to answer; add a user's")
    order = [part for _, parts in turns for part in parts if isinstance(part, int)]
    if sorted(order) != list(range(len(images))):
        raise DataError(f"the messages place the images {order}, of {len(images)} given: each must stand in one place")
    in_order = None if pictures is None else [pictures[i] for i in order]
    return _encode(policy, turns, [images[i] for i in order], "the conversation", in_order)


def encode_caption(policy: Policy, text: str) -> torch.Tensor:
    """Token ids int64 [T] of an assistant's turn that says `text`, as the chat template has it behind a prompt, its end
    token included.

    Raises:
        DataError: the text holds a special token.
    """
    _check_text(policy, text, "caption")
    return torch.tensor(policy.turn.reply_ids(policy.tokenizer, text), dtype=torch.int64)


def check_context(policy: Policy, prompt: EncodedPrompt, max_new_tokens: int) -> None:
    """Refuses a prompt that leaves no room for its longest completion.

    Raises:
        ContextLengthError: prompt and completion exceed the model's context.
    """
    length = prompt.input_ids.numel()
    if length + max_new_tokens > policy.context_length:
        raise ContextLengthError(
            f"prompt of {length} tokens plus max_new_tokens={max_new_tokens} exceeds the model's context of "
            f"{policy.context_length}, or its engine's max_model_len; shorten the prompt, lower rollout.max_new_tokens "
            "or use smaller images"
        )


def without_pixels(prompt: EncodedPrompt) -> EncodedPrompt:
    """The same prompt without its pixel tensors: all that is needed when its vision features travel with it."""
    light = {k: v for k, v in prompt.model_inputs.items() if not k.startswith("pixel")}
    return replace(prompt, model_inputs=light, source=None)


def with_source(policy: Policy, prompt: EncodedPrompt, sample: Sample) -> EncodedPrompt:
    """The prompt that `encode_prompts` made of `sample`, with what it is made of."""
    text = _rendered(policy.processor, [("user", [*range(len(sample.images)), sample.prompt])], f"sample {sample.id!r}")
    return replace(prompt, source=_source(policy, text, sample.images))


def conversation_source(policy: Policy, turns: Turns, pictures: Sequence[Image.Image]) -> PromptSource:
    """What the prompt that `encode_conversation` made of a conversation is made of."""
    order = [part for _, parts in turns for part in parts if isinstance(part, int)]
    pixels = [torch.from_numpy(np.array(pictures[i])) for i in order]
    return _source(policy, _rendered(policy.processor, turns, "the conversation"), pixels)


def _source(policy: Policy, text: str, images: Sequence[bytes | torch.Tensor]) -> PromptSource:
    bos, end = policy.tokenizer.bos_token, len(policy.appended_ids)
    ids = policy.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
    if end and tuple(ids[-end:]) == policy.appended_ids:
        ids = ids[:-end]
    return PromptSource(torch.tensor(ids, dtype=torch.int64), tuple(images))


def image_key(policy: Prompting, images: Sequence[bytes]) -> str:
    """32 hex digits naming these images under this processor and these weights."""
    digest = hashlib.sha256(policy.revision_key.encode())
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:32]


def _encode(
    policy: Prompting,
    turns: Turns,
    images: Sequence[bytes],
    what: str,
    pictures: Sequence[Image.Image] | None = None,
    decode: Callable[[bytes], Image.Image] = decode_image,
) -> EncodedPrompt:
    """`turns` whose texts were checked and that place `images` in their order."""
    processor = policy.processor
    text = _rendered(processor, turns, what)
    _check_rendered(policy, text, turns, what)
    mark = getattr(processor, "image_token", None)
    if isinstance(mark, str) and text.count(mark) != len(images):
        raise ModelError(
            f"model {policy.path!r}: its chat template put {text.count(mark)} image tokens {mark!r} into a prompt of "
            f"{len(images)} images; its processor and its template do not fit together"
        )
    pictures = [decode(image) for image in images] if pictures is None else list(pictures)
    # Templates that write the beginning-of-sequence token themselves must not get a second one.
    bos = policy.tokenizer.bos_token
    try:
        encoded = processor(
            text=[text],
            images=[pictures],
            return_tensors="pt",
            return_mm_token_type_ids=True,
            add_special_tokens=not (bos and text.startswith(bos)),
            **({"images_kwargs": policy.processor_settings} if policy.processor_settings else {}),
        )
    except Exception as error:
        sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in pictures)
        raise DataError(f"{what} (images {sizes}): the processor refuses it: {brief(error)}") from error
    input_ids, end = encoded["input_ids"][0], len(policy.appended_ids)
    # A tokenizer that ends every text would end the prompt, too, which is to go on.
    keep = slice(-end if end and tuple(input_ids[-end:].tolist()) == policy.appended_ids else None)
    input_ids = input_ids[keep]
    inputs = {
        name: value[0][keep] if name in PER_TOKEN else value
        for name, value in encoded.items()
        if name not in ("input_ids", "attention_mask", "labels") and isinstance(value, torch.Tensor)
    }
    return EncodedPrompt(input_ids=input_ids, model_inputs=inputs, image_key=image_key(policy, images))


def _rendered(processor: Any, turns: Turns, what: str) -> str:
    messages = [{"role": role, "content": [_content(part) for part in parts]} for role, parts in turns]
    try:
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:
        # A template may raise on purpose, by jinja2, or stumble; that it works at all was found out at load time.
        raise DataError(f"{what}: the model's chat template refuses it: {brief(error)}") from error


def _check_rendered(policy: Prompting, text: str, turns: Turns, what: str) -> None:
    """Refuses texts that become control tokens only where the chat template trims and joins them.

    What it writes must have the control tokens that it has for the same conversation about nothing, in their order.
    """
    nothing = [(role, [_HARMLESS if isinstance(p, str) and p.strip() else p for p in parts]) for role, parts in turns]
    found, expected = (_control_tokens(policy, each) for each in (text, _rendered(policy.processor, nothing, what)))
    if found != expected:
        more = Counter(found) - Counter(expected)
        token = next(iter(more), None) or next(
            (a for a, b in zip(found, expected, strict=False) if a != b), expected[-1]
        )
        raise DataError(
            f"{what} contains the special token {token!r} in pieces that the chat template joins; remove them: such "
            "tokens are the model's own"
        )


def _control_tokens(policy: Prompting, text: str) -> list[str]:
    """Those in `text`, in their order."""
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = {i: policy.tokenizer.convert_ids_to_tokens(i) for i in set(ids)}
    control, reserved, unknown = _control_ids(policy), set(policy.reserved_texts), policy.tokenizer.unk_token_id
    own = {i for i, token in texts.items() if i in control or (token in reserved and i != unknown)}
    return [texts[i] for i in ids if i in own]


def _control_ids(policy: Prompting) -> set[int]:
    # An unknown word is a special token too, and anybody may write one.
    return {*policy.image_token_ids, *policy.tokenizer.all_special_ids} - {policy.tokenizer.unk_token_id}


def _content(part: str | int) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def _runs_of_text(parts: Sequence[str | int]) -> list[str]:
    """Each text, and neighbouring texts as one: a template may write them without anything in between."""
    runs = [""]
    for part in parts:
        if isinstance(part, str):
            runs[-1] += part
        else:
            runs.append("")
    texts = [part for part in parts if isinstance(part, str)]
    return list(dict.fromkeys([*texts, *runs]))


def _check_text(policy: Prompting, text: str, what: str) -> None:
    """Refuses control tokens, also those that only the tokenizer's own normalisation makes of a text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is no Unicode text: character {error.start} is a lone surrogate") from None
    found = next((token for token in policy.reserved_texts if token in text), None)
    if found is None:
        control = _control_ids(policy)
        ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        found = next((policy.tokenizer.convert_ids_to_tokens(i) for i in ids if i in control), None)
    if found is not None:
        raise DataError(f"{what} contains the special token {found!r}; remove it: such tokens are the model's own")
