"""Bytes of single tokens: together they are the text, whatever is cut in two, in each kind of tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmrl_ray.policy.tokens import TokenBytes

TEXT = "a naïve 東京 🙂  two  spaces"
CORPUS = ["a naive two spaces", "two naive spaces a"]


def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["</s>"]
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def sentencepiece() -> Tokenizer:
    """As Gemma's and Llama's: a mark for the space, bytes for what the vocabulary lacks."""
    special = ["</s>", "<unk>"]
    vocabulary = {
        text: i for i, text in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁anivetwospc"])
    }
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(special)
    return core


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_bytes_of_all_tokens_are_the_text(make: object) -> None:
    core = make()  # type: ignore[operator]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    bytes_of = TokenBytes(tokenizer)
    pieces = [bytes_of.of(i) for i in ids]
    assert b"".join(pieces) == TEXT.encode()
    assert any(len(piece) == 1 and piece[0] >= 0x80 for piece in pieces), "some token is part of a character"
    assert bytes_of.of(tokenizer.eos_token_id) == b""


def test_tokens_of_whole_words_are_their_text() -> None:
    core = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "red": 2}, unk_token="<unk>"))
    bytes_of = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>"))
    assert bytes_of.of(2) == b"red"
