"""The policy against runs whose behaviour is known: sampling and learning of so many seconds, alternating or not."""

from __future__ import annotations

import itertools
import math

import pytest

from mmrl_ray.rollouts.scaling import STEPS, AutoscalePolicy, StepLoad


def simulate(
    sampling: float, learning: float, *, start: int, least: int = 1, most: int = 64, useful: int = 64, overlap: bool
) -> tuple[list[int], AutoscalePolicy]:
    """Workers after each of 40 steps of a run in which a step's sampling takes so many worker-seconds."""
    policy, workers, seen = AutoscalePolicy(least, most, useful), start, []
    for step in range(40):
        sampled = sampling / workers
        wait = max(0.0, sampled - learning) if overlap else sampled
        seconds = learning + wait
        load = StepLoad(step, seconds, wait, workers, workers * seconds - sampling)
        decision = policy.look(load, workers)
        if decision is not None:
            assert decision.before == workers
            workers = decision.workers
        seen.append(workers)
    return seen, policy


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("start", [1, 5, 40])
@pytest.mark.parametrize(("sampling", "learning"), [(8.0, 1.0), (3.0, 1.0), (1.0, 1.0), (0.2, 1.0), (20.0, 0.7)])
def test_it_settles_where_both_wait_about_as_long_and_stays(
    sampling: float, learning: float, start: int, overlap: bool
) -> None:
    seen, policy = simulate(sampling, learning, start=start, overlap=overlap)
    assert len(set(seen[-10:])) == 1, f"it does not settle: {seen}"
    # Sampling takes as long as learning with this many workers: neither side should wait for more than the rounding.
    balanced = sampling / learning
    assert math.floor(0.75 * balanced) <= seen[-1] <= max(1, math.ceil(1.3 * balanced)), seen
    ups = {b > a for a, b in itertools.pairwise(seen) if a != b}
    assert len(ups) <= 1, f"up and down: {seen}"
    assert "in balance" in policy.finding or "too" in policy.finding


def test_no_decision_more_than_doubles_or_halves() -> None:
    up, _ = simulate(64.0, 1.0, start=1, overlap=True)
    down, _ = simulate(0.5, 1.0, start=40, overlap=True)
    for seen in (up, down):
        assert all(max(a, b) <= 2 * min(a, b) for a, b in itertools.pairwise(seen))
    assert up[STEPS - 2 : STEPS] == [1, 2], "not before enough steps were measured"


def test_bounds_hold_and_are_told() -> None:
    seen, policy = simulate(64.0, 1.0, start=1, most=3, overlap=True)
    assert seen[-1] == 3
    assert "too few, but rollout.workers.max=3" in policy.finding
    seen, policy = simulate(64.0, 1.0, start=1, most=30, useful=2, overlap=False)
    assert seen[-1] == 2
    assert "too few, but 2 can work at a time" in policy.finding
    seen, policy = simulate(0.1, 1.0, start=6, least=4, overlap=True)
    assert seen[-1] == 4


def test_a_decision_tells_its_numbers() -> None:
    policy = AutoscalePolicy(1, 8, 8)
    for step in (4, 5):
        assert policy.look(StepLoad(step, 2.0, 1.5, 1, 0.1), 1) is None
    assert policy.finding == "2 of 3 steps with 1 workers were measured"
    decision = policy.look(StepLoad(6, 2.0, 1.5, 1, 0.1), 1)
    assert decision is not None
    assert (decision.step, decision.before, decision.workers) == (6, 1, 2)
    # 1.9 worker-seconds of sampling and 0.5 s of learning: with two workers a wait of 0.75 s in steps of 1.25 s.
    assert decision.reason == (
        "of steps 4 to 6, 2.00 s each with 1 workers, the learner waited 75% and the workers idled 5%: too few, 1 → 2 "
        "(foreseen: waiting 60%, idling 24%)"
    )


def test_nothing_is_added_while_some_are_on_their_way_but_they_may_be_called_off() -> None:
    policy = AutoscalePolicy(1, 8, 8)
    for step in range(STEPS):
        assert policy.look(StepLoad(step, 2.0, 1.5, 2, 0.1), 4) is None
    assert "2 more are on their way" in policy.finding
    policy.forget()
    decisions = [policy.look(StepLoad(step, 2.0, 0.0, 2, 3.5), 4) for step in range(STEPS)]
    assert decisions[-1] is not None
    assert decisions[-1].workers == 2, "no more than halved"


def test_a_step_in_which_workers_came_or_went_is_not_measured() -> None:
    policy = AutoscalePolicy(1, 8, 8)
    loads = [StepLoad(step, 2.0, 1.5, workers, 0.0) for step, workers in enumerate([1, 1, 2, 2, 2, 2])]
    assert [policy.look(load, 2) is not None for load in loads] == [False] * 5 + [True]
