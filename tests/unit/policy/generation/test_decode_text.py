"""Text while it is generated, on a byte-level tokenizer whose tokens cut characters apart."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmrl_ray.policy.tokens import TextStream, cut_at_stop

TEXT = "A cat's naïve café — 東京の空 🙂👍🏽 ends. No more."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["a cat ends no more the cat"],
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=False)


class Counting:
    """Notes how many tokens it was asked to decode."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.most = 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        self.most = max(self.most, len(ids))
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def test_the_pieces_make_up_the_text_and_hold_no_half_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    counting = Counting(tokenizer)
    stream = TextStream(counting)
    pieces = [stream.push(token)[0] for token in ids]
    assert "".join(pieces) + stream.finish() == TEXT == stream.text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len(ids) > 50
    # A window, not the whole: the longest character here is four bytes, each a token.
    assert counting.most <= 2 + 2 * 4


def test_an_incomplete_character_at_the_end_is_reported_as_such(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("ok 🙂")["input_ids"][:-1]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token)[0] for token in ids]
    assert "".join(pieces) == "ok "
    assert "".join(pieces) + stream.finish() == stream.text == tokenizer.decode(ids)


@pytest.mark.parametrize("stop", [("ends.",), ("京の",), ("more", "s. N"), ("A",), ("🙂",)])
def test_nothing_of_a_stop_string_is_reported(tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]) -> None:
    expected = cut_at_stop(TEXT, stop)
    assert expected is not None
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer(TEXT)["input_ids"]:
        piece, stopped = stream.push(token)
        pieces.append(piece)
        # What was reported can never turn out to belong to the stop string.
        assert expected.startswith("".join(pieces))
        if stopped:
            break
    else:
        pytest.fail("the stop string was not seen")
    assert "".join(pieces) == stream.text == expected


def test_the_first_of_several_stop_strings_counts() -> None:
    assert cut_at_stop("one two three", ("three", "two")) == "one "
    assert cut_at_stop("one two three", ("four",)) is None
    assert cut_at_stop("aXbX", ("X",), start=2) == "aXb"
