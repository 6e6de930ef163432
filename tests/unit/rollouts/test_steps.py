from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrl_ray.errors import QuarantineError, RolloutError
from mmrl_ray.experience.carriers import GroupKey, SamplingParams, ScoredGroup
from mmrl_ray.rollouts.steps import StepBuffer, StepSampler, TakenStep
from mmrl_ray.rollouts.types import AssignmentResult, Collected, DataFailure, GroupRequest
from tests.unit.experience.factories import scored
from tests.unit.rollouts.fakes import ListSource, config, samples


def sampler(tmp_path: Path, count: int = 40, budget: int = 2) -> StepSampler:
    return StepSampler(ListSource(samples(count), budget), config(tmp_path))


def ids(sampler: StepSampler) -> list[str]:
    return [request.sample.id for request in sampler.compose()]


def test_a_step_takes_the_next_samples_with_seeds_of_their_own(tmp_path: Path) -> None:
    first = sampler(tmp_path)
    requests = [*first.compose(), *first.compose()]
    assert [r.sample.id for r in requests] == [f"sample-{i:03d}" for i in range(8)]
    assert [(r.key.step, r.key.index, r.key.attempt) for r in requests] == [(s, i, 0) for s in (0, 1) for i in range(4)]
    assert len({r.sampling.seed for r in requests}) == 8
    assert all(r.completions == 2 and r.sampling.max_new_tokens == 4 for r in requests)
    second = sampler(tmp_path)
    assert [*second.compose(), *second.compose()] == requests


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    plain, ahead = sampler(tmp_path), sampler(tmp_path)
    for step in range(3):
        state = plain.state(step)
        ahead.read_ahead()
        ahead.read_ahead()
        assert ahead.state(step) == state
        assert ids(ahead) == ids(plain)


def test_a_sample_found_broken_is_passed_over_even_when_it_was_read_ahead(tmp_path: Path) -> None:
    """Six samples, four a step: step 1 comes round to sample-000 and sample-001 again."""
    plain, ahead = sampler(tmp_path, 6), sampler(tmp_path, 6)
    for each in (plain, ahead):
        each.compose()
    ahead.read_ahead()
    for each in (plain, ahead):
        each.quarantine(samples(1)[0], "broken")
    assert ids(plain) == ["sample-004", "sample-005", "sample-001", "sample-002"]
    assert ids(ahead) == ["sample-004", "sample-005", "sample-001", "sample-002"]


def test_a_state_continues_exactly_and_knows_what_is_quarantined(tmp_path: Path) -> None:
    one = sampler(tmp_path, 6)
    ids(one)
    one.read_ahead()
    one.quarantine(samples(2)[1], "broken")
    state = one.state(1)
    expected = [ids(one), ids(one)]
    other = sampler(tmp_path, 6)
    other.seek(1, state)
    assert other.quarantined == 1
    assert [ids(other), ids(other)] == expected


def test_seeking_back_without_a_state(tmp_path: Path) -> None:
    one = sampler(tmp_path)
    steps = [one.compose() for _ in range(5)]
    one.seek(3)
    assert one.compose() == steps[3]
    one.forget_before(3)
    one.seek(0)
    assert one.compose() == steps[0]
    with pytest.raises(RolloutError, match="step 2"):
        one.seek(2)


def test_the_budget_ends_the_run(tmp_path: Path) -> None:
    one = sampler(tmp_path, budget=1)
    one.quarantine(samples(2)[1], "broken")
    with pytest.raises(QuarantineError, match="sample-002"):
        one.quarantine(samples(3)[2], "broken too")


# -- the buffer --------------------------------------------------------------------------------------------------------


def requests(step: int, count: int) -> list[GroupRequest]:
    return [GroupRequest(GroupKey(step, i), sample, SamplingParams(), 2) for i, sample in enumerate(samples(count))]


def add(buffer: StepBuffer, *groups: ScoredGroup, records: tuple[bytes, ...] = (b"rows",)) -> bool:
    """Whether the buffer took them, as far as its figures say."""
    before = buffer.counts["duplicate"]
    buffer.add(Collected(AssignmentResult(0, 0, "w0", groups, timings={"sample": 1.0}), records))
    return buffer.counts["duplicate"] == before


def fail(buffer: StepBuffer, step: int, index: int) -> GroupRequest | None:
    return buffer.fail(DataFailure(GroupKey(step, index), "s", "broken image"))


def taken(buffer: StepBuffer, step: int, version: int) -> Sequence[ScoredGroup]:
    step_taken = buffer.take(step, version)
    assert isinstance(step_taken, TakenStep)
    return step_taken.groups


def test_a_step_is_handed_over_in_place_order_once_all_places_are_resolved() -> None:
    buffer = StepBuffer(capacity=3, max_staleness=0)
    buffer.open(4, requests(4, 3))
    assert add(buffer, scored(4, 2))
    assert add(buffer, scored(4, 0))
    assert not buffer.is_complete(4)
    asked = fail(buffer, 4, 1)
    assert asked is not None
    assert asked.sample.id == "sample-001"
    assert buffer.is_complete(4)
    step = buffer.take(4, version=4)
    assert isinstance(step, TakenStep)
    assert [g.key.index for g in step.groups] == [0, 2]
    assert [sample.id for sample in step.samples] == ["sample-000", "sample-002"]
    assert (step.tables, step.timings) == ([b"rows"] * 2, [{"sample": 1.0}] * 2)
    assert buffer.held == 0


def test_a_second_result_for_a_place_is_refused_and_counted() -> None:
    buffer = StepBuffer(capacity=2, max_staleness=0)
    buffer.open(0, requests(0, 2))
    assert add(buffer, scored(0, 1))
    assert not add(buffer, scored(0, 1, attempt=1))
    assert fail(buffer, 0, 1) is None
    assert not add(buffer, scored(9, 0)), "a step that is not open"
    assert buffer.counts["duplicate"] == 3
    assert buffer.arrived == 1


def test_a_place_outside_the_step_is_an_error() -> None:
    buffer = StepBuffer(capacity=2, max_staleness=0)
    buffer.open(0, requests(0, 2))
    with pytest.raises(ValueError, match="place 2 is outside step 0 of 2 groups"):
        add(buffer, scored(0, 2))


def test_capacity_bounds_open_steps() -> None:
    buffer = StepBuffer(capacity=5, max_staleness=1)
    buffer.open(0, requests(0, 3))
    assert buffer.has_room(2)
    assert not buffer.has_room(3)
    with pytest.raises(ValueError, match="no room for 3 groups"):
        buffer.open(1, requests(1, 3))
    with pytest.raises(ValueError, match="step 0 is open already"):
        buffer.open(0, requests(0, 1))


def test_stale_groups_are_dropped_counted_and_their_places_open_again() -> None:
    buffer = StepBuffer(capacity=4, max_staleness=1)
    buffer.open(3, requests(3, 2))
    add(buffer, scored(3, 0, version=1))
    add(buffer, scored(3, 1, version=2))
    stale = buffer.take(3, version=3)
    assert isinstance(stale, list)
    assert [(r.key.index, r.key.attempt, r.sample.id) for r in stale] == [(0, 1, "sample-000")]
    assert buffer.counts["stale"] == 1
    assert not buffer.is_complete(3)
    add(buffer, scored(3, 0, version=3, attempt=1))
    assert [(g.key.index, g.policy_version) for g in taken(buffer, 3, 3)] == [(0, 3), (1, 2)]


def test_taking_an_incomplete_step_is_an_error() -> None:
    buffer = StepBuffer(capacity=4, max_staleness=1)
    buffer.open(0, requests(0, 1))
    with pytest.raises(ValueError, match="step 0 is not complete"):
        buffer.take(0, version=0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2)), max_size=60))
def test_whatever_arrives_each_place_is_taken_at_most_once(arrivals: list[tuple[int, int, int]]) -> None:
    buffer = StepBuffer(capacity=20, max_staleness=0)
    for step in range(4):
        buffer.open(step, requests(step, 5))
    first: dict[tuple[int, int], int] = {}
    for step, index, attempt in arrivals:
        accepted = add(buffer, scored(step, index, attempt=attempt))
        assert accepted == ((step, index) not in first)
        first.setdefault((step, index), attempt)
    for step in range(4):
        places = {index for s, index in first if s == step}
        assert buffer.is_complete(step) == (places == set(range(5)))
        if buffer.is_complete(step):
            assert [g.key.attempt for g in taken(buffer, step, step)] == [first[step, i] for i in range(5)]


def test_captions_on_request_take_no_room_and_stay_when_training_begins_anew() -> None:
    buffer = StepBuffer(capacity=2, max_staleness=0)
    buffer.open(0, requests(0, 2))
    asked = buffer.open_evaluation(samples(2), SamplingParams(seed=5), 1, version=7, states=1)
    assert (buffer.held, buffer.evaluations) == (2, 1)
    assert [request.wants_state for request in asked.requests.values()] == [True, False]
    assert len({request.sampling.seed for request in asked.requests.values()}) == 2
    add(buffer, scored(0, 0))
    buffer.clear()
    caption = scored(-asked.number, 1)
    assert add(buffer, caption)
    assert not asked.complete
    assert fail(buffer, -asked.number, 0) == asked.requests[0]
    assert asked.complete
    answer = buffer.evaluation(asked.number).answer()
    assert (answer.groups, [f.sample_id for f in answer.failures], answer.version) == ((None, caption), ["s"], 7)
    assert (buffer.held, buffer.arrived) == (0, 0)
    buffer.close_evaluation(asked.number)
    assert not add(buffer, caption)
    with pytest.raises(KeyError):
        buffer.evaluation(asked.number)
