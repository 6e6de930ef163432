"""A preference: which of two captions of a picture a rater likes better; and figures of many of them.

One schema for store, Parquet and JSON lines:

id            string, made from what the row says, so that the same preference has the same id everywhere
image         struct<bytes: binary, path: string>; a path is relative to the file, or `sha256:HEX` of a known picture
prompt        string, what was asked
caption_a, _b string, two different captions
choice        string, `a`, `b` or `tie`; null in a pair that nobody has labelled yet
rater         string, who says so; null where `choice` is
source        string, where the captions are from: `RUN@STEP/SAMPLE` for those of a run
rating_a, _b  double, optional, on the store's scale (0 to 1 where none was named)
shown_first   string, optional: `a` or `b`, the caption that the rater saw first (on the left, on top)
created       timestamp in UTC, optional

The figures (`preference_stats`): how many, how far raters agree, and whether the place of a caption sways them. Pure.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

import pyarrow as pa

from mmrl_ray.errors import PreferenceError

Side = Literal["a", "b"]
Choice = Literal["a", "b", "tie"]

_NAME_CHARS = 128
_ID_CHARS = 32

# Nullable all of them: `datasets` takes no hint about a column that is not.
_FIELDS = (
    pa.field("id", pa.string()),
    pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    pa.field("prompt", pa.string()),
    pa.field("caption_a", pa.string()),
    pa.field("caption_b", pa.string()),
    pa.field("choice", pa.string()),
    pa.field("rater", pa.string()),
    pa.field("source", pa.string()),
    pa.field("rating_a", pa.float64()),
    pa.field("rating_b", pa.float64()),
    pa.field("shown_first", pa.string()),
    pa.field("created", pa.timestamp("us", tz="UTC")),
)
_DTYPES = {pa.float64(): "float64", pa.timestamp("us", tz="UTC"): "timestamp[us, tz=UTC]", pa.string(): "string"}
# Hugging Face `datasets` takes the column for pictures when told so.
_FEATURES = {
    each.name: {"_type": "Image"} if each.name == "image" else {"dtype": _DTYPES[each.type], "_type": "Value"}
    for each in _FIELDS
}
PREFERENCE_SCHEMA = pa.schema(_FIELDS, {"huggingface": json.dumps({"info": {"features": _FEATURES}})})
REQUIRED = ("image", "caption_a", "caption_b")
"""Columns that a file must have; those that are left out are null, and a prompt is empty then."""
_Z = 1.959963984540054
"""Of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two captions of one picture, to be compared.

    Raises:
        PreferenceError: on making one whose captions are equal, or whose texts are none.
    """

    image_hash: str
    """Hex SHA-256 of the encoded picture."""
    prompt: str
    caption_a: str
    caption_b: str
    source: str = ""
    image: bytes | None = field(default=None, repr=False)
    """The encoded picture; None where the store has it."""
    where: str = field(default="", compare=False)
    """File and line it comes from, for errors."""

    def __post_init__(self) -> None:
        for name in ("prompt", "caption_a", "caption_b", "source"):
            text = getattr(self, name)
            if not isinstance(text, str) or not _is_unicode(text):
                raise self.wrong(f"{name} {text!r:.60} is no text")
            object.__setattr__(self, name, text.strip())
        if self.caption_a == self.caption_b:
            raise self.wrong(f"both captions are {self.caption_a!r:.80}: two different ones make a pair")

    @property
    def id(self) -> str:
        """Of picture, prompt and captions, whichever of these stands first."""
        return _digest(self.image_hash, self.prompt, *sorted((self.caption_a, self.caption_b)))

    def wrong(self, problem: str) -> PreferenceError:
        """An error that says where."""
        return PreferenceError(f"{self.where}: {problem}" if self.where else problem)

    def flipped(self) -> Pair:
        """The same, with the captions' places exchanged."""
        return Pair(self.image_hash, self.prompt, self.caption_b, self.caption_a, self.source, self.image, self.where)


@dataclass(frozen=True, slots=True)
class Preference:
    """What one rater says about a pair.

    Raises:
        PreferenceError: on making one without a rater, with an unknown choice, or with a rating that is no number.
    """

    pair: Pair
    choice: Choice
    rater: str
    rating_a: float | None = None
    rating_b: float | None = None
    shown_first: Side | None = None
    """The caption that the rater saw first; None where nobody knows."""
    created: datetime | None = None
    """None: now, as the store sees it."""

    def __post_init__(self) -> None:
        wrong = self.pair.wrong
        if self.choice not in get_args(Choice):
            raise wrong(f"choice {self.choice!r:.40} is none of {', '.join(get_args(Choice))}")
        if self.shown_first is not None and self.shown_first not in get_args(Side):
            raise wrong(f"shown_first {self.shown_first!r:.40} is neither a nor b")
        if not isinstance(self.rater, str) or not 0 < len(self.rater) <= _NAME_CHARS or not self.rater.isprintable():
            raise wrong(f"rater {self.rater!r:.60}: write 1 to {_NAME_CHARS} printable characters")
        if self.created is not None and self.created.tzinfo is None:
            raise wrong(f"created {self.created} has no time zone")
        for name in ("rating_a", "rating_b"):
            rating = getattr(self, name)
            is_number = isinstance(rating, int | float) and not isinstance(rating, bool) and math.isfinite(rating)
            if rating is not None and not is_number:
                raise wrong(f"{name} is {rating!r:.40}: write a finite number, or leave it out")

    @property
    def id(self) -> str:
        """Of pair and rater: one rater has one say about a pair."""
        return _digest(self.pair.id, self.rater)

    @property
    def says(self) -> tuple[Choice, float | None, float | None]:
        """What makes two preferences of the same id the same, or a contradiction."""
        return self.choice, self.rating_a, self.rating_b

    def flipped(self) -> Preference:
        """The same, with the captions' places exchanged."""
        other: dict[Any, Any] = {"a": "b", "b": "a", "tie": "tie", None: None}
        return Preference(
            pair=self.pair.flipped(),
            choice=other[self.choice],
            rater=self.rater,
            rating_a=self.rating_b,
            rating_b=self.rating_a,
            shown_first=other[self.shown_first],
            created=self.created,
        )


def first_shown(pair_id: str, seed: int | str) -> Side:
    """Which caption of a pair is shown first: random, but the same for the same pair and seed, on any machine."""
    return "a" if hashlib.blake2b(f"{seed}/{pair_id}".encode(), digest_size=1).digest()[0] % 2 == 0 else "b"


def blinded(pair: Pair, seed: int | str) -> Pair:
    """The pair with the caption first that `first_shown` has first."""
    return pair if first_shown(pair.id, seed) == "a" else pair.flipped()


def run_source(run: str, step: int, sample_id: str) -> str:
    """`source` of captions that a run's policy wrote."""
    return f"{run}@{step}/{sample_id}"


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)  # lengths: ("ab", "c") is not ("a", "bc")
    return digest.hexdigest()[:_ID_CHARS]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text  # PostgreSQL's texts hold none


@dataclass(frozen=True, slots=True)
class Share:
    """A proportion with its 95 % interval."""

    value: float
    """NaN of nothing, like its bounds."""
    low: float
    high: float
    count: int
    """What it is a proportion of."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far raters agree who labelled the same pairs."""

    pairs: int
    """Pairs that two or more labelled."""
    same: float
    """Of all couples of raters of one pair, the share that said the same; NaN without any."""
    alpha: float
    """Krippendorff's, nominal: 1 is perfect, 0 is chance; NaN where nobody could have disagreed."""


@dataclass(frozen=True, slots=True)
class PreferenceStats:
    """What `mmrl preferences stats` prints."""

    preferences: int
    labelled_pairs: int
    choices: dict[str, int]
    raters: dict[str, tuple[int, Share]]
    """By name: preferences, and how often the caption shown first was chosen."""
    agreement: Agreement
    first: Share
    """How often the caption shown first was chosen, of preferences whose order is known and that are no ties. The order
    is random, so that an interval without ½ in it is a position bias."""


def preference_stats(preferences: Iterable[Preference]) -> PreferenceStats:
    """Figures of any number of preferences; pictures are not looked at."""
    by_pair: dict[str, list[str]] = defaultdict(list)
    by_rater: dict[str, list[bool]] = defaultdict(list)
    choices: Counter[str] = Counter()
    raters: Counter[str] = Counter()
    for each in preferences:
        by_pair[each.pair.id].append(each.choice)
        choices[each.choice] += 1
        raters[each.rater] += 1
        if each.shown_first is not None and each.choice != "tie":
            by_rater[each.rater].append(each.choice == each.shown_first)
    return PreferenceStats(
        preferences=raters.total(),
        labelled_pairs=len(by_pair),
        choices={name: choices[name] for name in ("a", "b", "tie")},
        raters={name: (count, wilson(by_rater[name])) for name, count in raters.most_common()},
        agreement=agreement(list(by_pair.values())),
        first=wilson([first for firsts in by_rater.values() for first in firsts]),
    )


def wilson(outcomes: Sequence[bool]) -> Share:
    """The share of True with Wilson's 95 % interval (1927), which stays inside [0, 1] for few outcomes, too."""
    n = len(outcomes)
    if n == 0:
        return Share(math.nan, math.nan, math.nan, 0)
    p = sum(outcomes) / n
    centre = p + _Z**2 / (2 * n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return Share(p, (centre - half) / scale, (centre + half) / scale, n)


def agreement(units: Sequence[Sequence[Hashable]]) -> Agreement:
    """Agreement of the labels a unit; units with a single label say nothing (Krippendorff 2011, nominal data)."""
    several = [Counter(unit) for unit in units if len(unit) > 1]
    couples = sum(math.comb(unit.total(), 2) for unit in several)
    same = sum(math.comb(count, 2) for unit in several for count in unit.values())
    totals: Counter[Hashable] = Counter()
    observed = 0.0
    for unit in several:
        totals.update(unit)
        n = unit.total()
        observed += sum(count * (n - count) for count in unit.values()) / (n - 1)
    labels = totals.total()
    expected = sum(count * (labels - count) for count in totals.values()) / max(labels - 1, 1)
    return Agreement(
        pairs=len(several),
        same=same / couples if couples else math.nan,
        alpha=1 - observed / expected if expected else math.nan,
    )
