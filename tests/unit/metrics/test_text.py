from mmrl_ray.metrics.text import ngram_counts, words


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


def test_ngram_counts() -> None:
    counts = ngram_counts(["a", "b", "a", "b"], max_order=3)
    assert counts == [{"a": 2, "b": 2}, {"a b": 2, "b a": 1}, {"a b a": 1, "b a b": 1}]
    assert ngram_counts([]) == [{}, {}, {}, {}]
