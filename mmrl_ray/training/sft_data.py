"""What a step of supervised training is made of: samples in a seeded order, and which of its captions each trains on.

`K` images and `N = K · captions_per_image` captions a step, `T` tokens of a caption.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmrl_ray.config import Config
from mmrl_ray.config.sft import SftSection
from mmrl_ray.data.samples import QuarantineRecord, Sample, SampleStream, shuffled
from mmrl_ray.errors import DataError, ModelError
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.experience.plan import GroupSize, split_micro_batches
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import check_context, encode_caption, encode_prompts, image_key
from mmrl_ray.rollouts.assignment_tracker import FirstErrors

_KEPT_PROMPTS = 256 << 20
"""Bytes of prompts that need not be made anew in the next epoch: those of a small data set, whose steps are short."""

Pair = tuple[EncodedPrompt, list[torch.Tensor]]
"""One image's prompt and the token ids int64 [T] of its captions."""


def group_sizes(batch: Sequence[Pair]) -> list[GroupSize]:
    """What each image takes: its prompt, and so many captions of the longest one's length."""
    return [GroupSize(p.input_ids.numel(), len(c), max(t.numel() for t in c)) for p, c in batch]


def micro_batches(batch: Sequence[Pair], budget: int) -> Sequence[Sequence[int]]:
    """Which images go through the model together, of at most `budget` tokens."""
    (parts,) = split_micro_batches(group_sizes(batch), budget, 1)
    return parts


@dataclass(frozen=True, slots=True)
class Visit:
    """One time that a sample comes."""

    epoch: int
    """0-based, of the order of the data."""
    each: int
    """Captions that it gives at a time."""
    number: int = 0
    """Of those, this one."""
    seed: int = 0


def draw_target(sample: Sample, sft: SftSection, rng: random.Random, visit: Visit | None = None) -> str:
    """One caption to train on: terse, partial or full by the section's weights, among the kinds that the row has.

    Of the kind, one that `rng` draws; with `sft.captions: in_turn` the one whose turn it is in that visit.

    Raises:
        DataError: as `usable_targets`.
    """
    usable = usable_targets(sample, sft)
    (texts,) = rng.choices([texts for _, texts in usable], [weight for weight, _ in usable])
    if sft.captions == "random" or visit is None:
        return rng.choice(texts)
    turn, place = divmod(visit.epoch * visit.each + visit.number, len(texts))
    return texts[shuffled(len(texts), visit.seed, "captions", sample.key, turn)[place]]


def usable_targets(sample: Sample, sft: SftSection) -> list[tuple[float, list[str]]]:
    """(weight, captions) of each kind that has a weight and that the row has.

    Raises:
        DataError: there is none.
    """
    kinds = (
        (sft.terse, _texts(sample.metadata, "terse")),
        (sft.partial, _texts(sample.metadata, "partial")),
        (sft.full, list(sample.references)),
    )
    usable = [(weight, texts) for weight, texts in kinds if weight and texts]
    if not usable:
        raise DataError(
            f"sample {sample.id!r} has no caption to train on: sft asks for terse={sft.terse:g}, "
            f"partial={sft.partial:g}, full={sft.full:g}; give the row such captions or change the weights"
        )
    return usable


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    found = metadata.get(name)
    return [text for text in found if isinstance(text, str) and text] if isinstance(found, list) else []


class Batches:
    """Batch after batch, through all stages: its samples, and each one's prompt with its captions."""

    def __init__(
        self, policy: Policy, cfg: Config, seed: int, on_left_out: Callable[[QuarantineRecord], None] | None = None
    ) -> None:
        """Of `cfg.data.train`, in an order by `seed`; `on_left_out` hears of rows that cannot be used.

        Raises:
            DataError: the data set cannot be read.
        """
        self._policy, self._seed = policy, seed
        self._stream = SampleStream(
            cfg.data.train,
            prompt=cfg.data.prompt,
            seed=seed,
            max_quarantined=cfg.data.max_quarantined,
            on_quarantine=on_left_out,
        )
        self._first = FirstErrors(policy.path)
        self._rng = random.Random(seed)
        self._prompts: dict[tuple[str, str], EncodedPrompt] = {}
        self._room = _KEPT_PROMPTS

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, in plain values."""
        return {"stream": self._stream.state(), "rng": self._rng.getstate()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            DataError: it is of other data.
        """
        self._stream.restore(state["stream"])
        version, words, rest = state["rng"]
        self._rng.setstate((version, tuple(words), rest))
        self._first.worked()  # a whole step has

    def next(self, sft: SftSection) -> tuple[list[Sample], list[Pair]]:
        """The next batch, of a stage: samples that cannot be encoded or have no target are quarantined, as in rollouts.

        Raises:
            DataError: a shard cannot be read.
            QuarantineError: more rows that cannot be used than are tolerated.
            ModelError: the first rows all fail with the same error.
            ContextLengthError: a prompt and its caption exceed the model's context.
        """
        each, pairs = sft.captions_per_image, list[Pair]()
        taken = self._take(sft, sft.batch_size // each)
        for sample, prompt, epoch in taken:
            visits = [Visit(epoch, each, number, self._seed) for number in range(each)]
            texts = [draw_target(sample, sft, self._rng, visit) for visit in visits]
            captions = [encode_caption(self._policy, text) for text in texts]
            check_context(self._policy, prompt, max(caption.numel() for caption in captions))
            pairs.append((prompt, captions))
        return [sample for sample, *_ in taken], pairs

    def _take(self, sft: SftSection, count: int) -> list[tuple[Sample, EncodedPrompt, int]]:
        """So many samples that can be used, each with its prompt and its epoch."""
        taken: list[tuple[Sample, EncodedPrompt, int]] = []
        while len(taken) < count:
            (sample,) = self._stream.take(1)
            try:
                usable_targets(sample, sft)
                taken.append((sample, self._prompt(sample), self._stream.epoch))
            except (DataError, ModelError) as error:
                reason = f"{type(error).__name__}: {error}"
                self._first.failed([sample.key], reason)
                self._stream.quarantine.add(sample.id, reason, sample.place)
            else:
                self._first.worked()
        return taken

    def _prompt(self, sample: Sample) -> EncodedPrompt:
        """As `encode_prompts`, once for pictures and text that come again while there is room."""
        key = (image_key(self._policy, sample.images), sample.prompt)
        found = self._prompts.get(key)
        if found is None:
            (found,) = encode_prompts(self._policy, [sample])
            nbytes = sum(each.nbytes for each in (found.input_ids, *found.model_inputs.values()))
            if nbytes <= self._room:
                self._room -= nbytes
                self._prompts[key] = found
        return found
