"""A checkpoint's tokens: which stand for images, end a completion, or may not be written by a user; and their text.

**Processors for still pictures.** Those of Qwen-VL, InternVL, SmolVLM, Gemma 4 and others also hold a video processor,
which transformers builds on torchvision alone. Captioning needs none: they are loaded without it, with or without
torchvision, so that a folder saved by one machine loads on the other. Pictures go through torchvision where it is
installed, else through Pillow.

**Text while it is being generated**: what each token adds, and where a stop string ends it. Decoding all tokens again
at every step costs T² over a completion. Here a step decodes only the last few: those since the last place where the
text was whole. A token can also end in the middle of a UTF-8 character; its text is held back until the rest comes.
What one token stands for, in bytes, is `TokenBytes`: a tokenizer's `decode` of it alone loses parts of characters and
spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import AutoProcessor, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mmrl_ray.errors import ModelError
from mmrl_ray.policy.checkpoint import model_call

# Names of image, video and audio tokens in the vocabularies of LLaVA, Qwen-VL, InternVL, SmolVLM, Gemma and PaliGemma.
_MEDIA = re.compile(r"image|img|vision|video|audio|soft_token|row_\d+_col_\d+", re.IGNORECASE)
_CONFIG_IDS = re.compile(
    r"^(image|video|audio|vision|boi|eoi|boa|eoa)(_\w+)?_token_(id|index)$|^(boi|eoi)_token_index$"
)
_OPENING_TAG = re.compile(r"<[^<>|/\s]+>\s*$")

_REPLIES = ("mauve zebra", "seventeen", "Quartz 7!")
"""Texts that stand in no template, unlike each other in length and in their last character."""
_TEMPLATE_REMEDY = (
    'use a chat template that takes messages of roles "user" and "assistant" whose content is a list of parts, '
    '{"type": "image"} and {"type": "text", "text": …}'
)
_END_REMEDY = (
    "have the template put one end token there, and list it under eos_token_id in the model's generation_config.json"
)
_VIDEO = "video_processor"
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
"""SentencePiece's mark of one."""


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


def end_tokens(model: PreTrainedModel, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Ids that the checkpoint says end a completion: the tokenizer's first, then those of the generation config.

    Those beyond the vocabulary are no tokens of the model: it never says them.
    """
    listed = model.generation_config.eos_token_id if model.generation_config is not None else None
    generation = listed if isinstance(listed, list | tuple) else [listed]
    found = [i for i in (tokenizer.eos_token_id, *generation) if i is not None]
    return tuple(dict.fromkeys(int(i) for i in found if int(i) < vocab_size))


@dataclass(frozen=True, slots=True)
class Turn:
    """How the chat template writes an assistant's turn: opening, lead, reply, gap, end."""

    opening: str = ""
    """A rendered conversation up to where the reply is to begin, as prompts end."""
    lead: str = ""
    """White space before the reply that is not in the opening: a model has to say it."""
    gap: str = ""
    """White space between the reply and its end."""
    end_id: int = -1
    """The token that ends the turn, whether or not the checkpoint lists it."""

    def reply_ids(self, tokenizer: Any, text: str) -> list[int]:
        """Tokens of `text` as they stand in the turn, its end included.

        Behind the opening: tokenizers treat the beginning of a text in ways of their own (SentencePiece puts a space
        there). The white space around it is the template's, whatever the text brings along.
        """
        text = f"{self.lead}{text.strip()}{self.gap}"
        before = tokenizer(self.opening, add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{self.opening}{text}", add_special_tokens=False)["input_ids"]
        if whole[: len(before)] != before:  # the first letters grew together with the opening's last
            whole, before = tokenizer(text, add_special_tokens=False)["input_ids"], []
        return [*whole[len(before) :], self.end_id]


def read_turn(processor: Any, eos: tuple[int, ...], path: str) -> Turn:
    """The form of an assistant's turn, found by rendering several replies.

    Its end is the first control token behind the reply. Where the template ends a turn with nothing (or with white
    space), it is the only one of `eos`, if there is just one.

    Raises:
        ModelError: the template cannot be rendered, it leaves the reply out, or what ends a turn cannot be told.
    """
    user = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    befores, tails = set(), set()
    with model_call(path, "its chat template cannot render a conversation", _TEMPLATE_REMEDY):
        opening = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        for reply in _REPLIES:
            answer = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
            before, found, tail = processor.apply_chat_template([user, answer], tokenize=False).rpartition(reply)
            if not found:
                raise ModelError(
                    f"model {path!r}: its chat template leaves out what the assistant says ({before + tail!r} for "
                    f"{reply!r}); {_TEMPLATE_REMEDY}"
                )
            befores.add(before)
            tails.add(tail)
    if len(tails) > 1:
        raise ModelError(
            f"model {path!r}: its chat template ends an assistant's turn in different ways ({sorted(tails)}), so that "
            f"its end is not known; {_END_REMEDY}"
        )
    tail, tokenizer = tails.pop(), processor.tokenizer
    control = _control_tokens(tokenizer, eos)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    end = next((int(i) for i in ids if i in control), None)
    if end is None and len(eos) == 1 and not tail.strip():
        end, tail = eos[0], ""
    if end is None:
        raise ModelError(
            f"model {path!r}: its chat template puts no control token after an assistant's turn (but {tail!r}), and "
            f"{len(eos)} end tokens are listed for the model, so that the end of a turn is not known; {_END_REMEDY}"
        )
    before = befores.pop()
    lead = before.removeprefix(opening) if before.startswith(opening) and not befores else ""
    gap = tail.partition(tokenizer.convert_ids_to_tokens(end))[0]
    return Turn(opening, lead if lead.isspace() else "", gap if gap.isspace() else "", end)


def refuse_unknown_token(token: int, vocab_size: int, tokenizer: Any, path: str) -> None:
    """Refuses a token of the chat template that the model does not have.

    Raises:
        ModelError: it was added to the tokenizer alone.
    """
    if token >= vocab_size:
        raise ModelError(
            f"model {path!r}: its chat template writes {tokenizer.convert_ids_to_tokens(token)!r} (id {token}), and "
            f"the model has {vocab_size} tokens: tokens were added to the tokenizer and not to the model "
            "(resize_token_embeddings)"
        )


def _control_tokens(tokenizer: Any, eos: tuple[int, ...]) -> set[int]:
    """What can end a turn: added tokens that are not of the media machinery, and whatever `eos` lists."""
    added = {i for text, i in tokenizer.get_added_vocab().items() if text.strip() and not _MEDIA.search(text)}
    return (added - {tokenizer.unk_token_id}) | {*eos}


def appended_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer puts behind every text of its own accord, such as T5's end of sequence."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    place = next((i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare), len(whole))
    return tuple(int(i) for i in whole[place + len(bare) :])


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


def load_processor(path: str, config: Any, *, revision: str | None = None) -> Any:
    """What `AutoProcessor.from_pretrained` gives, without a video processor.

    Raises:
        ImportError: the processor needs a library that is not installed.
        OSError: a file is missing.
        ValueError: a file does not fit.
    """
    if type(config) in PROCESSOR_MAPPING:
        known: Any = PROCESSOR_MAPPING[type(config)]
        if _VIDEO in known.get_attributes():
            return stills_only(known).from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    return AutoProcessor.from_pretrained(path, revision=revision or "main", trust_remote_code=False)


class NoVideo:
    """Stands where a processor keeps its video processor; it processes nothing, and every setting of it is None."""

    _auto_class = None
    model_input_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> None:
        """Processors read settings of their video processor when they are made, each its own."""
        if name.startswith("_") or name == "to_dict":
            raise AttributeError(name)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> list[str]:
        """Writes nothing."""
        return []


@cache
def stills_only(processor_class: Any) -> Any:
    """A subclass of a processor class whose video processor is `NoVideo`; it loads and saves like its parent."""
    names = processor_class.get_attributes()
    # Whatever else a processor holds (of audio, a second tokenizer) is loaded by its parent's own way.
    others = [name for name in names if name != _VIDEO]
    without = type(processor_class.__name__, (processor_class,), {"get_attributes": classmethod(lambda cls: others)})

    def from_folder(cls: Any, path: str, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        loader: Any = without
        found = dict(zip(others, loader._get_arguments_from_pretrained(path, processor_dict, **kwargs), strict=True))
        return [found[name] if name in found else NoVideo() for name in names]

    def check(self: Any, name: str, argument: Any) -> Any:
        return NoVideo if name == _VIDEO else processor_class.check_argument_for_proper_class(self, name, argument)

    def to_dict(self: Any) -> dict[str, Any]:
        return {name: value for name, value in processor_class.to_dict(self).items() if name != _VIDEO}

    members = {
        "__module__": __name__,
        "_get_arguments_from_pretrained": classmethod(from_folder),
        "check_argument_for_proper_class": check,
        "to_dict": to_dict,
    }
    return type(processor_class.__name__, (processor_class,), members)


def cut_at_stop(text: str, stop: Sequence[str], start: int = 0) -> str | None:
    """`text` before the first of the stop strings that begins at `start` or later; None if there is none."""
    found = [at for at in (text.find(s, start) for s in stop) if at >= 0]
    return text[: min(found)] if found else None


class TextStream:
    """The text of one row. `text` is all that was reported so far; it never holds any part of a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max((len(s) for s in self._stop), default=0)
        self._ids: list[int] = []
        self._whole = 0
        """Tokens before this one are in `_seen`."""
        self._context = 0
        """Decoding starts here, a little before `_whole`: some tokenizers drop the space before their first token."""
        self._context_text = ""
        self._seen = ""
        """All text, the part that may yet turn out to be a stop string included."""

    def push(self, token: int) -> tuple[str, bool]:
        """What `token` adds to the text, and whether it completed a stop string."""
        self._ids.append(token)
        tail = self._decode(self._ids[self._context :])
        if tail.endswith(_INCOMPLETE) or len(tail) <= len(self._context_text):
            return "", False
        return self._take(tail)

    def finish(self) -> str:
        """What was held back, at the end of the row."""
        held = self._seen[len(self.text) :]
        rest = self._decode(self._ids[self._context :])[len(self._context_text) :]
        self.text = self._seen + rest
        return held + rest

    def _take(self, tail: str) -> tuple[str, bool]:
        before = len(self._seen)
        self._seen += tail[len(self._context_text) :]
        self._context, self._whole = self._whole, len(self._ids)
        self._context_text = self._decode(self._ids[self._context : self._whole])
        reported = len(self.text)
        cut = cut_at_stop(self._seen, self._stop, max(0, before - self._longest + 1))
        if cut is not None:
            self.text = cut
            return cut[reported:], True
        self.text = self._seen[: len(self._seen) - self._held()]
        return self.text[reported:], False

    def _held(self) -> int:
        """Characters at the end that are the beginning of some stop string."""
        longest = min(self._longest - 1, len(self._seen))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._seen[-n:]) for s in self._stop)), 0)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class TokenBytes:
    """The bytes of single tokens: of byte-level BPE, SentencePiece with its byte tokens, word-level tokenizers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        kinds = _kinds(decoder)
        self._byte_of = {text: byte for byte, text in bytes_to_unicode().items()} if "ByteLevel" in kinds else {}
        marked = "Metaspace" in kinds or _SPACE in json.dumps(decoder, ensure_ascii=False)
        self._is_sentencepiece = marked or "ByteFallback" in kinds

    def of(self, token: int) -> bytes:
        """The bytes of a token; none of a special token, as in a completion's text."""
        if token in self._tokenizer.all_special_ids:
            return b""
        if token in self._added:
            return self._tokenizer.decode([token], skip_special_tokens=True).encode()
        text = self._tokenizer.convert_ids_to_tokens(token)
        if self._byte_of and text is not None and all(character in self._byte_of for character in text):
            return bytes(self._byte_of[character] for character in text)
        if self._is_sentencepiece and text is not None:
            byte = _BYTE.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()
        return self._tokenizer.decode([token], skip_special_tokens=True).encode("utf-8", "replace")


def _kinds(decoder: Any) -> set[str]:
    """Types of a decoder and of those in it."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*map(_kinds, decoder.get("decoders", ())))
