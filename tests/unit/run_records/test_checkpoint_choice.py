"""`--checkpoint best|last|N`: which folder is meant, what is said where there is none, and what a run ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmrl_ray.config import Config
from mmrl_ray.errors import CheckpointError, ConfigError, RunError
from mmrl_ray.run_records.checkpoint_choice import (
    Chosen,
    choose_checkpoint,
    deliver_best,
    kept_for_evaluation,
    prune_checkpoints,
)
from mmrl_ray.run_records.run_dir import RunDir, checkpoint_name, checkpoint_steps
from mmrl_ray.run_records.step_log import EVALUATIONS, LOOKS


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "r")


def put(run: RunDir, folder: str, step: int, *, whole: bool = False) -> None:
    """An adapter of that step, told by its weights; `whole` with a learner's state beside it."""
    with run.staging_folder() as made:
        (made / "adapter_config.json").write_text("{}")
        (made / "adapter_model.safetensors").write_text(f"weights of {step}")
        if whole:
            (made / "state.json").write_text("{}")
            (made / "state.safetensors").write_text("moments")
            (made / "controller").mkdir()
            (made / "controller" / "buffer").write_text("groups")
        run.commit_folder(folder, made, facts={"step": step})


def test_a_finished_run_has_its_best_its_last_and_those_of_steps(run: RunDir) -> None:
    for step in (20, 40, 60):
        put(run, checkpoint_name(step), step, whole=True)
    put(run, "adapter", 60)
    run.append_line(EVALUATIONS, {"step": 20, "best": 20})
    run.append_line(EVALUATIONS, {"step": 60, "best": 20})
    deliver_best(run, best=20, last=60)
    deliver_best(run, best=20, last=60)  # as after a crash between its two halves
    assert run.read_text("adapter/adapter_model.safetensors") == "weights of 20"
    assert run.read_text("adapter-last/adapter_model.safetensors") == "weights of 60"
    assert run.list("adapter") == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    run.verify_manifest("adapter")

    found = {which: choose_checkpoint(run, which) for which in (None, "best", "last", "40")}
    assert {which: (each.folder, each.step) for which, each in found.items()} == {
        None: ("adapter", 20),
        "best": ("adapter", 20),
        "last": ("adapter-last", 60),
        "40": (checkpoint_name(40), 40),
    }
    assert "of step 20" in found[None].notes[0]
    assert "of step 60" in found[None].notes[0]
    with pytest.raises(RunError, match=r"no checkpoint of step 7; there are best \(step 20\), last, 20, 40, 60"):
        choose_checkpoint(run, "7")
    with pytest.raises(ConfigError, match="--checkpoint newest: write best, last or the number of a step"):
        choose_checkpoint(run, "newest")
    run.delete(checkpoint_name(20))
    run.delete("adapter")
    with pytest.raises(RunError, match="no checkpoint of step 20"):
        choose_checkpoint(run, "best")

    # It goes on: what is newer than what it ended with then is its last.
    put(run, checkpoint_name(80), 80, whole=True)
    newest = choose_checkpoint(run, "last")
    assert (newest.folder, newest.step) == (checkpoint_name(80), 80)
    assert newest.notes == ("the run is not finished: this is its checkpoint of step 80",)


def test_the_best_and_what_is_not_judged_yet_stay_when_one_checkpoint_is_kept(run: RunDir) -> None:
    learner = {"steps": 9, "blind_check": {"every": 0}}
    wanted = {"run": {"name": "r"}, "model": {"path": "m"}, "data": {"train": "t", "eval": "e"}, "learner": learner}
    cfg = Config.model_validate({**wanted, "eval": {"every": 2}})
    left = []
    for step in range(1, 9):
        put(run, checkpoint_name(step), step, whole=True)
        prune_checkpoints(run, step, 1, kept_for_evaluation(run, cfg))
        if step == 5:  # what step 4 showed comes late
            run.append_line(EVALUATIONS, {"step": 2, "best": 2})
        if step == 7:
            run.append_line(EVALUATIONS, {"step": 4, "best": 2})
            run.append_line(EVALUATIONS, {"step": 6, "best": 6})
        left.append(checkpoint_steps(run))
    assert left == [[1], [2], [2, 3], [2, 4], [2, 4, 5], [2, 4, 6], [2, 4, 6, 7], [6, 8]]
    assert kept_for_evaluation(run, Config.model_validate(wanted)) == []
    learner["blind_check"] = {"every": 4}
    assert kept_for_evaluation(run, Config.model_validate(wanted)) == [8], "a look at it is under way"
    run.append_line(LOOKS, {"step": 8})
    assert kept_for_evaluation(run, Config.model_validate(wanted)) == []


def test_runs_that_were_not_evaluated_while_they_learned(run: RunDir) -> None:
    with pytest.raises(RunError, match="no checkpoint yet"):
        choose_checkpoint(run, "last")
    put(run, checkpoint_name(40), 40, whole=True)
    assert choose_checkpoint(run, "last").folder == checkpoint_name(40)
    put(run, "adapter", 40)
    assert choose_checkpoint(run) == Chosen("adapter", 40)
    assert choose_checkpoint(run, "last").folder == "adapter"
    with pytest.raises(RunError, match=r"no best checkpoint: it was not evaluated.*eval.every.*there are last, 40"):
        choose_checkpoint(run, "best")
    run.write_bytes(f"{checkpoint_name(40)}/state.safetensors", b"cut")
    run.delete("adapter")
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        choose_checkpoint(run, "40")
