from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import GroupKey, SamplingParams
from mmrl_ray.rollouts.assignments import Assignment, GroupRequest
from mmrl_ray.rollouts.ledger import Ledger
from tests.unit.rollouts.fakes import samples


def assignment(number: int, groups: int = 2, kind: str = "train") -> Assignment:
    requests = tuple(
        GroupRequest(GroupKey(number, i), sample, SamplingParams(), 2) for i, sample in enumerate(samples(groups))
    )
    return Assignment(id=number, kind=kind, groups=requests, version=0)  # type: ignore[arg-type]


def given(ledger: Ledger, worker: int, now: float = 0.0) -> Assignment:
    got = ledger.give(worker, now)
    assert got is not None
    return got


def test_assignments_are_given_in_order_and_evaluations_first() -> None:
    ledger = Ledger()
    for number, kind in ((1, "train"), (2, "train"), (3, "eval"), (4, "eval")):
        ledger.submit(assignment(number, kind=kind))
    assert [given(ledger, worker).id for worker in range(4)] == [3, 4, 1, 2]
    assert ledger.give(9, 0.0) is None


def test_a_lost_assignment_goes_first_under_a_fresh_id_and_attempt() -> None:
    ledger = Ledger()
    ledger.submit(assignment(0))
    assert ledger.accept(0, given(ledger, 0).id) is not None
    ledger.submit(assignment(1))
    ledger.submit(assignment(2))
    first = given(ledger, 0)
    assert ledger.lose(0, "killed") == []
    again = given(ledger, 1)
    assert again.id != first.id
    assert [g.key for g in again.groups] == [GroupKey(1, 0, 1), GroupKey(1, 1, 1)]
    assert [g.sample for g in again.groups] == [g.sample for g in first.groups]
    # The worker that was thought dead answers after all, or answers twice: neither counts.
    assert ledger.accept(0, first.id) is None
    assert ledger.accept(1, first.id) is None
    assert ledger.accept(1, again.id) == 0.0
    assert ledger.accept(1, again.id) is None
    assert ledger.counts["superseded"] == 3


def test_two_crashes_split_and_the_single_that_crashes_again_is_given_up() -> None:
    ledger = Ledger()
    ledger.submit(assignment(1, groups=3))
    for worker in (0, 1):
        assert len(given(ledger, worker).groups) == 3
        assert ledger.lose(worker, "segfault") == []
    singles = [given(ledger, worker) for worker in (2, 3, 4)]
    assert [[g.key.index for g in single.groups] for single in singles] == [[0], [1], [2]]
    assert len({single.id for single in singles}) == 3
    assert ledger.accept(2, singles[0].id) is not None
    (failure,) = ledger.lose(3, "segfault")
    assert failure.key == GroupKey(1, 1, 2)
    assert failure.sample_id == "sample-001"
    assert "crashed 3 workers" in failure.reason
    assert "segfault" in failure.reason
    assert ledger.accept(4, singles[2].id) is not None
    assert ledger.outstanding == 0


def test_a_group_that_was_alone_from_the_beginning_is_given_up_after_two_tries() -> None:
    ledger = Ledger()
    ledger.submit(assignment(1, groups=1))
    given(ledger, 0)
    assert ledger.lose(0, "segfault") == []
    given(ledger, 1)
    (failure,) = ledger.lose(1, "segfault")
    assert failure.reason == "its rollout crashed 2 workers, the last: segfault"
    assert ledger.outstanding == 0


def test_a_worker_taken_away_on_purpose_is_not_counted_against_its_assignment() -> None:
    ledger = Ledger()
    ledger.submit(assignment(1))
    for worker in range(5):
        given(ledger, worker)
        assert ledger.lose(worker, "resized", blame=False) == []
    assert len(given(ledger, 9).groups) == 2


def test_cancelled_assignments_do_not_come_back() -> None:
    ledger = Ledger()
    for number in (1, 2, 3):
        ledger.submit(assignment(number))
    ledger.submit(assignment(4, kind="eval"))
    evaluation, at_work, lost = given(ledger, 0), given(ledger, 1), given(ledger, 2)
    ledger.cancel("train")
    assert ledger.outstanding == 1
    assert ledger.accept(1, at_work.id) is None
    assert ledger.lose(2, "killed") == []
    assert ledger.give(1, 0.0) is None
    assert lost.id == 2
    assert ledger.accept(0, evaluation.id) is not None


def test_overdue_counts_from_when_a_worker_got_it() -> None:
    ledger = Ledger()
    ledger.submit(assignment(1))
    ledger.submit(assignment(2))
    given(ledger, 0, now=10.0)
    given(ledger, 1, now=15.0)
    assert ledger.overdue(now=20.0, timeout_s=10.0) == []
    assert ledger.overdue(now=20.1, timeout_s=10.0) == [0]
    assert ledger.at_work_seconds(20.0) == pytest.approx(15.0)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_group_is_resolved_exactly_once(seed: int) -> None:
    """Random deaths, late answers and repeated answers; one sample that kills whoever takes it."""
    chance = random.Random(seed)
    ledger = Ledger()
    for number in range(6):
        ledger.submit(assignment(number, groups=4))
    poison = (3, 2)
    resolved: list[tuple[int, int]] = []
    at_work: dict[int, Assignment] = {}
    answers: list[tuple[int, Assignment]] = []
    for worker in range(1000):
        if (got := ledger.give(worker, 0.0)) is not None:
            at_work[worker] = got
        if not at_work:
            break
        victim = chance.choice(list(at_work))
        work = at_work.pop(victim)
        places = [(g.key.step, g.key.index) for g in work.groups]
        if poison in places or chance.random() < 0.1:
            resolved += [(f.key.step, f.key.index) for f in ledger.lose(victim, "died")]
        elif ledger.accept(victim, work.id) is not None:
            resolved += places
        answers.append((victim, work))
        late, old = chance.choice(answers)
        assert ledger.accept(late, old.id) is None
    assert ledger.outstanding == 0
    assert sorted(resolved) == [(number, index) for number in range(6) for index in range(4)]
    assert ledger.counts["quarantined"] >= 1


# -- who is to blame ---------------------------------------------------------------------------------------------------


def test_the_same_error_from_the_first_assignments_is_the_models() -> None:
    """Each worker takes other samples than the one before; numbers and names in the error are the samples' own."""
    ledger = Ledger("some/model")
    for number in range(4):
        ledger.submit(distinct(number))
    for worker in range(2):
        assert given(ledger, worker).groups[0].sample.id == f"{worker}-0"
        assert ledger.lose(worker, f"ValueError: {10 + worker} tokens, 9 features of '{worker}-0'") == []
    assert given(ledger, 2).groups[0].sample.id == "2-0"
    with pytest.raises(ModelError, match=r"none has worked: ValueError: 12 tokens, 9 features.*'some/model'"):
        ledger.lose(2, "ValueError: 12 tokens, 9 features of '2-0'")


def test_one_sample_that_breaks_every_worker_at_the_beginning_is_still_the_one_to_blame() -> None:
    ledger = Ledger("some/model")
    ledger.submit(distinct(0))
    for worker in range(2):
        given(ledger, worker)
        assert ledger.lose(worker, "segfault") == []
    singles = [given(ledger, worker) for worker in (2, 3)]
    (failure,) = ledger.lose(2, "segfault")
    assert failure.sample_id == "0-0"
    assert ledger.accept(3, singles[1].id) is not None
    # Something worked: from here on it is a matter of samples, one by one.
    for number in range(1, 6):
        ledger.submit(distinct(number))
    given_up = []
    for worker in range(10, 60):
        if ledger.give(worker, 0.0) is not None:
            given_up += [failure.sample_id for failure in ledger.lose(worker, "segfault")]
    assert len(given_up) == 10
    assert ledger.outstanding == 0


def test_workers_that_die_together_at_the_beginning_are_one_loss() -> None:
    """Of a node, say; those that came afterwards count again. Errors of different kinds are not one fault."""
    ledger = Ledger("some/model")
    for number in range(12):
        ledger.submit(distinct(number))
    for worker in range(6):
        given(ledger, worker)
    for worker in range(6):
        ledger.lose(worker, "ActorDiedError: its node died")
    given(ledger, 6)
    ledger.lose(6, "KeyError: 'labels'")
    for worker in (7, 8):
        given(ledger, worker)
        ledger.lose(worker, "ActorDiedError: its node died")
    given(ledger, 9)
    with pytest.raises(ModelError, match="ActorDiedError"):
        ledger.lose(9, "ActorDiedError: its node died")


def distinct(number: int) -> Assignment:
    """Two groups of samples that no other assignment has."""
    plain = assignment(number)
    groups = tuple(replace(g, sample=replace(g.sample, id=f"{number}-{i}")) for i, g in enumerate(plain.groups))
    return replace(plain, groups=groups)
