"""The agent in plain torch, without RLlib: the words that it knows, the features that it sees, its Q network.

An action is the number of a word, or `end`, which is one more than the last word's. An observation holds the caption so
far as word numbers counted from 1, with 0 behind its end: `V` words, `T` places, `A` = V + 1 actions.

What it sees is the frozen vision tower's features, a fixed number of tokens a picture, on one scale.

    image [B, L, d] ──encoder──▶ [B, L, h] ─┐
                                            fusion ──▶ [B, h] ──head──▶ Q [B, A]
    words [B, T]    ──encoder──▶ [B, T+1, h]┘

`h` is the width. Encoders know positions: without, "red above blue" would equal "blue above red" once tokens are
pooled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mmrl_ray.algorithms.dqn.algorithm import ValueBasedSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError
from mmrl_ray.experience.carriers import EncodedPrompt, TruncatedCaption
from mmrl_ray.metrics.statistics import resolution
from mmrl_ray.metrics.text import Tokenizer
from mmrl_ray.metrics.text import words as words_of
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache, vision_features
from mmrl_ray.reward_model.fusion import Fused, build_fusion

LIMIT = 10.0
"""Standardised features are cut at ± this."""
_BATCH = 32
MODALITIES = ("image", "words")


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


@dataclass(frozen=True)
class FeatureScale:
    """Mean and standard deviation of each feature over the training pictures; 1 for one that never changes."""

    mean: np.ndarray
    """float32 [d]."""
    std: np.ndarray
    """float32 [d]."""

    @classmethod
    def of(cls, images: np.ndarray) -> FeatureScale:
        """That of features [N, L, d]."""
        flat = images.reshape(-1, images.shape[-1])
        differ = np.ptp(flat, axis=0) > resolution(np.abs(flat).max(axis=0))
        return cls(flat.mean(axis=0), np.where(differ, flat.std(axis=0), 1.0).astype(flat.dtype))

    def __call__(self, images: np.ndarray, *, blind: bool = False) -> np.ndarray:
        """float32 [N, L, d] of mean 0 and deviation 1, within ± `LIMIT`; all 0 where `blind`."""
        if blind:
            return np.zeros_like(images, dtype=np.float32)
        return np.clip((images - self.mean) / self.std, -LIMIT, LIMIT).astype(np.float32)


def image_features(
    policy: Policy,
    samples: Sequence[Sample],
    tokens: int,
    cache: VisionCache,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """float32 [N, tokens, d]: each picture's features, averaged in neighbouring runs to that many tokens.

    Raises:
        DataError, ImageError, ModelError: a sample cannot be encoded.
    """
    found: list[np.ndarray] = []
    for start in range(0, len(samples), _BATCH):
        found += prompt_features(policy, encode_prompts(policy, samples[start : start + _BATCH]), tokens, cache)
        if progress is not None:
            progress(len(found), len(samples))
    return np.stack(found)


def prompt_features(
    policy: Policy, prompts: Sequence[EncodedPrompt], tokens: int, cache: VisionCache
) -> list[np.ndarray]:
    """`image_features` of encoded prompts: float32 [tokens, d] each.

    Raises:
        ModelError: the tower's tokens do not match the prompt's placeholders.
    """
    found = vision_features(policy, prompts, cache)
    pooled = [torch.nn.functional.adaptive_avg_pool1d(each.tokens.float().T, tokens).T for each in found]
    return [each.cpu().numpy() for each in pooled]


class QShape(NamedTuple):
    """Sizes that follow from the environment."""

    image_tokens: int
    image_dim: int
    words: int
    """V, without the end."""
    max_words: int

    @property
    def actions(self) -> int:
        """A, the number of actions."""
        return self.words + 1


class FusedEncoder(nn.Module):
    """An observation as one vector, by one of the four fusions."""

    def __init__(self, shape: QShape, fusion: str, width: int) -> None:
        super().__init__()
        self.image = nn.Linear(shape.image_dim, width)
        self.image_place = nn.Parameter(torch.randn(shape.image_tokens, width) * 0.5)
        # Row 0 stands for the beginning, so that an empty caption has a token.
        self.word = nn.Embedding(shape.words + 1, width)
        self.word_place = nn.Parameter(torch.randn(shape.max_words + 1, width) * 0.5)
        self.encoders = nn.ModuleDict({name: _TokenEncoder(width) for name in MODALITIES})
        self.fusion = build_fusion(fusion, dict.fromkeys(MODALITIES, width), width)

    def forward(self, observation: Mapping[str, torch.Tensor]) -> Fused:
        """The fused vector [B, h], and the modalities' weights [B, 2] where the fusion has some."""
        words = observation["words"].long()
        begun = torch.cat([words.new_zeros(len(words), 1), words], dim=1)
        tokens = {
            "image": self.image(observation["image"]) + self.image_place,
            "words": self.word(begun) + self.word_place,
        }
        said = begun > 0
        said[:, 0] = True
        masks = {"image": torch.ones_like(tokens["image"][..., 0], dtype=torch.bool), "words": said}
        return self.fusion({name: encode(tokens[name]) for name, encode in self.encoders.items()}, masks)


class _TokenEncoder(nn.Module):
    """Each token by itself, with its place: what it takes for a mean over tokens to tell where something is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.GELU(), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(tokens + self.layers(tokens))


def q_head(width: int, outputs: int) -> nn.Module:
    """From a fused vector [B, h] to [B, outputs], with a hidden layer: only behind one do picture and words interact
    where the fusion is a sum."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, outputs))


def q_values(fused: torch.Tensor, advantage: nn.Module, value: nn.Module | None) -> torch.Tensor:
    """Q [B, A]: of one head, or V + A − mean A of two (dueling, Wang et al. 2016)."""
    scores = advantage(fused)
    if value is None:
        return scores
    return value(fused) + scores - scores.mean(dim=1, keepdim=True)


class QNetwork(nn.Module):
    """Q [B, A] of observations; `encoder`, `af` and, where it is dueling, `vf` are those of RLlib's DQN module."""

    def __init__(self, shape: QShape, fusion: str, width: int, *, dueling: bool) -> None:
        super().__init__()
        self.encoder = FusedEncoder(shape, fusion, width)
        self.af = q_head(width, shape.actions)
        self.vf = q_head(width, 1) if dueling else None

    def forward(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, A]; what an observation does not allow has a value, too, and is for the caller to leave out."""
        return q_values(self.encoder(observation).vector, self.af, self.vf)
