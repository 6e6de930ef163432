"""What builders of tiny families share: a tokenizer of some words, a chat template, sizes, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from mmrl_ray.policy.tiny import words_of
from tests.support.word_tokenizer import word_tokenizer

WORDS = words_of(
    [
        "Describe the image. What is in this picture? Say it short, a an small large red green blue yellow",
        "circle square triangle above below left right of and on there with one two user model assistant system :",
    ]
)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


@dataclass(frozen=True, slots=True)
class Parts:
    """What a family's folder is made of."""

    processor: Any
    model_class: Any
    config: Any


Builder = Callable[[], Parts]


def make_tokenizer(
    named: dict[str, str], listed: Sequence[str] = (), *, bos: str | None = None
) -> PreTrainedTokenizerFast:
    """Word-level; `named` are media tokens by attribute name, `listed` are further special tokens."""
    return word_tokenizer(WORDS, named, listed, bos=bos)


def make_template(image: str, *, start: str = "") -> str:
    """A chat template that writes `image` for a picture."""
    return (
        start + "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}" + image + "{% else %}{{ p['text'] }}{% endif %} "
        "{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )


def spread(model: torch.nn.Module) -> None:
    """Larger random weights: with the usual tiny ones every position predicts nearly the same, and a mistake hides.

    Gates that start at zero are opened.
    """
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif parameter.numel() == 1:
            torch.nn.init.constant_(parameter, 0.7)


def ids_of(tokenizer: Any, **names: str) -> dict[str, int]:
    """Token ids under the names of a config's keys."""
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def text_ids(tokenizer: Any) -> dict[str, Any]:
    """What every text config says of its tokens."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
