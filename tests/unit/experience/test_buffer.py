from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrl_ray.experience.buffer import GroupBuffer
from mmrl_ray.experience.carriers import GroupKey

from .factories import scored


def test_a_step_is_handed_over_in_place_order_once_all_places_are_resolved() -> None:
    buffer = GroupBuffer(capacity=3, max_staleness=0)
    buffer.open_step(4, 3)
    assert buffer.add(scored(4, 2))
    assert buffer.add(scored(4, 0))
    assert not buffer.is_complete(4)
    assert buffer.fail(GroupKey(4, 1), "broken image")
    assert buffer.is_complete(4)
    groups, stale = buffer.take(4, version=4)
    assert [g.key.index for g in groups] == [0, 2]
    assert stale == []
    assert buffer.held == 0


def test_a_second_result_for_a_place_is_refused_and_counted() -> None:
    buffer = GroupBuffer(capacity=2, max_staleness=0)
    buffer.open_step(0, 2)
    assert buffer.add(scored(0, 1))
    assert not buffer.add(scored(0, 1, attempt=1))
    assert not buffer.fail(GroupKey(0, 1), "late failure")
    assert not buffer.add(scored(9, 0)), "a step that is not open"
    assert buffer.counts["duplicate"] == 3
    assert buffer.arrived == 1


def test_a_place_outside_the_step_is_an_error() -> None:
    buffer = GroupBuffer(capacity=2, max_staleness=0)
    buffer.open_step(0, 2)
    with pytest.raises(ValueError, match="place 2 is outside step 0 of 2 groups"):
        buffer.add(scored(0, 2))


def test_capacity_bounds_open_steps() -> None:
    buffer = GroupBuffer(capacity=5, max_staleness=1)
    buffer.open_step(0, 3)
    assert buffer.has_room(2)
    assert not buffer.has_room(3)
    with pytest.raises(ValueError, match="no room for 3 groups"):
        buffer.open_step(1, 3)
    with pytest.raises(ValueError, match="step 0 is open already"):
        buffer.open_step(0, 1)


def test_stale_groups_are_dropped_counted_and_their_places_open_again() -> None:
    buffer = GroupBuffer(capacity=4, max_staleness=1)
    buffer.open_step(3, 2)
    buffer.add(scored(3, 0, version=1))
    buffer.add(scored(3, 1, version=2))
    groups, stale = buffer.take(3, version=3)
    assert groups == []
    assert [(k.index) for k in stale] == [0]
    assert buffer.counts["stale"] == 1
    assert not buffer.is_complete(3)
    buffer.add(scored(3, 0, version=3, attempt=1))
    groups, stale = buffer.take(3, version=3)
    assert [(g.key.index, g.policy_version) for g in groups] == [(0, 3), (1, 2)]


def test_taking_an_incomplete_step_is_an_error() -> None:
    buffer = GroupBuffer(capacity=4, max_staleness=1)
    buffer.open_step(0, 1)
    with pytest.raises(ValueError, match="step 0 is not complete"):
        buffer.take(0, version=0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2)), max_size=60))
def test_whatever_arrives_each_place_is_taken_at_most_once(arrivals: list[tuple[int, int, int]]) -> None:
    buffer = GroupBuffer(capacity=20, max_staleness=0)
    for step in range(4):
        buffer.open_step(step, 5)
    first: dict[tuple[int, int], int] = {}
    for step, index, attempt in arrivals:
        accepted = buffer.add(scored(step, index, attempt=attempt))
        assert accepted == ((step, index) not in first)
        first.setdefault((step, index), attempt)
    for step in range(4):
        places = {index for s, index in first if s == step}
        assert buffer.is_complete(step) == (places == set(range(5)))
        if buffer.is_complete(step):
            groups, _ = buffer.take(step, version=step)
            assert [g.key.attempt for g in groups] == [first[step, i] for i in range(5)]
