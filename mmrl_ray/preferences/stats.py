"""Figures of a store: how many, how far raters agree, and whether the place of a caption sways them. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from mmrl_ray.preferences.schema import Preference

_Z = 1.959963984540054
"""Of a 95 % interval."""


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
    """Of raters who labelled the same pairs."""

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
    """Of any number of preferences; pictures are not looked at."""
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
    """Of the labels that each unit got; units with a single label say nothing (Krippendorff 2011, nominal data)."""
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
