"""ROUGE-L against pycocoevalcap, the LCS against the textbook recurrence."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.rouge.rouge import Rouge

from mmrl_ray.metrics.overlap import lcs_length, rouge_l

TOKENS = st.lists(st.sampled_from(["a", "red", "blue", "square", "left", "of"]), min_size=1, max_size=12)


@settings(deadline=None)
@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=4))
def test_equals_pycocoevalcap(caption: list[str], references: list[list[str]]) -> None:
    texts = [" ".join(r) for r in references]
    expected = Rouge().calc_score([" ".join(caption)], texts)
    assert rouge_l(" ".join(caption), texts) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_lcs_equals_the_recurrence(first: list[int], second: list[int]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, x in enumerate(first):
        for j, y in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert lcs_length([str(x) for x in first], [str(x) for x in second]) == table[-1][-1]


def test_literal() -> None:
    # LCS 2 of 3 caption words and of 4 reference words.
    precision, recall = 2 / 3, 2 / 4
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l("a big square", ["a red square here"]) == pytest.approx(expected, rel=1e-12)
    assert rouge_l("A red, square.", ["a red square"]) == pytest.approx(1.0)
    assert rouge_l("", ["a red square"]) == 0.0
    assert rouge_l("zzz", ["a red square", ""]) == 0.0


def test_no_references() -> None:
    with pytest.raises(ValueError, match="reference"):
        rouge_l("a", [])
