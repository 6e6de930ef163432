"""The tokeniser: words by hand in scripts of all kinds, and that every measure of words sees them alike."""

import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from mmrl_ray.metrics.overlap import CiderD, bleu_counts, rouge_l, sentence_bleu
from mmrl_ray.metrics.text import CorpusStatistics, LanguageModel, Tokenizer, ngram_counts, pieces, words
from mmrl_ray.rewards.captioning import CaptionReward
from mmrl_ray.rewards.text import LengthReward, RepetitionReward

TEXTS = {
    "hindi": ("एक लड़की पानी में है।", "एक लड़की पीना में है।"),
    "thai": ("ผู้หญิงกำลังเล่นกีตาร์", "ผู้หญิงกำลังเล่นฟุตบอล"),
    "chinese": ("一只棕色的狗在沙滩上奔跑。", "一只棕色的猫在沙滩上奔跑。"),
    "japanese": ("犬が砂浜を走っている", "猫が砂浜を走っている"),
    "khmer": ("ក្មេងស្រីកំពុងលេងបាល់", "មនុស្សកំពុងលេងបាល់"),
    "hebrew": ("הַיֶּלֶד רָץ בַּגַּן", "הַיֶּלֶד רָץ בַּגִּן"),
}
"""A caption, and one that differs in a word."""


def test_words() -> None:
    assert words("A Red-square, 2 pixels; don't ÄPFEL_3!") == [
        "a",
        "red",
        "square",
        "2",
        "pixels",
        "don",
        "t",
        "äpfel_3",
    ]
    assert words(" .,! ") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("पानी में एक लड़की।", ["पानी", "में", "एक", "लड़की"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("หมากำลังวิ่งบนชายหาด", ["หมา", "กำลัง", "วิ่ง", "บน", "ชายหาด"]),
        ("一只棕色的狗，在沙滩上", ["一只", "棕色", "的", "狗", "在", "沙滩", "上"]),
        ("赤い丸と青い四角・コーヒー", ["赤い", "丸", "と", "青い", "四角", "コーヒー"]),
        ("ສາວນ້ອຍກຳລັງຫຼິ້ນບານ", ["ສາວ", "ນ້ອຍ", "ກຳລັງ", "ຫຼິ້ນ", "ບານ"]),
        ("강아지가 달린다", ["강아지가", "달린다"]),
        ("iPhone手机3只", ["iphone", "手机", "3", "只"]),
        ("می\u200cخواهم میخواهم", ["میخواهم", "میخواهم"]),  # with and without the joiner that is only seen
        ("ក្មេង\u200bស្រី", ["ក្មេង", "ស្រី"]),  # a zero-width space is a space
        ("naïve ½ x² ❤️", ["naïve", "½", "x²"]),
    ],
)
def test_words_of_other_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected
    assert words(unicodedata.normalize("NFD", text)) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=0x24F, exclude_categories=("Cn", "Cs"), exclude_characters="\u00ad")))
def test_latin_words_are_word_runs(text: str) -> None:
    composed = unicodedata.normalize("NFC", text.lower())
    assert words(text) == re.findall(r"[\w\u0300-\u036f]+", composed)
    assert words(text, Tokenizer.WORD_RUNS) == re.findall(r"\w+", text.lower())
    assert "".join(pieces(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("language", TEXTS)
def test_every_measure_gives_partial_credit(language: str) -> None:
    caption, other = TEXTS[language]
    said, wrong = words(caption), words(other)
    assert len(said) == len(wrong) > 2
    assert [a == b for a, b in zip(said, wrong, strict=True)].count(False) == 1
    statistics = CorpusStatistics.from_references([[caption], ["something else"]], language_order=2)
    assert statistics.language is not None
    share = (len(said) - 1) / len(said)
    # Of the longest common subsequence one word is missing, on both sides.
    assert rouge_l(other, [caption]) == pytest.approx(share)
    assert bleu_counts(other, [caption])[0] == bleu_counts(caption, [caption])[0] - 1
    assert 0 < sentence_bleu(other, [caption]) < sentence_bleu(caption, [caption]) == 1
    cider = CiderD(statistics)
    assert (
        0
        < cider.score(other, [caption])
        < cider.score(caption, [caption])
        == pytest.approx(10.0 * min(4, len(said)) / 4)
    )
    reward = CaptionReward(0.0, 1.0, 1.0, statistics.idf, 10)
    assert reward.score(other, [caption]).parts == pytest.approx(
        {"bleu": sentence_bleu(other, [caption]), "detail": share, "length": len(said) / 10}
    )
    model = LanguageModel(statistics.language, 2, 0.1)
    assert model.fluency(caption) > model.fluency(other) > model.fluency("else something")
    assert RepetitionReward(2).score(f"{caption} {caption}").total == pytest.approx(
        -(len(said) - 1) / (2 * len(said) - 1)
    )
    assert LengthReward(1, len(said)).value(caption) == 1.0
    assert LengthReward(1, len(said) - 1).value(caption) < 1.0


def test_bleu_is_sacrebleus_of_the_words() -> None:
    alone = BLEU(effective_order=True, smooth_method="exp", lowercase=True)
    expected = alone.sentence_score("一只 棕色 的 猫 在 沙滩 上 奔跑 。", ["一只 棕色 的 狗 在 沙滩 上 奔跑 。"])
    assert sentence_bleu(TEXTS["chinese"][1], [TEXTS["chinese"][0]]) == pytest.approx(expected.score / 100)


def test_the_segmenter_is_imported_with_the_first_text_that_needs_it() -> None:
    code = (
        "import sys\n"
        "from mmrl_ray.rewards.build import build_reward\n"
        "from mmrl_ray.metrics.text import CorpusStatistics\n"
        "plain = CorpusStatistics.from_references([['Un café, ein großer Hund', 'a dog']])\n"
        "assert plain.segmenter is None\n"
        "assert CorpusStatistics.from_json(plain.to_json()) == plain\n"
        "assert not any(name.startswith('icu4py') for name in sys.modules)\n"
        "found = CorpusStatistics.from_references([['一只狗']])\n"
        "assert found.segmenter.startswith('ICU '), found.segmenter\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_ngram_counts() -> None:
    counts = ngram_counts(["a", "b", "a", "b"], max_order=3)
    assert counts == [{"a": 2, "b": 2}, {"a b": 2, "b a": 1}, {"a b a": 1, "b a b": 1}]
    assert ngram_counts([]) == [{}, {}, {}, {}]
