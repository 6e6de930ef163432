"""The words that the agent knows, and which of them may come next.

An action is the number of a word, or `end`, which is one more than the last word's. An observation holds the caption
so far as word numbers counted from 1, with 0 behind its end: `V` words, `T` places, `A` = V + 1 actions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmrl_ray.algorithms.dqn.algorithm import ValueBasedSection
from mmrl_ray.errors import ConfigError
from mmrl_ray.experience.breakdown import TruncatedCaption
from mmrl_ray.metrics.text import Tokenizer
from mmrl_ray.metrics.text import words as words_of


@dataclass(frozen=True)
class Vocabulary:
    """Words, and the template if captions have one."""

    words: tuple[str, ...]
    max_words: int
    template: tuple[tuple[str, ...], ...] | None = None

    @classmethod
    def of(
        cls,
        cfg: ValueBasedSection,
        references: Iterable[Sequence[str]],
        tokenizer: Tokenizer = Tokenizer.UNICODE,
    ) -> Vocabulary:
        """That of a config; the references are read, with the run's tokeniser, only where it names no words.

        Raises:
            ConfigError: the references have no word.
        """
        template = None if cfg.template is None else tuple(map(tuple, cfg.template))
        if cfg.vocabulary is not None:
            words = tuple(cfg.vocabulary)
        elif template is not None:
            words = tuple(dict.fromkeys(word for place in template for word in place))
        else:
            counts = Counter(word for texts in references for text in texts for word in words_of(text, tokenizer))
            ranked = sorted(counts, key=lambda word: (-counts[word], word))
            words = tuple(ranked[: cfg.vocabulary_size])
        if not words:
            raise ConfigError("value_based.vocabulary: the training references have no words; name some")
        return cls(words, cfg.max_words if template is None else len(template), template)

    @property
    def actions(self) -> int:
        """A: the words and the end."""
        return len(self.words) + 1

    @property
    def end(self) -> int:
        """The action that ends a caption."""
        return len(self.words)

    @cached_property
    def _masks(self) -> np.ndarray:
        """int8 [T + 1, A]: what may follow so many words."""
        masks = np.zeros((self.max_words + 1, self.actions), dtype=np.int8)
        masks[-1, self.end] = 1
        if self.template is None:
            masks[:-1] = 1
            return masks
        number = {word: i for i, word in enumerate(self.words)}
        for place, allowed in enumerate(self.template):
            masks[place, [number[word] for word in allowed]] = 1
        return masks

    def valid(self, count: int) -> np.ndarray:
        """int8 [A], 1 for the actions that may follow `count` words; behind the last word there is only the end."""
        return self._masks[count]

    def observed(self, caption: Sequence[int]) -> np.ndarray:
        """int64 [T] of word numbers counted from 0: counted from 1, filled up with 0."""
        found = np.zeros(self.max_words, dtype=np.int64)
        found[: len(caption)] = np.asarray(caption, dtype=np.int64) + 1
        return found

    def text(self, caption: Sequence[int]) -> str:
        """Word numbers counted from 0 as words."""
        return " ".join(self.words[word] for word in caption)

    def caption(self, caption: Sequence[int]) -> str:
        """`text` of a caption that is over, cut off where there was no room for an end; a template's end is one."""
        text = self.text(caption)
        return TruncatedCaption(text) if self.template is None and len(caption) == self.max_words else text

    def has_ended(self, caption: Sequence[int], action: int) -> bool:
        """Whether `action`, which made `caption` what it is, was the last one."""
        return action == self.end or len(caption) == self.max_words
