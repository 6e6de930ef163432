"""Whether a policy looks at its pictures: the same captions beside a sample's own picture, another's, a grey one …

    arrange ──▶ (sample, another with another picture and other references) ──look──▶ figures of each sample

`own` is the sample with its own pictures, `other` with those of another sample, `grey` with grey ones of its own
pictures' sizes, `turned` with its own ones upside down, which show the same at other places; prompt and references stay
the sample's. Of each, `look` takes

    reference/SHOWN   log π(reference | prompt, pictures), mean over the tokens of the first reference
    caption/SHOWN     the same of the policy's own greedy caption of the sample as it is; not of `turned`
    reward/SHOWN      the reward that the sample gives to the greedy caption of the sample so shown; not of `turned`

all in nats a token, or of the reward. Policies reach it through `Eyes`, so that rollout workers, an evaluation and a
warm start look alike. Prompts that occur twice (another sample's picture is mostly a sample's own, grey pictures of one
size are all one) are computed once for up to `_ROWS` captions.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from PIL import Image

from mmrl_ray.data.images import decode_image, image_hash
from mmrl_ray.data.samples import Sample, shuffled
from mmrl_ray.errors import DataError, MMRLError
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, RewardBreakdown, Score

if TYPE_CHECKING:  # who arranges samples, or reads figures, needs none of what a model is made of
    import torch

logger = logging.getLogger(__name__)

OWN, OTHER, GREY, TURNED = "own", "other", "grey", "turned"
REFERENCE, CAPTION, REWARD = "reference", "caption", "reward"
_GREY = (128, 128, 128)
_ROWS = 8
"""Captions that share one pass of their prompt, as the completions of a group of training do."""


@dataclass(frozen=True, slots=True)
class Arranged:
    """Which samples are looked at, and whose pictures each is shown."""

    pairs: tuple[tuple[Sample, Sample], ...]
    without_picture: int = 0
    """Samples that are left out for that."""
    alike: int = 0
    """Samples that are left out since no other one has another picture and other references."""

    @property
    def told(self) -> str:
        """What was left out, in words; empty where nothing was."""
        return "; ".join(
            f"{count} samples {what}"
            for count, what in (
                (self.without_picture, "without a picture are left out"),
                (self.alike, "are left out: no other one has another picture and other references"),
            )
            if count
        )


def arrange(samples: Sequence[Sample], count: int, seed: int) -> Arranged:
    """Up to `count` of the samples, which ones follows from the seed, each with the next of another picture.

    Two that share a reference are no pair: a caption that is right for both need not tell them apart.
    """
    pictured = [sample for sample in samples if sample.images]
    order = [pictured[i] for i in shuffled(len(pictured), "sight", seed)][:count]
    hashes = [image_hash(sample.images) for sample in order]
    texts = [{" ".join(text.casefold().split()) for text in sample.references} for sample in order]
    pairs = []
    for place, sample in enumerate(order):
        after = ((place + step) % len(order) for step in range(1, len(order)))
        fits = (i for i in after if hashes[i] != hashes[place] and not texts[i] & texts[place])
        if (found := next(fits, None)) is not None:
            pairs.append((sample, order[found]))
    return Arranged(tuple(pairs), len(samples) - len(pictured), len(order) - len(pairs))


def grey_picture(image: bytes) -> bytes:
    """A PNG of one grey, of the picture's size.

    Raises:
        ImageError: the picture cannot be decoded.
    """
    return _png(Image.new("RGB", decode_image(image).size, _GREY))


def turned_picture(image: bytes) -> bytes:
    """A PNG of the picture turned by 180 degrees.

    Raises:
        ImageError: the picture cannot be decoded.
    """
    return _png(decode_image(image).transpose(Image.Transpose.ROTATE_180))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)  # it is read once
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Eyes:
    """What a look needs of a policy and its reward. What fails in them for one sample alone is a DataError."""

    encode: Callable[[Sample], EncodedPrompt]
    captions: Callable[[Sequence[EncodedPrompt], Sequence[Sample]], Sequence[Completion]]
    """Greedy, of samples with their prompts."""
    tokens: Callable[[str], torch.Tensor]
    """int64 [T] of a reference, its end token included."""
    logprobs: Callable[[Sequence[EncodedPrompt], Sequence[Sequence[torch.Tensor]]], Sequence[Sequence[torch.Tensor]]]
    """float32 [T] of each completion int64 [T] of each prompt."""
    longest: int
    """Tokens of a reference that count."""
    reward: Callable[[Sequence[Sample], Sequence[str]], Sequence[Score]] | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A sample that is looked at."""

    sample: Sample
    other: Sample
    """Whose pictures it is shown."""
    prompt: EncodedPrompt
    """Its own."""
    caption: Completion
    """Greedy, as it is."""
    reward: Score | None = None
    """Of that caption."""


def look(eyes: Eyes, seen: Sequence[Seen]) -> list[dict[str, float]]:
    """The figures of each sample, by the names at the top of this file; none of a sample that cannot be looked at.

    Raises:
        MMRLError: it is no single sample's fault.
    """
    prepared: list[_Row | None] = []
    for each in seen:
        try:
            prepared.append(_prepared(eyes, each))
        except MMRLError as error:  # of its picture, its length, its reference
            logger.warning("sample %r is not looked at: %s", each.sample.id, error)
            prepared.append(None)
    rows = [row for row in prepared if row is not None]
    if not rows:
        return [{} for _ in seen]
    found = _logprobs(eyes, rows)
    if eyes.reward is not None:
        for figures, more in zip(found, _rewards(eyes, rows), strict=True):
            figures |= more
    figures_of = iter(found)
    return [{} if row is None else next(figures_of) for row in prepared]


@dataclass(frozen=True, slots=True)
class _Row:
    seen: Seen
    shown: Mapping[str, tuple[Sample, EncodedPrompt]]
    tokens: Mapping[str, torch.Tensor]
    """Of reference and caption."""


def _prepared(eyes: Eyes, seen: Seen) -> _Row:
    sample = seen.sample
    if not sample.references:
        raise DataError("it has no reference")
    shown = {OWN: (sample, seen.prompt)}
    for name, images in (
        (OTHER, seen.other.images),
        (GREY, tuple(map(grey_picture, sample.images))),
        (TURNED, tuple(map(turned_picture, sample.images))),
    ):
        changed = replace(sample, images=images)
        shown[name] = (changed, eyes.encode(changed))
    reference = eyes.tokens(sample.references[0])[: eyes.longest]
    return _Row(seen, shown, {REFERENCE: reference, CAPTION: seen.caption.token_ids})


_Key = tuple[bytes, str]


def _key(prompt: EncodedPrompt) -> _Key:
    """Prompts of one key are the same."""
    return prompt.input_ids.numpy().tobytes(), prompt.image_key


def _logprobs(eyes: Eyes, rows: Sequence[_Row]) -> list[dict[str, float]]:
    prompts: dict[_Key, EncodedPrompt] = {}
    asked: dict[_Key, list[tuple[int, str, torch.Tensor]]] = {}
    # Own pictures first: where pictures change places in a batch, none then stands in for what it is held against.
    for shown in (OWN, OTHER, GREY, TURNED):
        for i, row in enumerate(rows):
            _, prompt = row.shown[shown]
            for what, tokens in row.tokens.items():
                if (what, shown) == (CAPTION, TURNED):
                    continue
                asked.setdefault(_key(prompt), []).append((i, f"{what}/{shown}", tokens))
            prompts.setdefault(_key(prompt), prompt)
    groups = [(key, many[at : at + _ROWS]) for key, many in asked.items() for at in range(0, len(many), _ROWS)]
    found = eyes.logprobs([prompts[key] for key, _ in groups], [[tokens for *_, tokens in part] for _, part in groups])
    figures: list[dict[str, float]] = [{} for _ in rows]
    for (_, part), scored in zip(groups, found, strict=True):
        for (i, name, _), logprobs in zip(part, scored, strict=True):
            figures[i][name] = float(logprobs.double().mean())
    return figures


def _rewards(eyes: Eyes, rows: Sequence[_Row]) -> list[dict[str, float]]:
    """Captions of the samples as they are shown, and what each sample gives for them."""
    assert eyes.reward is not None
    said = {_key(row.seen.prompt): row.seen.caption for row in rows}
    missing = {_key(prompt): (prompt, sample) for row in rows for sample, prompt in (row.shown[OTHER], row.shown[GREY])}
    missing = {key: each for key, each in missing.items() if key not in said}
    if missing:
        prompts, shown = zip(*missing.values(), strict=True)
        said |= zip(missing, eyes.captions(prompts, shown), strict=True)
    earned: list[dict[str, Score | None]] = [{OWN: row.seen.reward} for row in rows]
    places = [(i, name) for name in (OTHER, GREY) for i in range(len(rows))]
    samples = [rows[i].seen.sample for i, _ in places]
    scores = eyes.reward(samples, [said[_key(rows[i].shown[name][1])].caption for i, name in places])
    for (i, name), score in zip(places, scores, strict=True):
        earned[i][name] = score
    return [
        {f"{REWARD}/{name}": score.total for name, score in each.items() if isinstance(score, RewardBreakdown)}
        for each in earned
    ]
