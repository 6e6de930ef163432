"""The controller with a pool in this process: every rule of a run but Ray."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest
import torch

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import LearnerError, ModelError, QuarantineError, RolloutError, RunError
from mmrl_ray.experience.carriers import SamplingParams, StepPlan
from mmrl_ray.rollouts.controller import Controller
from mmrl_ray.rollouts.controller_actor import ControllerClient
from mmrl_ray.rollouts.group_codec import open_payload
from mmrl_ray.rollouts.types import Generated, Stop, Wait
from mmrl_ray.rollouts.weights import decode_state, encode_state
from mmrl_ray.run_records.rollout_log import LEFT_OUT
from mmrl_ray.run_records.run_dir import RunDir
from tests.unit.rollouts.fakes import FakeEngine, FakePool, ListSource, config, samples

Sections = Mapping[str, Any]


class World:
    """A controller, what it is made of, and a learner that takes its steps."""

    def __init__(
        self,
        folder: Path,
        *,
        count: int = 40,
        rows: Sequence[Sample] = (),
        engine: FakeEngine | None = None,
        clock: Callable[[], float] = time.monotonic,
        pool: FakePool | None = None,
        **sections: Sections,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.cfg = config(folder, **sections)
        self.run = RunDir.create(folder, "run") if not (folder / "run").exists() else RunDir.open(folder, "run")
        self.engine = engine or FakeEngine("w0")
        self.pool = pool or FakePool(self.engine, decode_state)
        self.controller = Controller(
            self.cfg,
            self.run,
            pool=self.pool,
            source=ListSource(rows or samples(count), self.cfg.data.max_quarantined),
            put=lambda value: value,
            fetch=lambda value: value,
            clock=clock,
        )
        self.controller.start()

    def plan(self, step: int) -> StepPlan:
        answer = self.controller.next_plan(step, 1, wait_s=20.0)
        assert isinstance(answer, StepPlan), answer
        return answer

    def publish(self, version: int) -> None:
        self.controller.publish(version, encode_state({"version": torch.tensor(version)}))

    def step(self, step: int, **metrics: Any) -> StepPlan:
        plan = self.plan(step)
        self.publish(step + 1)
        self.controller.finish_step(step, metrics)
        return plan

    def generate(self, asked: Sequence[Sample], sampling: SamplingParams, **options: Any) -> Generated:
        answer = self.controller.captions(self.controller.ask_captions(asked, sampling, **options), 20.0, 20.0)
        assert isinstance(answer, Generated), answer
        return answer

    def lines(self) -> list[dict[str, Any]]:
        return self.run.read_lines("metrics.jsonl")

    def dispatched(self) -> list[tuple[int, int]]:
        """(step, version) of each training assignment so far."""
        return [(a.groups[0].key.step, a.version) for a in self.pool.submitted if a.kind == "train"]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def build(name: str = "world", **arguments: Any) -> World:
        worlds.append(World(tmp_path / name, **arguments))
        return worlds[-1]

    yield build
    for world in worlds:
        with contextlib.suppress(RunError):  # a test that breaks the run folder breaks its closing too
            world.controller.close(10.0)


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.002)


def essence(plan: StepPlan) -> Any:
    groups = [(g.key, g.sample_id, g.staleness, g.advantages, g.scales, g.completion_tokens) for g in plan.groups]
    opened = [open_payload(g.payload, lambda value: value) for g in plan.groups]
    texts = [[c.token_ids.tolist() for c in group.completions] for group in opened]
    return plan.step, groups, texts, plan.denominator, plan.micro_batches


# -- dispatch ----------------------------------------------------------------------------------------------------------


def test_nothing_is_sampled_before_somebody_says_where_to_begin(make: Callable[..., World]) -> None:
    world = make()
    answer = world.controller.next_plan(0, 1, wait_s=0.05)
    assert isinstance(answer, Wait)
    assert world.pool.submitted == []


def test_on_policy_generation_and_learning_alternate(make: Callable[..., World]) -> None:
    world = make()
    world.controller.rewind(0)
    for step in range(3):
        plan = world.plan(step)
        assert [g.staleness for g in plan.groups] == [0] * 4
        assert world.dispatched() == [(s, s) for s in range(step + 1) for _ in range(2)]
        world.publish(step + 1)
        world.controller.finish_step(step, {})
    # What was sampled with version v had the weights of version v; 0 needs none.
    assert [(v, w) for v, w in world.engine.seen if v < 3] == [(0, -1)] * 2 + [(1, 1)] * 2 + [(2, 2)] * 2


def test_staleness_lets_generation_run_ahead_and_no_further(make: Callable[..., World]) -> None:
    world = make(rollout={"max_staleness": 2}, learner={"steps": 8})
    world.controller.rewind(0)
    world.plan(0)
    until(lambda: len(world.dispatched()) == 6)
    assert world.dispatched() == [(s, 0) for s in (0, 1, 2) for _ in range(2)]
    seen = []
    for step in range(6):
        plan = world.step(step)
        seen.append({g.staleness for g in plan.groups})
        until(lambda step=step: max(s for s, _ in world.dispatched()) == min(step + 3, 7))
    assert seen == [{0}, {1}, {2}, {2}, {2}, {2}]
    assert [line["staleness/max"] for line in world.lines()] == [0, 1, 2, 2, 2, 2]


def test_a_small_buffer_holds_generation_back(make: Callable[..., World]) -> None:
    world = make(rollout={"max_staleness": 3, "buffer_groups": 6})
    world.controller.rewind(0)
    until(lambda: world.pool.submitted and not world.pool.queue)
    assert {s for s, _ in world.dispatched()} == {0}
    world.plan(0)
    until(lambda: {s for s, _ in world.dispatched()} == {0, 1})


def test_assignments_do_not_depend_on_the_pool(make: Callable[..., World]) -> None:
    world = make(rollout={"groups_per_assignment": 3})
    world.controller.rewind(0)
    world.plan(0)
    assert [[g.key.index for g in a.groups] for a in world.pool.submitted] == [[0, 1, 2], [3]]
    assert not any(a.reference_logprobs or a.greedy_baseline for a in world.pool.submitted)


@pytest.mark.parametrize(
    ("learner", "reference", "greedy"),
    [({"kl": {"weight": 0.1}}, True, False), ({"advantage": "greedy", "kl": {"weight": 0.0}}, False, True)],
)
def test_reference_and_greedy_captions_are_made_when_the_learner_needs_them(
    make: Callable[..., World], learner: Sections, reference: bool, greedy: bool
) -> None:
    world = make(learner=learner)
    world.controller.rewind(0)
    until(lambda: world.pool.submitted)
    (assignment, *_) = world.pool.submitted
    assert (assignment.reference_logprobs, assignment.greedy_baseline) == (reference, greedy)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_all_ranks_get_the_same_plan(make: Callable[..., World]) -> None:
    world = make()
    world.controller.rewind(0)
    plans: list[Any] = []
    ranks = [
        threading.Thread(target=lambda: plans.append(world.controller.next_plan(0, 3, wait_s=20.0))) for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
    assert len(plans) == 3
    assert plans[0] is plans[1] is plans[2]
    assert len(plans[0].micro_batches) == 3
    with pytest.raises(RolloutError, match="planned for 3 ranks, not 1"):
        world.controller.next_plan(0, 1)


def test_a_caller_waits_for_a_bounded_time_and_asks_again(make: Callable[..., World]) -> None:
    world = make()
    world.pool.release = 1
    world.controller.rewind(0)
    until(lambda: world.controller.status()["step_groups"] == {"arrived": 2, "asked": 4})
    answer = world.controller.next_plan(0, 1, wait_s=0.05)
    assert isinstance(answer, Wait)
    assert "2 of 4 groups" in answer.reason
    assert "learner waits for step 0" in world.controller.status()["waiting"]
    world.pool.release = 1
    assert world.plan(0).step == 0
    assert "learner works on step 0" in world.controller.status()["waiting"]


def test_a_step_that_is_not_due_is_an_error(make: Callable[..., World]) -> None:
    world = make()
    world.controller.rewind(0)
    world.step(0)
    for step in (0, 2):
        with pytest.raises(RolloutError, match=f"step {step} was asked for, but 1 is due"):
            world.controller.next_plan(step, 1)
    with pytest.raises(RolloutError, match="its plan is not out"):
        world.controller.finish_step(1, {})
    with pytest.raises(RolloutError, match="version 7 was published"):
        world.publish(7)


def test_the_end_and_a_stop(make: Callable[..., World]) -> None:
    done = make("done", learner={"steps": 2})
    done.controller.rewind(0)
    for step in range(2):
        done.step(step)
    assert done.controller.next_plan(2, 1) == Stop("all 2 steps are done")
    assert {s for s, _ in done.dispatched()} == {0, 1}

    stopped = make("stopped")
    stopped.controller.rewind(0)
    stopped.plan(0)
    stopped.controller.request_stop("Ctrl-C")
    assert stopped.controller.next_plan(0, 1).step == 0  # type: ignore[union-attr]  # a rank that comes late gets it too
    stopped.publish(1)
    stopped.controller.finish_step(0, {})
    assert stopped.controller.next_plan(1, 1) == Stop("Ctrl-C")
    assert {s for s, _ in stopped.dispatched()} == {0}


def test_an_error_of_the_pump_ends_the_run_with_its_cause(make: Callable[..., World]) -> None:
    world = make()
    world.pool.release = 0
    world.controller.rewind(0)
    world.pool.error = RolloutError("0 of at least 1 rollout workers were ready")
    answer = world.controller.next_plan(0, 1, wait_s=20.0)
    assert answer == Stop("0 of at least 1 rollout workers were ready", failed=True)
    assert str(world.controller.failure()) == "0 of at least 1 rollout workers were ready"
    for call in (
        lambda: world.controller.finish_step(0, {}),
        lambda: world.controller.checkpoint_state(0),
        lambda: world.controller.rewind(0),
        lambda: world.controller.ask_captions(samples(1), SamplingParams()),
        lambda: world.publish(1),
    ):
        with pytest.raises(RolloutError, match="at least 1"):
            call()


# -- broken and masked -------------------------------------------------------------------------------------------------


def test_a_broken_sample_leaves_a_hole_and_never_comes_again(make: Callable[..., World]) -> None:
    world = make(engine=FakeEngine("w0", broken=frozenset({"sample-001"})), count=6)
    world.controller.rewind(0)
    assert [g.key.index for g in world.step(0).groups] == [0, 2, 3]
    assert [g.sample_id for g in world.step(1).groups] == ["sample-004", "sample-005", "sample-000", "sample-002"]
    assert [line["quarantined"] for line in world.lines()] == [1, 0]


def test_too_many_broken_samples_end_the_run(make: Callable[..., World]) -> None:
    world = make(engine=FakeEngine("w0", broken=frozenset(f"sample-{i:03d}" for i in range(3))))
    world.controller.rewind(0)
    answer = world.controller.next_plan(0, 1, wait_s=20.0)
    assert isinstance(answer, Stop)
    assert answer.failed
    assert isinstance(world.controller.failure(), QuarantineError)


def test_of_rows_with_one_id_only_the_broken_one_stays_away(make: Callable[..., World]) -> None:
    """A checkpoint of before, which knew ids alone, keeps all of them away, as that run did."""
    rows = [replace(each, id="dog", place=f"a.parquet row {i}") for i, each in enumerate(samples(5))]
    world = make(rows=rows, engine=FakeEngine("w0", broken=frozenset({"a.parquet row 1", "a.parquet row 3"})))
    world.controller.rewind(0)
    plans = [world.step(step) for step in range(3)]
    assert [[g.payload.sample.place[-1] for g in plan.groups] for plan in plans] == [
        ["0", "2"],
        list("4024"),
        list("0240"),
    ]
    assert [line["quarantined"] for line in world.lines()] == [2, 0, 0]
    (first, _) = (e for e in world.run.read_lines("events.jsonl") if e["kind"] == "sample_quarantined")
    assert (first["sample"], first["where"]) == ("dog", "a.parquet row 1")


def test_the_same_error_from_the_first_samples_is_the_models(make: Callable[..., World]) -> None:
    nothing = frozenset(f"sample-{i:03d}" for i in range(40))
    world = make(engine=FakeEngine("w0", broken=nothing), data={"max_quarantined": 20})
    world.controller.rewind(0)
    with pytest.raises(ModelError, match=r"none has worked: ImageError: broken; no single .*/model'"):
        world.generate(samples(8), SamplingParams())
    answer = world.controller.next_plan(0, 1, wait_s=20.0)
    assert isinstance(answer, Stop)
    assert answer.failed
    assert isinstance(world.controller.failure(), ModelError)
    # A budget that ends before: nobody is told to mend samples without a word of the model.
    strict = make("strict", engine=FakeEngine("w0", broken=nothing), data={"max_quarantined": 0})
    strict.controller.rewind(0)
    strict.controller.next_plan(0, 1, wait_s=20.0)
    assert "no sample has worked yet: it may well be model" in str(strict.controller.failure())


def test_a_masked_group_is_counted_and_recorded_but_not_learned_from(make: Callable[..., World]) -> None:
    world = make(engine=FakeEngine("w0", masked=frozenset({"sample-002"})))
    world.controller.rewind(0)
    assert [g.key.index for g in world.step(0).groups] == [0, 1, 3]
    world.controller.checkpoint_state(1)
    (line,) = world.lines()
    assert line["masked"] == 1
    path = world.run.local_path("rollouts/step-000000.parquet")
    rows = duckdb.sql(
        f"select sample_id, count(*), count(reward), any_value(masked) from '{path}' group by 1 order by 1"
    )
    assert rows.fetchall() == [
        ("sample-000", 2, 2, None),
        ("sample-001", 2, 2, None),
        ("sample-002", 2, 0, "no references"),
        ("sample-003", 2, 2, None),
    ]


def test_a_masked_completion_is_recorded_beside_its_siblings(make: Callable[..., World]) -> None:
    """One of two is too few for a baseline made of the group."""
    world = make(engine=FakeEngine("w0", masked=frozenset({"sample-001/0"})))
    world.controller.rewind(0)
    assert [g.key.index for g in world.step(0).groups] == [0, 2, 3]
    world.controller.checkpoint_state(1)
    (line,) = world.lines()
    assert (line["masked"], line["masked_captions"], line["reward/masked"]) == (1, 1, 1 / 8)
    path = world.run.local_path("rollouts/step-000000.parquet")
    rows = duckdb.sql(
        "select completion, reward is null, advantage is null, masked "
        f"from '{path}' where sample_id = 'sample-001' order by 1"
    )
    assert rows.fetchall() == [(0, True, True, "no number"), (1, False, True, LEFT_OUT)]


def test_a_step_without_any_usable_group_ends_the_run(make: Callable[..., World]) -> None:
    world = make(engine=FakeEngine("w0", masked=frozenset(f"sample-{i:03d}" for i in range(4))))
    world.controller.rewind(0)
    answer = world.controller.next_plan(0, 1, wait_s=20.0)
    assert isinstance(answer, Stop)
    assert answer.failed
    assert "no references" in answer.reason
    assert isinstance(world.controller.failure(), LearnerError)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_steps_line_joins_plan_rollouts_and_learner(make: Callable[..., World]) -> None:
    world = make()
    world.controller.rewind(0)
    plan = world.step(0, loss=1.5, lr=1e-3, shared_prefix=True)
    world.step(1, loss=1.25, shared_prefix=False)
    first, second = world.lines()
    assert (first["step"], first["policy_version"], first["loss"], first["lr"]) == (0, 1, 1.5, 1e-3)
    rewards = [sum(c.token_ids.tolist()) for g in plan.groups for c in g.payload.completions]
    assert first["reward/mean"] == pytest.approx(sum(rewards) / 8)
    assert first["reward/sum"] == pytest.approx(sum(rewards) / 8)
    assert first["completion/finish_fraction"] == 1.0
    assert (first["shared_prefix"], second["shared_prefix"]) == (True, False)
    assert (first["masked"], first["dropped"], first["quarantined"]) == (0, 0, 0)
    assert {"seconds/step", "seconds/sample", "seconds/wait_plan", "seconds/workers_idle"} <= first.keys()
    assert first["samples_per_second"] == pytest.approx(8 / first["seconds/step"])


def test_a_run_folder_that_cannot_be_written_ends_the_run(make: Callable[..., World]) -> None:
    world = make()
    world.controller.rewind(0)
    world.plan(0)
    world.run.local_path("metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        world.controller.finish_step(0, {})
    assert isinstance(world.controller.failure(), RunError)


# -- going back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_resume_is_exact(make: Callable[..., World], staleness: int) -> None:
    """6 steps, against 3 steps, a checkpoint, another process and 3 steps; 10 samples, so that epochs turn."""
    sections: dict[str, Any] = {"rollout": {"max_staleness": staleness}, "count": 10}
    whole = make("whole", **sections)
    whole.controller.rewind(0)
    expected = []
    for step in range(6):
        expected.append(essence(whole.step(step)))
        # Let generation get as far as it may each time: which version samples a step is a race otherwise.
        until(lambda step=step: max(s for s, _ in whole.dispatched()) >= min(step + 1 + staleness, 5))
        until(lambda: not whole.pool.queue)

    first = make("resumed", **sections)
    first.controller.rewind(0)
    for step in range(3):
        assert essence(first.step(step)) == expected[step]
        until(lambda step=step: max(s for s, _ in first.dispatched()) >= min(step + 1 + staleness, 5))
        until(lambda: not first.pool.queue)
    state = first.controller.checkpoint_state(3)
    first.step(3)  # lost with the process that made it
    first.controller.close(10.0)

    second = make("resumed", **sections)
    second.controller.restore(state)
    second.publish(3)
    until(lambda: max((s for s, _ in second.dispatched()), default=0) >= 3 + staleness)
    for step in range(3, 6):
        assert essence(second.step(step)) == expected[step]
        until(lambda step=step: max((s for s, _ in second.dispatched()), default=0) >= min(step + 1 + staleness, 5))
        until(lambda: not second.pool.queue)
    assert [line["step"] for line in second.lines()] == list(range(6))
    if staleness:
        # Steps 3 and 4 were in the buffer already, 5 was sampled anew with version 3.
        assert {s for s, _ in second.dispatched()} == {5}


def test_a_learner_that_starts_again_goes_back_to_its_checkpoint(make: Callable[..., World]) -> None:
    world = make(rollout={"max_staleness": 1})
    world.controller.rewind(0)
    for step in range(2):
        world.step(step)
    world.controller.checkpoint_state(2)
    world.step(2)
    world.plan(3)
    world.controller.rewind(2)
    assert isinstance(world.controller.next_plan(2, 2, wait_s=0.05), Wait)  # not before version 2 is there again
    world.publish(2)
    again = world.controller.next_plan(2, 2, wait_s=20.0)
    assert isinstance(again, StepPlan)
    assert [g.sample_id for g in again.groups] == [f"sample-{i:03d}" for i in range(8, 12)]
    assert {g.staleness for g in again.groups} == {0}
    assert [line["step"] for line in world.lines()] == [0, 1]
    world.publish(3)
    world.controller.finish_step(2, {})
    assert [line["step"] for line in world.lines()] == [0, 1, 2]
    with pytest.raises(RolloutError, match="step 1 begin is not known"):
        world.controller.rewind(1)


def test_beginning_where_one_stands_changes_nothing(make: Callable[..., World]) -> None:
    world = make()
    world.controller.rewind(0)
    until(lambda: len(world.dispatched()) == 2)
    world.controller.rewind(0)
    world.publish(0)
    world.step(0)
    until(lambda: len(world.dispatched()) >= 3)  # by the pump, which may come to it only now
    assert world.dispatched()[:3] == [(0, 0), (0, 0), (1, 1)]


def test_groups_that_are_too_old_for_the_learner_are_sampled_again(make: Callable[..., World]) -> None:
    """A checkpoint of a run with staleness 2 goes on strictly on-policy."""
    old = make("old", rollout={"max_staleness": 2})
    old.controller.rewind(0)
    old.step(0)
    until(lambda: old.controller.status()["buffer"]["arrived"] >= 8)
    state = old.controller.checkpoint_state(1)
    new = make("new")
    new.controller.restore(state)
    new.publish(1)
    plan = new.plan(1)
    assert {g.staleness for g in plan.groups} == {0}
    assert {g.key.attempt for g in plan.groups} == {1}
    new.publish(2)
    new.controller.finish_step(1, {})
    assert new.lines()[0]["dropped"] == 4


def test_states_of_something_else_are_refused(make: Callable[..., World]) -> None:
    world = make()
    with pytest.raises(RolloutError, match="format 99"):
        world.controller.restore({"format": 99})
    world.controller.rewind(0)
    with pytest.raises(RolloutError, match="checkpoint of 1 finished steps was asked for at 0"):
        world.controller.checkpoint_state(1)


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_captions_on_request_come_in_order_beside_a_run(make: Callable[..., World]) -> None:
    engine = FakeEngine("w0", broken=frozenset({"sample-101"}), masked=frozenset({"sample-102"}))
    world = make(engine=engine)
    world.pool.release = 0
    world.controller.rewind(0)
    until(lambda: len(world.pool.queue) == 2)
    asked = [replace(s, id=f"sample-{100 + i}") for i, s in enumerate(samples(5))]
    answers: list[Any] = []
    sampling = SamplingParams(greedy=True, seed=1)
    caller = threading.Thread(target=lambda: answers.append(world.generate(asked, sampling)))
    caller.start()
    until(lambda: len(world.pool.queue) == 5)
    world.pool.release = 3
    caller.join(20)
    (generated,) = answers
    assert [g and g.sample_id for g in generated.groups] == [
        "sample-100",
        None,
        "sample-102",
        "sample-103",
        "sample-104",
    ]
    assert [g.masked for g in generated.groups if g] == [None, "no references", None, None]
    assert [len(g.payload.completions) for g in generated.groups if g] == [1] * 4
    assert [f.sample_id for f in generated.failures] == ["sample-101"]
    assert len({g.payload.sampling.seed for g in generated.groups if g}) == 4
    assert world.controller.status()["quarantined"] == 0
    world.pool.release = 1000
    assert len(world.step(0).groups) == 4


def test_as_many_captions_as_were_asked_for_bring_their_state(make: Callable[..., World]) -> None:
    world = make()
    generated = world.generate(samples(4), SamplingParams(), states=3)
    assert [g is not None and g.payload.state is not None for g in generated.groups] == [True, True, True, False]
    none = world.generate(samples(2), SamplingParams())
    assert [g and g.payload.state for g in none.groups] == [None, None]


def test_captions_that_do_not_come_from_workers_that_are_there_are_an_error(make: Callable[..., World]) -> None:
    world = make()
    world.pool.release = 0
    number = world.controller.ask_captions(samples(2), SamplingParams())
    with pytest.raises(RolloutError, match=r"0 of 2 samples were captioned, and no other one within 0\.05 s"):
        world.controller.captions(number, 20.0, 0.05)
    assert world.controller.status()["evaluations"] == 0


def test_an_evaluations_deadline_counts_neither_the_start_of_a_worker_nor_what_was_answered_before(
    make: Callable[..., World],
) -> None:
    now = [0.0]
    world = make(clock=lambda: now[0])
    pool = world.pool
    pool.release, pool.ready = 0, 0
    number = world.controller.ask_captions(samples(9), SamplingParams())

    def ask() -> Any:
        return world.controller.captions(number, 0.0, 600.0)

    def answer() -> None:
        left, pool.release = len(pool.queue) - 1, 1
        until(lambda: len(pool.queue) == left)
        turn = pool.polls
        until(lambda: pool.polls > turn)  # what the turn before gave is taken in

    for _ in range(3):  # nobody is there: the pool's own deadlines count
        assert isinstance(ask(), Wait)
        now[0] += 500.0
    pool.ready = 1
    for _ in range(3):  # two answers, and two more: each pair has its time
        assert isinstance(ask(), Wait)
        now[0] += 500.0
        answer()
    pool.ready = 0  # it died
    assert isinstance(ask(), Wait)
    now[0] += 500.0
    assert isinstance(ask(), Wait)
    pool.ready = 1
    now[0] += 500.0
    assert isinstance(ask(), Wait)
    now[0] += 101.0
    with pytest.raises(RolloutError, match=r"5 of 9 samples were captioned, and no other one within 600 s"):
        ask()


# -- the client --------------------------------------------------------------------------------------------------------


def test_a_client_says_what_its_controller_says(make: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is not between them here: what a call would be sent is called at once."""
    world = make()

    def remote(method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(world.controller, method)(*args, **kwargs)

    monkeypatch.setattr("mmrl_ray.rollouts.controller_actor.ray.get", lambda answer, timeout: answer)
    client = ControllerClient(SimpleNamespace(call=SimpleNamespace(remote=remote)))
    client.rewind(0)
    plan = client.next_plan(0, 1)
    assert isinstance(plan, StepPlan)
    assert [g.sample.id for g in client.groups([g.payload for g in plan.groups])] == [g.sample_id for g in plan.groups]
    client.publish(1, {"version": torch.tensor(1)})
    client.finish_step(0, {"loss": 0.5})
    assert world.lines()[0]["loss"] == 0.5
    assert client.fetch(1) == {"version": torch.tensor(1)}
    assert client.checkpoint_state(1) == world.controller.checkpoint_state(1)
    assert client.resize(2, by="me").target == world.pool.target == 2
    assert client.failure() is None
    client.request_stop("enough")
    assert client.status()["stopping"] == "enough"
    assert client.next_plan(1, 1) == Stop("enough")
    with pytest.raises(TypeError, match="unexpected keyword"):
        client.rewind(0, force=True)  # type: ignore[call-arg]


# -- dynamic sampling --------------------------------------------------------------------------------------------------


class AnyOrder(FakePool):
    """So many assignments at a time, which come back the last first."""

    def __init__(self, engine: FakeEngine, workers: int) -> None:
        super().__init__(engine, decode_state)
        self.workers = workers

    def poll(self, timeout_s: float) -> list[Any]:
        self.queue[: self.workers] = self.queue[: self.workers][::-1]
        self.release = self.workers
        return super().poll(timeout_s)


def _has_spread(sample: str) -> bool:
    return int(sample.removeprefix("sample-")) % 3 == 2


FLAT = frozenset(sample.id for sample in samples(40) if not _has_spread(sample.id))
DYNAMIC: dict[str, Any] = {"learner": {"dynamic_sampling": True}, "count": 40, "engine": FakeEngine("w0", flat=FLAT)}


def drawn(world: World) -> list[list[tuple[int, str]]]:
    """What was asked for, assignment by assignment."""
    asked = [a for a in world.pool.submitted if a.kind == "train"]
    return [[(group.key.index, group.sample.id) for group in a.groups] for a in asked]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_step_is_made_of_the_first_groups_with_spread_whoever_samples(
    make: Callable[..., World], workers: int
) -> None:
    alone = make("alone", **DYNAMIC)
    world = make("world", **DYNAMIC, pool=AnyOrder(DYNAMIC["engine"], workers))
    for each in (alone, world):
        each.controller.rewind(0)
    position = 0
    for step in range(6):
        plan = world.step(step)
        assert essence(alone.step(step)) == essence(plan)
        order = [f"sample-{i % 40:03d}" for i in range(position, position + 40)]
        assert [group.sample_id for group in plan.groups] == [name for name in order if _has_spread(name)][:4]
        line = world.lines()[-1]
        assert line["reward/zero_variance_groups"] == line["sampled/at_bound"] == 0
        assert line["sampled/with_spread"] == 4 + line["sampled/surplus"]
        assert line["sampled/reward_mean"] < line["reward/mean"], "the second is of what was kept alone"
        position += line["sampled/groups"]
    until(lambda: not alone.pool.queue and not world.pool.queue)
    assert drawn(alone) == drawn(world)
    world.controller.checkpoint_state(6)
    files = world.run.local_path("rollouts/*.parquet")
    rows = duckdb.sql(f"select step, count(distinct sample_id) from '{files}' group by 1")
    assert sorted(rows.fetchall()) == [(step, 4) for step in range(6)]


@pytest.mark.parametrize("staleness", [0, 1])
def test_dynamic_sampling_resumes_exactly(make: Callable[..., World], staleness: int) -> None:
    sections = {**DYNAMIC, "rollout": {"max_staleness": staleness}}

    def go(world: World, steps: range) -> list[Any]:
        plans = [world.step(step) for step in steps]
        if staleness:  # which version sampled a group is a race
            opened = [open_payload(g.payload, lambda value: value) for plan in plans for g in plan.groups]
            return [(g.sample.id, [c.token_ids.tolist() for c in g.completions]) for g in opened]
        return [essence(plan) for plan in plans]

    whole = make("whole", **sections)
    whole.controller.rewind(0)
    expected = go(whole, range(6))
    first = make("resumed", **sections)
    first.controller.rewind(0)
    assert go(first, range(3)) == expected[: len(expected) // 2]
    state = first.controller.checkpoint_state(3)
    first.step(3)
    first.controller.close(10.0)
    second = make("resumed", **sections)
    second.controller.restore(state)
    second.publish(3)
    assert go(second, range(3, 6)) == expected[len(expected) // 2 :]


def test_at_its_bound_a_step_is_filled_up_and_says_so(make: Callable[..., World]) -> None:
    rows = [sample for sample in samples(40) if not _has_spread(sample.id)]
    rows.insert(5, samples(3)[2])  # one of them all
    world = make(rows=rows, **{**DYNAMIC, "learner": {"dynamic_sampling": True, "max_oversampling": 2.5}})
    world.controller.rewind(0)
    plan = world.step(0)
    assert [group.key.index for group in plan.groups] == [0, 1, 2, 5]
    assert [group.has_signal for group in plan.groups] == [False, False, False, True]
    line = world.lines()[0]
    assert (line["sampled/groups"], line["sampled/with_spread"], line["sampled/at_bound"]) == (10, 1, 1)
    said: list[dict[str, Any]] = []
    until(lambda: said.extend(e for e in world.run.read_lines("events.jsonl") if "bound" in e["kind"]) or said)
    event = said[0]
    assert (event["step"], event["with_spread"], event["wanted"], event["sampled"]) == (0, 1, 4, 10)
    until(lambda: len(drawn(world)) > 5)
    assert [name for _, name in drawn(world)[5]] == [rows[10].id, rows[11].id], "the next step goes on behind"


def test_what_comes_twice_and_what_fails_changes_no_selection(make: Callable[..., World]) -> None:
    engine = FakeEngine("w0", flat=FLAT, broken=frozenset({"sample-002"}), masked=frozenset({"sample-005"}))
    world = make(**{**DYNAMIC, "engine": engine, "learner": {"dynamic_sampling": True, "max_oversampling": 5.0}})
    world.controller.rewind(0)
    world.pool.submit(replace(until_submitted(world), id=99))  # a try that was thought lost
    plan = world.step(0)
    assert [group.sample_id for group in plan.groups] == ["sample-008", "sample-011", "sample-014", "sample-017"]


def until_submitted(world: World) -> Any:
    until(lambda: world.pool.submitted)
    return world.pool.submitted[0]
