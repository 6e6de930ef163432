"""The built-in `tiny-llava`: a LLaVA made from a transformers config, saved as an ordinary Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

BUILTIN_TINY_LLAVA = "builtin:tiny-llava"

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}user : {% else %}assistant : {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %} "
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def words_of(texts: Iterable[str]) -> list[str]:
    """Words and punctuation marks of `texts` as the tiny tokenizer splits them, most frequent first."""
    counts: dict[str, int] = {}
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            counts[word] = counts.get(word, 0) + 1
    return sorted(counts, key=lambda word: (-counts[word], word))


def build_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, split at white space and punctuation, natural spacing when it decodes."""
    fixed = [PAD, BOS, EOS, UNK, IMAGE, *words_of(["user : assistant"])]
    words = dict.fromkeys([*fixed, *words_of(vocabulary), *vocabulary])
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=True,
    )


def build_tiny_llava(
    folder: str | Path,
    *,
    vocabulary: Sequence[str],
    image_size: int = 64,
    patch_size: int = 8,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    vision_hidden: int = 96,
    vision_layers: int = 3,
    vision_heads: int = 4,
    context_length: int = 512,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> Path:
    """Makes a randomly initialised LLaVA and saves model, processor and chat template into `folder`.

    (`image_size` / `patch_size`)² image tokens stand for one picture. `vocabulary` holds the words the tokenizer
    knows (texts are split into words); any other word is `<unk>`. The defaults make about 1.3 M parameters.
    `initializer_range` is the standard deviation of the language model's and the projector's first weights: the usual
    0.02 suits wide models, one of this width learns several times faster from about 1 / sqrt(hidden).
    The same arguments give the same weights.

    Raises:
        ValueError: `image_size` is not a multiple of `patch_size`.
    """
    if image_size % patch_size:
        raise ValueError(f"image_size={image_size} is not a multiple of patch_size={patch_size}")
    folder = Path(folder)
    tokenizer = build_tokenizer(vocabulary)
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in (PAD, BOS, EOS, IMAGE)}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=vision_hidden,
            intermediate_size=vision_hidden * 2,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            projection_dim=vision_hidden,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context_length,
            initializer_range=initializer_range,
            pad_token_id=ids[PAD],
            bos_token_id=ids[BOS],
            eos_token_id=ids[EOS],
        ),
        image_token_index=ids[IMAGE],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch_size) ** 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        pad_token_id=ids[PAD], bos_token_id=ids[BOS], eos_token_id=ids[EOS], do_sample=False
    )
    model.save_pretrained(folder)
    _processor(tokenizer, image_size, patch_size).save_pretrained(folder)
    return folder


def _processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int) -> LlavaProcessor:
    square = {"height": image_size, "width": image_size}
    images = CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
