"""Figures of a store against values from the literature and closed forms."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from scipy.stats import binomtest

from mmrl_ray.preferences.schema import agreement, first_shown, preference_stats, wilson
from tests.unit.preferences.examples import preference

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: 4 observers, 12 units, values missing.
TABLE = (
    "1 2 3 3 2 1 4 1 2 * * *",
    "1 2 3 3 2 2 4 1 2 5 * 3",
    "* 3 3 3 2 3 4 2 2 5 1 *",
    "1 2 3 3 2 4 4 1 2 5 1 *",
)


def test_alpha_is_that_of_the_literature() -> None:
    columns = zip(*(row.split() for row in TABLE), strict=True)
    found = agreement([[value for value in column if value != "*"] for column in columns])
    assert found.alpha == pytest.approx(0.743, abs=5e-4)
    assert found.pairs == 11


def test_agreement_counts_couples_of_raters() -> None:
    units = [["a", "a", "b"], ["a"], ["tie", "tie"], ["b", "a"]]
    couples = [x == y for unit in units for x, y in combinations(unit, 2)]
    assert agreement(units).same == pytest.approx(sum(couples) / len(couples))
    assert math.isnan(agreement([["a"]]).same)
    assert math.isnan(agreement([["a", "a"]]).alpha)  # nobody could have disagreed
    assert agreement([["a", "a"], ["b", "b"]]).alpha == 1.0


@pytest.mark.parametrize(("chosen", "n"), [(0, 5), (5, 5), (37, 90), (1, 1)])
def test_the_interval_is_wilsons(chosen: int, n: int) -> None:
    expected = binomtest(chosen, n).proportion_ci(method="wilson")
    found = wilson([True] * chosen + [False] * (n - chosen))
    assert (found.value, found.low, found.high) == pytest.approx((chosen / n, expected.low, expected.high), abs=1e-12)


def test_a_position_bias_is_told_from_a_liking() -> None:
    """One rater always likes caption a, another always takes what is shown first; the order is the blinded one."""
    said = []
    for shade in range(400):
        first = first_shown(preference(shade=shade).pair.id, 0)
        said += [
            preference("a", "fair", shade=shade, first=first),
            preference(first, "biased", shade=shade, first=first),
        ]
    said += [preference("tie", "ties", shade=1, first="a"), preference("b", "unknown", shade=1)]
    found = preference_stats(said)
    assert found.raters["biased"][1].value == 1.0
    assert found.raters["fair"][1].low < 0.5 < found.raters["fair"][1].high
    assert found.first.low > 0.5
    assert found.first.count == 800
    assert (found.preferences, found.labelled_pairs, found.choices["tie"]) == (802, 400, 1)
    assert found.agreement.same == pytest.approx(0.5, abs=0.06)


def test_nothing_at_all() -> None:
    found = preference_stats([])
    assert (found.preferences, found.first.count) == (0, 0)
    assert math.isnan(found.first.value)
