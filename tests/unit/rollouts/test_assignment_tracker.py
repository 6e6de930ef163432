from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import GroupKey, SamplingParams
from mmrl_ray.rollouts.assignment_tracker import AssignmentTracker
from mmrl_ray.rollouts.types import Assignment, GroupRequest
from tests.unit.rollouts.fakes import samples


def assignment(number: int, groups: int = 2, kind: str = "train") -> Assignment:
    requests = tuple(
        GroupRequest(GroupKey(number, i), sample, SamplingParams(), 2) for i, sample in enumerate(samples(groups))
    )
    return Assignment(id=number, kind=kind, groups=requests, version=0)  # type: ignore[arg-type]


def given(tracker: AssignmentTracker, worker: int, now: float = 0.0) -> Assignment:
    got = tracker.assign(worker, now)
    assert got is not None
    return got


def test_assignments_are_given_in_order_and_evaluations_first() -> None:
    tracker = AssignmentTracker()
    for number, kind in ((1, "train"), (2, "train"), (3, "eval"), (4, "eval")):
        tracker.submit(assignment(number, kind=kind))
    assert [given(tracker, worker).id for worker in range(4)] == [3, 4, 1, 2]
    assert tracker.assign(9, 0.0) is None


def test_captions_beside_training_come_when_there_is_nothing_else() -> None:
    tracker = AssignmentTracker()
    for number, kind in ((1, "aside"), (2, "train"), (3, "aside"), (4, "eval"), (5, "train")):
        tracker.submit(assignment(number, kind=kind))
    order = []
    while (work := tracker.assign(len(order), 0.0)) is not None:
        order.append(work.id)
        if work.id == 2:  # of the next step, while they wait
            tracker.submit(assignment(6))
    assert order == [4, 2, 5, 6, 1, 3]


def test_a_lost_assignment_goes_first_under_a_fresh_id_and_attempt() -> None:
    tracker = AssignmentTracker()
    tracker.submit(assignment(0))
    assert tracker.complete(0, given(tracker, 0).id) is not None
    tracker.submit(assignment(1))
    tracker.submit(assignment(2))
    first = given(tracker, 0)
    assert tracker.requeue(0, "killed") == []
    again = given(tracker, 1)
    assert again.id != first.id
    assert [g.key for g in again.groups] == [GroupKey(1, 0, 1), GroupKey(1, 1, 1)]
    assert [g.sample for g in again.groups] == [g.sample for g in first.groups]
    # The worker that was thought dead answers after all, or answers twice: neither counts.
    assert tracker.complete(0, first.id) is None
    assert tracker.complete(1, first.id) is None
    assert tracker.complete(1, again.id) == 0.0
    assert tracker.complete(1, again.id) is None
    assert tracker.counts["superseded"] == 3


def test_two_crashes_split_and_the_single_that_crashes_again_is_given_up() -> None:
    tracker = AssignmentTracker()
    tracker.submit(assignment(1, groups=3))
    for worker in (0, 1):
        assert len(given(tracker, worker).groups) == 3
        assert tracker.requeue(worker, "segfault") == []
    singles = [given(tracker, worker) for worker in (2, 3, 4)]
    assert [[g.key.index for g in single.groups] for single in singles] == [[0], [1], [2]]
    assert len({single.id for single in singles}) == 3
    assert tracker.complete(2, singles[0].id) is not None
    (failure,) = tracker.requeue(3, "segfault")
    assert failure.key == GroupKey(1, 1, 2)
    assert failure.sample_id == "sample-001"
    assert "crashed 3 workers" in failure.reason
    assert "segfault" in failure.reason
    assert tracker.complete(4, singles[2].id) is not None
    assert tracker.outstanding == 0


def test_a_group_that_was_alone_from_the_beginning_is_given_up_after_two_tries() -> None:
    tracker = AssignmentTracker()
    tracker.submit(assignment(1, groups=1))
    given(tracker, 0)
    assert tracker.requeue(0, "segfault") == []
    given(tracker, 1)
    (failure,) = tracker.requeue(1, "segfault")
    assert failure.reason == "its rollout crashed 2 workers, the last: segfault"
    assert tracker.outstanding == 0


def test_cancelled_assignments_do_not_come_back() -> None:
    tracker = AssignmentTracker()
    for number in (1, 2, 3):
        tracker.submit(assignment(number))
    tracker.submit(assignment(4, kind="eval"))
    evaluation, at_work, lost = given(tracker, 0), given(tracker, 1), given(tracker, 2)
    tracker.cancel("train")
    assert tracker.outstanding == 1
    assert tracker.complete(1, at_work.id) is None
    assert tracker.requeue(2, "killed") == []
    assert tracker.assign(1, 0.0) is None
    assert lost.id == 2
    assert tracker.complete(0, evaluation.id) is not None


def test_overdue_counts_from_when_a_worker_got_it() -> None:
    tracker = AssignmentTracker()
    tracker.submit(assignment(1))
    tracker.submit(assignment(2))
    given(tracker, 0, now=10.0)
    given(tracker, 1, now=15.0)
    assert tracker.overdue(now=20.0, timeout_s=10.0) == []
    assert tracker.overdue(now=20.1, timeout_s=10.0) == [0]
    assert tracker.at_work_seconds(20.0) == pytest.approx(15.0)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_group_is_resolved_exactly_once(seed: int) -> None:
    """Random deaths, late answers and repeated answers; one sample that kills whoever takes it."""
    chance = random.Random(seed)
    tracker = AssignmentTracker()
    for number in range(6):
        tracker.submit(assignment(number, groups=4))
    poison = (3, 2)
    resolved: list[tuple[int, int]] = []
    at_work: dict[int, Assignment] = {}
    answers: list[tuple[int, Assignment]] = []
    for worker in range(1000):
        if (got := tracker.assign(worker, 0.0)) is not None:
            at_work[worker] = got
        if not at_work:
            break
        victim = chance.choice(list(at_work))
        work = at_work.pop(victim)
        places = [(g.key.step, g.key.index) for g in work.groups]
        if poison in places or chance.random() < 0.1:
            resolved += [(f.key.step, f.key.index) for f in tracker.requeue(victim, "died")]
        elif tracker.complete(victim, work.id) is not None:
            resolved += places
        answers.append((victim, work))
        late, old = chance.choice(answers)
        assert tracker.complete(late, old.id) is None
    assert tracker.outstanding == 0
    assert sorted(resolved) == [(number, index) for number in range(6) for index in range(4)]
    assert tracker.counts["quarantined"] >= 1


# -- who is to blame ---------------------------------------------------------------------------------------------------


def test_the_same_error_from_the_first_assignments_is_the_models() -> None:
    """Each worker takes other samples than the one before; numbers and names in the error are the samples' own."""
    tracker = AssignmentTracker("some/model")
    for number in range(4):
        tracker.submit(distinct(number))
    for worker in range(2):
        assert given(tracker, worker).groups[0].sample.id == f"{worker}-0"
        assert tracker.requeue(worker, f"ValueError: {10 + worker} tokens, 9 features of '{worker}-0'") == []
    assert given(tracker, 2).groups[0].sample.id == "2-0"
    with pytest.raises(ModelError, match=r"none has worked: ValueError: 12 tokens, 9 features.*'some/model'"):
        tracker.requeue(2, "ValueError: 12 tokens, 9 features of '2-0'")


def test_one_sample_that_breaks_every_worker_at_the_beginning_is_still_the_one_to_blame() -> None:
    tracker = AssignmentTracker("some/model")
    tracker.submit(distinct(0))
    for worker in range(2):
        given(tracker, worker)
        assert tracker.requeue(worker, "segfault") == []
    singles = [given(tracker, worker) for worker in (2, 3)]
    (failure,) = tracker.requeue(2, "segfault")
    assert failure.sample_id == "0-0"
    assert tracker.complete(3, singles[1].id) is not None
    # Something worked: from here on it is a matter of samples, one by one.
    for number in range(1, 6):
        tracker.submit(distinct(number))
    given_up = []
    for worker in range(10, 60):
        if tracker.assign(worker, 0.0) is not None:
            given_up += [failure.sample_id for failure in tracker.requeue(worker, "segfault")]
    assert len(given_up) == 10
    assert tracker.outstanding == 0


def test_workers_that_die_together_at_the_beginning_are_one_loss() -> None:
    """Of a node, say; those that came afterwards count again. Errors of different kinds are not one fault."""
    tracker = AssignmentTracker("some/model")
    for number in range(12):
        tracker.submit(distinct(number))
    for worker in range(6):
        given(tracker, worker)
    for worker in range(6):
        tracker.requeue(worker, "ActorDiedError: its node died")
    given(tracker, 6)
    tracker.requeue(6, "KeyError: 'labels'")
    for worker in (7, 8):
        given(tracker, worker)
        tracker.requeue(worker, "ActorDiedError: its node died")
    given(tracker, 9)
    with pytest.raises(ModelError, match="ActorDiedError"):
        tracker.requeue(9, "ActorDiedError: its node died")


def distinct(number: int) -> Assignment:
    """Two groups of samples that no other assignment has."""
    plain = assignment(number)
    groups = tuple(replace(g, sample=replace(g.sample, id=f"{number}-{i}")) for i, g in enumerate(plain.groups))
    return replace(plain, groups=groups)


def named(number: int, kind: str = "train") -> Assignment:
    """With samples of its own."""
    made = assignment(number, kind=kind)
    groups = tuple(replace(g, sample=replace(g.sample, id=f"{number}/{g.sample.id}")) for g in made.groups)
    return replace(made, groups=groups)


def test_a_worker_is_given_what_it_was_told_to_expect() -> None:
    tracker = AssignmentTracker()
    for number in range(6):
        tracker.submit(named(number))
    assert [given(tracker, worker).id for worker in range(2)] == [0, 1]
    assert [tracker.upcoming(worker) for worker in range(2)] == [named(2).samples, named(3).samples]
    for worker in range(2):
        tracker.complete(worker, worker)
    # The second comes first, and then one that was told nothing.
    assert [given(tracker, worker).id for worker in (1, 5, 0)] == [3, 2, 4]
    tracker.expect([named(6).samples])
    assert [tracker.upcoming(worker) for worker in (0, 1, 5)] == [named(5).samples, named(6).samples, ()]
    assert [tracker.is_told(worker) for worker in (0, 1, 5)] == [True, True, False]
    tracker.submit(named(6))
    tracker.submit(named(7, "eval"))
    tracker.complete(1, 3)
    assert given(tracker, 8).id == 7, "evaluations go first, whatever was told"
    assert given(tracker, 1).id == 6
    tracker.leave(0)
    assert tracker.upcoming(5) == named(5).samples


def test_what_a_slow_worker_was_told_is_not_kept_for_it() -> None:
    tracker = AssignmentTracker()
    for number in range(30):
        tracker.submit(named(number))
    for worker in range(3):
        given(tracker, worker)
    assert [tracker.upcoming(worker) for worker in range(3)] == [named(number).samples for number in (3, 4, 5)]
    came = []
    while 3 not in came:  # the first worker does not come back
        for worker in (1, 2):
            tracker.complete(worker, tracker.working_on(worker).id)  # type: ignore[union-attr]
            came.append(given(tracker, worker).id)
            tracker.upcoming(worker)
    assert len(came) <= 6


def test_whatever_is_told_each_assignment_is_done_once() -> None:
    random_ = random.Random(3)
    tracker = AssignmentTracker()
    waiting, done = list(range(200)), []
    while len(done) < 200:
        worker = random_.randrange(5)
        tracker.expect([named(number).samples for number in waiting[:3]])
        if waiting and random_.random() < 0.5:
            tracker.submit(named(waiting.pop(0)))
        if (work := tracker.working_on(worker)) is not None and random_.random() < 0.7:
            assert tracker.complete(worker, work.id) is not None
            done.append(work.groups[0].sample.id)
        elif work is not None:
            tracker.requeue(worker, "gone") if random_.random() < 0.05 else tracker.upcoming(worker)
        else:
            tracker.assign(worker, 0.0)
            if random_.random() < 0.5:
                tracker.upcoming(worker)
    assert sorted(done) == sorted(f"{number}/sample-000" for number in range(200))
