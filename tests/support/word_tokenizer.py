"""A word-level tokenizer made on the fly. Imports no family: `benchmarks/gpu.py` runs where some are not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def word_tokenizer(
    words: Sequence[str], named: Mapping[str, str], listed: Sequence[str] = (), *, bos: str | None = None
) -> PreTrainedTokenizerFast:
    """Of `words`; `named` are media tokens by attribute name, `listed` are further special tokens.

    Ids count from 0: padding, unknown, end, `bos`, `named`, `listed`, words.
    """
    special = special_tokens(named, listed, bos=bos)
    ids = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if bos:  # like Gemma's tokenizer: it adds the token itself unless it is told not to
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids[bos])])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        bos_token=bos,
        extra_special_tokens=dict(named),
        clean_up_tokenization_spaces=True,
    )


def special_tokens(named: Mapping[str, str], listed: Sequence[str] = (), *, bos: str | None = None) -> list[str]:
    """By their ids."""
    return ["<pad>", "<unk>", "</s>", *([bos] if bos else []), *named.values(), *listed]
