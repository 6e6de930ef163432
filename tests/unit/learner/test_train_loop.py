"""One learner's life in this process, against a controller that is a plain object: how each ending is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.config import Config
from mmrl_ray.config.schema import torch_threads
from mmrl_ray.errors import MMRLError, ModelError, RolloutError, RunError
from mmrl_ray.experience.carriers import RolloutGroup, StepPlan, derive_seed
from mmrl_ray.learner.job import LearnerJob, LearnerOutcome
from mmrl_ray.learner.train_loop import _Learner, train_loop
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.scoring import prefix
from mmrl_ray.rollouts.types import Stop
from mmrl_ray.run_records.run_dir import RunDir, checkpoint_name, checkpoint_steps
from tests.unit.learner.worlds import make_groups, make_plan


def config(tiny: Path, **learner: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r", "seed": 3},
            "model": {"path": str(tiny), "dtype": "float32"},
            "data": {"train": "unused"},
            "rollout": {"group_size": 4, "temperature": 0.7, "max_new_tokens": 8},
            "learner": {"steps": 3, "groups_per_step": 3, "checkpoint_every": 1, **learner},
        }
    )


class PlainController:
    """What `ControllerClient` answers, by default as a controller does that has every group at once."""

    def __init__(self, cfg: Config, groups: Sequence[RolloutGroup]) -> None:
        self.cfg, self.made = cfg.learner, groups
        self.stop: dict[int, Stop] = {}
        self.error: MMRLError | None = None
        self.lost = False
        self.calls: list[str] = []
        self.metrics: list[Mapping[str, Any]] = []

    def next_plan(self, step: int, world_size: int) -> StepPlan | Stop:
        return self.stop.get(step) or make_plan(self.made, self.cfg, step=step, world_size=world_size)

    def groups(self, payloads: Sequence[Any]) -> list[RolloutGroup]:
        if self.lost:
            raise RolloutError("a group is lost or late: its node died")
        return list(payloads)

    def publish(self, version: int, state: Mapping[str, torch.Tensor]) -> None:
        self.calls.append(f"publish {version}")

    def finish_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.calls.append(f"finish {step}")
        self.metrics.append(metrics)

    def checkpoint_state(self, step: int) -> dict[str, Any]:
        return {"next_step": step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.calls.append(f"restore {state['next_step']}")

    def rewind(self, step: int) -> None:
        self.calls.append(f"rewind {step}")

    def failure(self) -> MMRLError | None:
        return self.error


@pytest.fixture
def world(tiny: Path, tmp_path: Path) -> tuple[Config, PlainController, RunDir]:
    cfg = config(tiny)
    policy = load_policy(cfg.model, device="cpu")
    add_adapter(policy, cfg.model.lora, derive_seed(cfg.run.seed, "adapter"))
    return cfg, PlainController(cfg, make_groups(policy)), RunDir.create(tmp_path, "r")


def live(cfg: Config, controller: PlainController, run: RunDir) -> LearnerOutcome:
    return _Learner(LearnerJob(cfg, run, controller), torch.device("cpu")).run()  # type: ignore[arg-type]


def test_weights_go_out_before_the_step_is_finished_and_its_line_has_the_times(world: Any) -> None:
    cfg, controller, run = world
    outcome = live(cfg, controller, run)
    assert outcome == LearnerOutcome(3, finished=True, reason="all steps were taken")
    steps = [f"{what} {step}" for s in range(3) for what, step in (("publish", s + 1), ("finish", s))]
    assert controller.calls == ["rewind 0", *steps]
    first, second, _ = controller.metrics
    assert {"seconds/publish", "seconds/forward_backward", "seconds/fetch"} <= set(first)
    assert "seconds/checkpoint" not in first
    assert second["seconds/checkpoint"] > 0
    assert first["shared_prefix"] is True
    (event,) = run.read_lines("events.jsonl")
    assert (event["kind"], event["path"]) == ("learner_path", "shared_prefix")
    assert run.exists("adapter/adapter_model.safetensors")


def test_importance_is_in_the_lines_that_are_due_and_changes_nothing(tiny: Path, world: Any, tmp_path: Path) -> None:
    cfg, controller, run = world
    live(cfg, controller, run)
    without = config(tiny, importance_every=0)
    other = PlainController(without, controller.made)
    live(without, other, RunDir.create(tmp_path, "without"))
    third = config(tiny, importance_every=2, gradient_checkpointing=True)
    checkpointed = PlainController(third, controller.made)
    live(third, checkpointed, RunDir.create(tmp_path, "checkpointed"))
    due = [["importance/image" in line for line in each.metrics] for each in (controller, other, checkpointed)]
    assert due == [[True, False, False], [False, False, False], [True, False, True]]
    first = controller.metrics[0]
    assert first["importance/image"] + first["importance/text"] == pytest.approx(1.0)
    assert 0 < first["importance/image"] < 1
    assert first["importance_rms/image"] > 0
    assert first["seconds/importance"] > 0
    assert checkpointed.metrics[0]["importance/image"] == pytest.approx(first["importance/image"], rel=1e-4)
    weights = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("r", "without")]
    assert weights[0] == weights[1]


def test_memory_that_runs_out_is_an_event_of_the_run(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three groups two make a pass, in every step after that one, too: their tokens are what the event says."""
    cfg, controller, run = world
    passes: list[int] = []
    tokens: set[int] = set()

    def small(policy: Any, prompts: Any, features: Any, completions: Any, *arguments: Any, **settings: Any) -> Any:
        passes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        prompt = max(prompt.input_ids.numel() for prompt in prompts)
        completion = max(tokens.numel() for group in completions for tokens in group)
        tokens.add(len(prompts) * (prompt + 4 * completion))
        return prefix.score_completions(policy, prompts, features, completions, *arguments, **settings)

    monkeypatch.setattr("mmrl_ray.learner.step.score_completions", small)
    assert live(cfg, controller, run).finished
    assert (passes[:3], [sorted(pair) for pair in (passes[3:5], passes[5:])]) == ([3, 1, 2], [[1, 2]] * 2)
    (event,) = [line for line in run.read_lines("events.jsonl") if line["kind"] == "out_of_memory"]
    assert (event["step"], event["halved"], event["tokens"]) == (0, 1, max(tokens))
    assert [line.get("micro_batches/halved") for line in controller.metrics] == [1, None, None]


@pytest.mark.parametrize(
    "error", [ModelError("it is not given embeddings"), torch.OutOfMemoryError("it is not given embeddings")]
)
def test_a_model_whose_modalities_cannot_be_told_learns_all_the_same(
    world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    cfg, controller, run = world

    def fail(*arguments: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr("mmrl_ray.learner.objective.caption_importance", fail)
    assert live(cfg, controller, run).finished
    assert "importance/image" not in controller.metrics[0]
    assert "not measured: it is not given embeddings" in caplog.text


def test_a_model_that_does_not_pass_the_comparison_ends_the_run_before_its_first_step(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, controller, run = world
    right = prefix._naive_rows

    def leaking(*arguments: Any, **settings: Any) -> torch.Tensor:
        """Every position sees the last one."""
        rows = right(*arguments, **settings)
        return rows + 0.1 * rows[:, -1:].roll(1, dims=-1)

    monkeypatch.setattr(prefix, "_naive_rows", leaking)
    outcome = live(cfg, controller, run)
    assert isinstance(outcome.error, ModelError)
    assert "naive path differs from the model's own forward" in outcome.reason
    assert "lets a later token of a completion move an earlier one by" in outcome.reason
    assert controller.calls == ["rewind 0"]


def test_a_finished_run_that_is_resumed_ends_at_once(world: Any) -> None:
    cfg, controller, run = world
    live(cfg, controller, run)
    run.delete("adapter")  # as if the last thing had been cut off
    controller.calls.clear()
    assert live(cfg, controller, run).finished
    assert controller.calls == ["restore 3", "publish 3"]
    assert run.exists("adapter/adapter_model.safetensors")


def test_the_rollouts_own_error_is_what_the_run_ends_with(world: Any) -> None:
    cfg, controller, run = world
    controller.stop[2] = Stop("too few workers", failed=True)
    controller.error = RolloutError("2 of 3 workers are gone since 60 s")
    outcome = live(cfg, controller, run)
    assert outcome.error is controller.error
    assert (outcome.step, outcome.finished) == (2, False)
    assert checkpoint_steps(run) == [1, 2]


def test_asked_to_stop_it_saves_what_it_has(world: Any) -> None:
    cfg, controller, run = world
    cfg = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"checkpoint_every": 10})})
    controller.stop[0] = Stop("interrupted")
    assert live(cfg, controller, run) == LearnerOutcome(0, finished=False, reason="interrupted")
    assert checkpoint_steps(run) == []
    controller.stop = {2: Stop("interrupted")}
    assert live(cfg, controller, run) == LearnerOutcome(2, finished=False, reason="interrupted")
    assert checkpoint_steps(run) == [2]
    assert not run.exists("adapter")


def test_a_disk_that_fills_up_ends_it_with_the_checkpoint_before(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, controller, run = world
    commit = RunDir.commit_folder

    def full(self: RunDir, name: str, *args: Any, **kwargs: Any) -> None:
        if name == checkpoint_name(2):
            raise RunError("the disk is full")
        commit(self, name, *args, **kwargs)

    monkeypatch.setattr(RunDir, "commit_folder", full)
    outcome = live(cfg, controller, run)
    assert isinstance(outcome.error, RunError)
    assert checkpoint_steps(run) == [1]


def test_lost_groups_are_raised_for_ray_train_to_start_over(world: Any) -> None:
    cfg, controller, run = world
    controller.lost = True
    with pytest.raises(RuntimeError, match="step 0: a group is lost or late"):
        live(cfg, controller, run)


def test_a_base_that_cannot_be_loaded_is_told_and_not_tried_again(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, controller, run = world
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    gone = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": "./gone"})})
    outcome = train_loop({"job": LearnerJob(gone, run, controller)})  # type: ignore[arg-type]
    assert (outcome.step, outcome.finished) == (0, False)
    assert isinstance(outcome.error, ModelError)
    assert controller.calls == []


@pytest.mark.parametrize(
    ("learner", "workers", "staleness", "threads"),
    [
        ({"threads": 3}, 1, 0, 3),
        ({}, 1, 0, 4),
        ({}, 1, 1, 4),
        ({}, 3, 0, 2),
        ({}, 16, 0, 1),
        ({"cpus": 4}, 1, 1, 4),
        ({"cpus": 4, "gpus": 1}, 1, 0, 4),
        ({"cpus": 0}, 1, 1, 4),
    ],
)
def test_threads_follow_config_and_machine(
    tiny: Path, learner: dict[str, Any], workers: int, staleness: int, threads: int
) -> None:
    cfg = config(tiny, workers=workers, groups_per_step=16).model_dump()
    cfg["resources"]["learner"] |= learner
    cfg["rollout"]["max_staleness"] = staleness
    valid = Config.model_validate(cfg)
    assert torch_threads(valid, valid.resources.learner, 8) == threads
