"""Held-out captions beside the learning: asked for by version, waited for where it has to be, gone with their past."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from mmrl_ray.errors import BlindPolicyError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.rollouts.types import Assignment, Generated, Stop, Wait
from mmrl_ray.rollouts.weights import encode_state
from tests.unit.rollouts.fakes import samples
from tests.unit.rollouts.test_controller import World, make, until

__all__ = ["make"]
GREEDY = SamplingParams(greedy=True, max_new_tokens=4)
SPLIT = Mapping[str, Any]
HELD_OUT: SPLIT = {"eval": "held-out"}


def watched(build: Callable[..., World], name: str = "world", **evaluation: Any) -> World:
    """Six steps, evaluated at every second on three samples."""
    world = build(name, data=HELD_OUT, eval={"every": 2, **evaluation})
    world.controller.watch_held_out(samples(3), GREEDY)
    return world


def line(step: int, best: int, since: int = 0) -> dict[str, Any]:
    return {"step": step, "eval/cider_d": 1.0, "best": best, "since_best": since}


def captions(world: World, step: int) -> Generated:
    until(lambda: world.controller.evaluated() is not None)
    found = world.controller.evaluated()
    assert found is not None
    assert found[0] == step
    return found[1]


def beside(world: World, count: int) -> list[Assignment]:
    """The first `count` assignments of held-out captions: the pump sends them, whatever the learner does meanwhile."""
    until(lambda: sum(a.kind == "aside" for a in world.pool.submitted) >= count)
    return [a for a in world.pool.submitted if a.kind == "aside"]


def answer(world: World, step: int) -> Any:
    return world.controller.next_plan(step, 1, wait_s=0.05)


def test_the_version_of_a_step_is_captioned_and_the_next_evaluation_waits_for_what_it_shows(
    make: Callable[..., World],
) -> None:
    world = watched(make)
    world.controller.rewind(0)
    for step in range(2):
        world.step(step)
    for step in range(2, 4):  # nobody has judged it, and learning goes on
        world.step(step)
    found = captions(world, 2)
    assert [group.sample_id for group in found.groups if group is not None] == [s.id for s in samples(3)]
    assert {group.policy_version for group in found.groups if group is not None} == {2}
    asked = beside(world, 2)
    assert [(a.version, len(a.groups)) for a in asked] == [(2, 3), (4, 3)], "as many completions as of two groups"
    assert all(version == weights for version, weights in world.engine.seen if version)
    assert {r.completions for a in asked for r in a.groups} == {1}
    assert all(r.sampling.greedy for a in asked for r in a.groups)
    waiting = answer(world, 4)
    assert isinstance(waiting, Wait)
    assert "evaluation of step 2" in waiting.reason
    assert world.controller.judge(line(2, 2))
    world.step(4)
    assert world.run.read_lines("eval/steps.jsonl") == [line(2, 2)]
    assert world.controller.status()["held_out"]["best"] == 2

    # The last version is not asked for here: what comes after all learning is.
    assert captions(world, 4)
    assert world.controller.judge(line(4, 2, 1))
    world.step(5)
    assert max(a.version for a in world.pool.submitted if a.kind == "aside") == 4
    assert world.controller.judge(line(6, 6))
    assert not world.controller.judge(line(6, 6)), "once"
    assert [each["step"] for each in world.run.read_lines("eval/steps.jsonl")] == [2, 4, 6]


def test_an_evaluation_that_may_end_the_run_is_waited_for_at_once_and_ends_it(make: Callable[..., World]) -> None:
    world = watched(make, patience=1)
    world.controller.rewind(0)
    for step in range(2):
        world.step(step)
    assert isinstance(answer(world, 2), Wait), "with patience for one, each may be the last"
    captions(world, 2)
    world.controller.judge(line(2, 2))
    for step in range(2, 4):
        world.step(step)
    captions(world, 4)
    state = world.controller.checkpoint_state(4)
    assert isinstance(answer(world, 4), Wait)
    world.controller.judge(line(4, 2, 1))
    stop = answer(world, 4)
    assert isinstance(stop, Stop)
    assert (stop.early, stop.failed) == (True, False)
    assert "best checkpoint is that of step 2" in stop.reason

    # Of another process: as it ended, or with more patience as if it had always had that.
    world.controller.close(10.0)
    for patience, goes_on in ((1, False), (2, True)):
        again = watched(make, patience=patience)
        again.controller.restore(state)
        again.publish(4)
        assert isinstance(answer(again, 4), Stop) is not goes_on
        assert not [a for a in again.pool.submitted if a.kind == "aside"], "it was judged"
        if goes_on:
            again.step(4)
        again.controller.close(10.0)


def test_min_steps_holds_patience_back(make: Callable[..., World]) -> None:
    world = watched(make, patience=1, min_steps=6)
    world.controller.rewind(0)
    for step in range(4):
        world.step(step)
    captions(world, 2)
    world.controller.judge(line(2, 2))
    captions(world, 4)
    world.controller.judge(line(4, 2, 1))
    world.step(4)


def test_a_restart_takes_back_what_was_judged_of_later_steps(make: Callable[..., World]) -> None:
    world = watched(make)
    world.controller.rewind(0)
    for step in range(4):
        world.step(step)
        if step == 1:
            captions(world, 2)
            world.controller.judge(line(2, 2))
            state = world.controller.checkpoint_state(2)
    captions(world, 4)
    world.controller.restore(state)
    assert not world.controller.judge(line(4, 4)), "its step was undone"
    assert world.run.read_lines("eval/steps.jsonl") == [line(2, 2)]
    world.publish(2)
    for step in range(2, 4):
        world.step(step)
    assert captions(world, 4).version == 4
    assert [a.version for a in world.pool.submitted if a.kind == "aside"] == [2, 4, 4]


def test_an_earlier_version_of_another_life_is_evaluated_by_its_own_weights(make: Callable[..., World]) -> None:
    """The run was killed at step 3, before the captions of step 2 had come."""
    world = watched(make)
    world.controller.rewind(0)
    for step in range(3):
        world.step(step)
    state = world.controller.checkpoint_state(3)
    world.controller.close(10.0)
    again = watched(make)
    again.controller.restore(state)
    again.engine.seen.clear()
    again.controller.evaluate(2, encode_state({"version": torch.tensor(2)}))
    again.publish(3)
    assert captions(again, 2).version == 2
    assert (2, 2) in again.engine.seen
    again.step(3)
    assert isinstance(answer(again, 4), Wait), "as in a life that was not cut"


@pytest.mark.parametrize("shared", [True, False])
def test_workers_that_take_turns_on_a_gpu_caption_in_their_turn(make: Callable[..., World], shared: bool) -> None:
    gpus = {"learner": {"gpus": 0.5}, "rollout": {"gpus": 0.5}} if shared else {}
    world = make(data=HELD_OUT, eval={"every": 2}, resources=gpus)
    world.controller.watch_held_out(samples(3), GREEDY)
    world.controller.rewind(0)
    for step in range(2):
        world.step(step)
    captions(world, 2)
    assert isinstance(answer(world, 2), Wait) is shared
    assert {a.kind for a in world.pool.submitted if a.kind != "train"} == ({"eval"} if shared else {"aside"})


def test_without_every_nothing_is_asked_for(make: Callable[..., World]) -> None:
    world = make(data=HELD_OUT)
    world.controller.watch_held_out(samples(3), GREEDY)
    world.controller.rewind(0)
    for step in range(6):
        world.step(step)
    assert {a.kind for a in world.pool.submitted} == {"train"}
    assert not world.run.exists("eval/steps.jsonl")


# -- looks at the policy's sight ---------------------------------------------------------------------------------------


def looking(build: Callable[..., World], name: str = "world", **check: Any) -> World:
    """Six steps, looked at after every second, beside evaluations after every third."""
    section = {"blind_check": {"every": 2, **check}}
    world = build(name, data=HELD_OUT, eval={"every": 3}, learner={**LEARNER, **section})
    world.controller.watch_held_out(samples(3), GREEDY)
    world.controller.watch_held_out(samples(2), GREEDY, "blind", samples(2)[::-1])
    return world


LEARNER = {"steps": 6, "groups_per_step": 4, "lr": 1e-3, "kl": {"weight": 0.0}}


def look(step: int, running: int = 0) -> dict[str, Any]:
    return {"step": step, "blind/gap_logprob": 0.5, "blind": ["so"] * bool(running), "running": running}


def looked(world: World, step: int) -> None:
    until(lambda: world.controller.evaluated("blind") is not None)
    found = world.controller.evaluated("blind")
    assert found is not None
    assert found[0] == step


def test_looks_go_the_way_of_evaluations_with_steps_and_samples_of_their_own(make: Callable[..., World]) -> None:
    world = looking(make)
    world.controller.rewind(0)
    for step in range(3):
        world.step(step)
    looked(world, 2)
    captions(world, 3)
    asked = {a.version: a.groups for a in world.pool.submitted if a.kind == "aside"}
    assert {version: len(groups) for version, groups in asked.items()} == {2: 2, 3: 3}
    assert [(r.sample.id, r.other and r.other.id) for r in asked[2]] == [
        ("sample-000", "sample-001"),
        ("sample-001", "sample-000"),
    ]
    assert {r.other for r in asked[3]} == {None}
    world.step(3)
    assert isinstance(answer(world, 4), Wait), "the look at step 2 has until the next one"
    assert world.controller.judge(look(2), "blind")
    world.step(4)
    assert world.run.read_lines("eval/blind.jsonl") == [look(2)]
    looked(world, 4)
    assert world.controller.status()["looks"] == {
        "open": [4],
        "complete": [4],
        "step": 2,
        "blind": [],
        "gap_logprob": 0.5,
    }
    state = world.controller.checkpoint_state(5)
    world.controller.close(10.0)

    # In another life: the look at step 4, which nobody has judged, by the weights that it had.
    again = looking(make)
    again.controller.restore(state)
    again.controller.evaluate(4, encode_state({"version": torch.tensor(4)}))
    again.publish(5)
    looked(again, 4)
    assert [a.version for a in again.pool.submitted if a.kind == "aside"] == [4], "and none of step 3"


def test_an_alarm_ends_the_run_where_it_is_asked_to(make: Callable[..., World]) -> None:
    world = looking(make, on_blind="stop")
    world.controller.rewind(0)
    for step in range(2):
        world.step(step)
    looked(world, 2)
    for step in range(2, 4):
        world.step(step)
        if step == 2:
            captions(world, 3)
            world.controller.judge(line(3, 3))
    looked(world, 2)
    world.controller.judge(look(2, 1), "blind")
    looked(world, 4)
    assert isinstance(answer(world, 4), Wait), "the second look running may end it: no step is taken before"
    assert world.controller.judge(look(4, 2), "blind", "the policy does not look at its pictures")
    stop = answer(world, 4)
    assert isinstance(stop, Stop)
    assert (stop.failed, stop.reason) == (True, "the policy does not look at its pictures")
    assert isinstance(world.controller.failure(), BlindPolicyError)
    assert [each["running"] for each in world.run.read_lines("eval/blind.jsonl")] == [1, 2]
