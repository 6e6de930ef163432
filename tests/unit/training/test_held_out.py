"""Which checkpoint is the best: held-out captions of a run that learns, judged as they come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError
from mmrl_ray.evaluation.records import load_evaluation, save_evaluation
from mmrl_ray.evaluation.scores import rewarded_captions
from mmrl_ray.experience.carriers import RewardBreakdown, RewardFailure
from mmrl_ray.metrics.overlap import CiderD
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.report.charts import held_out_charts
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.checkpoint_choice import choose_checkpoint
from mmrl_ray.run_records.run_dir import RunDir, checkpoint_name
from mmrl_ray.telemetry.terminal import RunProgress
from mmrl_ray.training.held_out import HeldOut, choice_json
from tests.unit.rollouts.fakes import config, png
from tests.unit.run_records.test_checkpoint_choice import put

TRUE = [f"a {colour} {shape} on the {side}" for colour in ("red", "blue", "green", "grey") for shape in
        ("circle", "square", "star") for side in ("left", "right")][:20]  # fmt: skip
SAMPLES = [Sample(f"s{i}", (png(i),), "?", (text,), place=f"row {i}") for i, text in enumerate(TRUE)]
STATISTICS = CorpusStatistics.from_references([(text,) for text in TRUE])
COUNTED = CiderD(STATISTICS), STATISTICS.tokenizer


class Pool:
    """A controller whose captions of a step are true of so many samples, and that keeps what it is told."""

    def __init__(self, run: RunDir, right: Mapping[int, int], rewards: Any = None) -> None:
        self.run, self.right, self.rewards = run, dict(right), rewards

    def evaluated(self) -> Any:
        if not self.right:
            return None
        step = min(self.right)
        texts = [text if i < self.right[step] else "nothing of it" for i, text in enumerate(TRUE)]
        score = self.rewards or RewardBreakdown(1.0, {"caption": 1.0}, {"caption": 1.0})
        groups = [SimpleNamespace(payload=text, rewards=(score,), masked=None) for text in texts]
        return step, SimpleNamespace(groups=groups, failures=())

    def groups(self, payloads: list[str]) -> Any:
        return [SimpleNamespace(completions=[SimpleNamespace(caption=text)]) for text in payloads]

    def judge(self, line: Mapping[str, Any]) -> bool:
        self.right.pop(line["step"], None)
        self.run.append_line("eval/steps.jsonl", line)
        return True


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "r")


def held_out(run: RunDir, tmp_path: Path, **evaluation: Any) -> HeldOut:
    cfg: Config = config(tmp_path, data={"eval": "held-out"}, eval={"every": 2, **evaluation}, learner={"steps": 8})
    return HeldOut(cfg, run, SAMPLES, build_reward(cfg.reward, STATISTICS), STATISTICS, RunProgress())


def test_a_checkpoint_takes_the_place_of_the_best_only_by_more_than_chance(run: RunDir, tmp_path: Path) -> None:
    """Ten of twenty captions are right, eleven, eighteen, five, and seventeen at the end: a maximum would take step 4
    for better than step 2, and no rule of the last would find step 6."""
    judge = held_out(run, tmp_path)
    before = rewarded_captions(SAMPLES, ["nothing"] * 20, [RewardFailure("none")] * 20, *COUNTED)
    save_evaluation(run, "before", before, SAMPLES)
    pool: Any = Pool(run, {2: 10, 4: 11, 6: 18, 8: 5})
    judge.judge_before(pool)
    judge.judge_before(pool)  # as in a run that is resumed at its beginning
    judge.look(pool)
    lines = run.read_lines("eval/steps.jsonl")
    assert [each["step"] for each in lines] == [0, 2, 4, 6, 8]
    assert [each["best"] for each in lines] == [None, 2, 2, 6, 6]
    assert [each["since_best"] for each in lines] == [0, 0, 1, 0, 1]
    assert [each["against"] for each in lines] == [None, 0, 2, 2, 6]
    assert lines[2]["eval/cider_d"] > lines[1]["eval/cider_d"], "a noisy maximum"
    assert lines[2]["difference"]["low"] == 0.0
    assert lines[4]["difference"]["high"] < 0

    for step in (2, 4, 6, 8, 9):
        put(run, checkpoint_name(step), step, whole=True)
    put(run, "adapter", 9)
    after = rewarded_captions(SAMPLES, [*TRUE[:17], *["nothing"] * 3], [RewardFailure("none")] * 20, *COUNTED)
    save_evaluation(run, "after", after, SAMPLES)
    judge.choose(9, pool)
    judge.choose(9, pool)  # as where the report could not be written, and the run was resumed
    assert [each["step"] for each in run.read_lines("eval/steps.jsonl")] == [0, 2, 4, 6, 8, 9]
    assert choose_checkpoint(run, "best").step == 6
    assert run.read_text("adapter/adapter_model.safetensors") == "weights of 6"
    assert run.read_text("adapter-last/adapter_model.safetensors") == "weights of 9"
    told = choice_json(run)
    assert told["best_less_start"]["low"] > 0
    assert (told["best"]["step"], told["last"]["step"], told["last_less_best"]["value"] < 0) == (6, 9, True)
    assert load_evaluation(run, "step-000009") is not None, "a run that goes on holds it against what comes"

    titles = [chart.title for chart in held_out_charts(run.read_lines("eval/steps.jsonl"))]
    assert titles[0] == "Held out: cider_d, which chooses the best checkpoint"
    assert "Held out: caption/distinct" in titles


def test_a_measure_that_captions_do_not_have_is_named_with_those_there_are(run: RunDir, tmp_path: Path) -> None:
    judge = held_out(run, tmp_path, metrics=["attributes/f1"])
    with pytest.raises(ConfigError, match=r"no attributes/f1; there are reward, .*cider_d, .*bleu_4"):
        judge.look(Pool(run, {2: 3}))  # type: ignore[arg-type]
    assert not run.read_lines("eval/steps.jsonl")


def test_rewards_that_fail_leave_the_other_measures(run: RunDir, tmp_path: Path) -> None:
    judge = held_out(run, tmp_path)
    judge.look(Pool(run, {2: 3, 4: 20}, RewardFailure("no judge")))  # type: ignore[arg-type]
    (first, second) = run.read_lines("eval/steps.jsonl")
    assert "eval/reward" not in first
    assert first["eval/cider_d"] > 0
    assert second["best"] == 4


def test_a_best_checkpoint_that_is_worse_than_the_start_is_told(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = held_out(run, tmp_path)
    right = rewarded_captions(SAMPLES, TRUE, [RewardFailure("none")] * 20, *COUNTED)
    wrong = rewarded_captions(SAMPLES, ["nothing"] * 20, [RewardFailure("none")] * 20, *COUNTED)
    pool: Any = Pool(run, {2: 3})
    for name, evaluation in (("before", right), ("after", wrong)):
        save_evaluation(run, name, evaluation, SAMPLES)
    judge.judge_before(pool)
    judge.look(pool)
    put(run, checkpoint_name(2), 2, whole=True)
    put(run, "adapter", 4)
    judge.choose(4, pool)
    told = capsys.readouterr().err.replace("\n", " ")
    assert "the best checkpoint, of step 2, is worse than what the run began with: cider_d -" in told
