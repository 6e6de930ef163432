from __future__ import annotations

from pathlib import Path

import pytest

from mmrl_ray.errors import QuarantineError, RolloutError
from mmrl_ray.rollouts.step_sampler import StepSampler
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
