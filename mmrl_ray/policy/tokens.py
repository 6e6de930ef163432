"""Which tokens of a checkpoint stand for images, end a completion, or may not be written by a user."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedModel

from mmrl_ray.errors import ModelError

# Names of image, video and audio tokens in the vocabularies of LLaVA, Qwen-VL, InternVL, SmolVLM, Gemma and PaliGemma.
_MEDIA = re.compile(r"image|img|vision|video|audio|soft_token|row_\d+_col_\d+", re.IGNORECASE)
_CONFIG_IDS = re.compile(
    r"^(image|video|audio|vision|boi|eoi|boa|eoa)(_\w+)?_token_(id|index)$|^(boi|eoi)_token_index$"
)
_OPENING_TAG = re.compile(r"<[^<>|/\s]+>\s*$")


def placeholder(config: Any, processor: Any, path: str) -> int:
    """The id of the token whose positions take the vision features.

    Raises:
        ModelError: neither the config nor the processor names one.
    """
    for owner in (config, processor):
        for name in ("image_token_id", "image_token_index"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    raise ModelError(f"model {path!r} names no image token, neither in its config nor in its processor")


def image_tokens(config: Any, processor: Any, eos: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """Ids of every token of the image, video and audio machinery, ascending: what a sampler must never emit."""
    tokenizer = processor.tokenizer
    found = {i for text, i in tokenizer.get_added_vocab().items() if _MEDIA.search(text)}
    for name, value in config.to_dict().items():
        if _CONFIG_IDS.match(name) and isinstance(value, int):
            found.add(value)
    for text in _processor_tokens(processor):
        token = tokenizer.convert_tokens_to_ids(text)
        if isinstance(token, int) and token != tokenizer.unk_token_id:
            found.add(token)
    return tuple(sorted(i for i in found if 0 <= i < vocab_size and i not in eos))


def end_tokens(model: PreTrainedModel, tokenizer: Any, path: str) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's first, then those of the generation config.

    Raises:
        ModelError: there is none.
    """
    listed = model.generation_config.eos_token_id if model.generation_config is not None else None
    generation = listed if isinstance(listed, list) else [listed]
    found = [i for i in (tokenizer.eos_token_id, *generation) if i is not None]
    if not found:
        raise ModelError(f"model {path!r} has no end-of-sequence token, neither in its tokenizer nor generation config")
    return tuple(dict.fromkeys(int(i) for i in found))


def end_of_turn(processor: Any, eos: tuple[int, ...]) -> int:
    """The end token that the chat template puts after an assistant's turn; the first of `eos` if it puts none."""
    user = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    opened = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template([user, reply], add_generation_prompt=False, tokenize=False)
    tail = whole[len(opened) :] if whole.startswith(opened) else ""
    ids = processor.tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return next((i for i in ids if i in eos), eos[0])


def answer_opening(processor: Any) -> str:
    """What the chat template itself writes at the beginning of an answer, such as `<think>`; of most, nothing.

    That is what a prompt ends with beyond the header of an assistant's turn, which is what stands before the text of
    one that is over; where that cannot be had, an opening tag at the prompt's end. Special tokens are no part of it, as
    they are none of a caption.
    """
    mark = "\ue000"  # a character that no template writes or trims
    user = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": mark}]}

    def rendered(messages: list[Any], *, opens: bool) -> str:
        try:
            return processor.apply_chat_template(messages, add_generation_prompt=opens, tokenize=False)
        except Exception:  # noqa: BLE001 - a template is anybody's code; whoever loads it tells what it cannot do
            return ""

    prompt = rendered([user], opens=True)
    # Templates may leave thoughts out of earlier turns, or write empty ones into the last.
    turns = [rendered(messages, opens=False) for messages in ([user, reply, user], [user, reply])]
    headers = [turn[: turn.index(mark)] for turn in turns if mark in turn]
    openings = [prompt[len(each) :] for each in headers if prompt.startswith(each)]
    tag = _OPENING_TAG.search(prompt)
    opening = max(openings, key=len, default=tag[0] if tag is not None else "")
    for token in processor.tokenizer.all_special_tokens:
        opening = opening.replace(str(token), "")
    return opening if opening.strip() else ""


def reserved_texts(processor: Any) -> tuple[str, ...]:
    """Texts that a user may not write, because the tokenizer or the processor would read them as control tokens."""
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {text for text in tokenizer.get_added_vocab() if _MEDIA.search(text)}
    special |= set(_processor_tokens(processor))
    return tuple(sorted(text for text in special if text.strip()))


def _processor_tokens(processor: Any) -> list[str]:
    """Media tokens that a processor keeps as attributes (`image_token`, `fake_image_token`, `boi_token`, …)."""
    return [
        value
        for name, value in vars(processor).items()
        if name.endswith(("_token", "_tag")) and isinstance(value, str) and _MEDIA.search(f"{name} {value}")
    ]
