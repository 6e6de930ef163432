"""A run's own copy of its pairs, and its figures on those held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.config import Config
from mmrl_ray.config.load import parse_config
from mmrl_ray.data.samples import Sample, read_split, write_parquet
from mmrl_ray.errors import PreferenceError
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, GroupKey, RolloutGroup, SamplingParams, ScoredGroup
from mmrl_ray.planning.preflight import trained_on
from mmrl_ray.preferences.store import PreferenceStore
from mmrl_ray.report.facts import fact_blocks
from mmrl_ray.rollouts.types import DataFailure, Generated
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.training.offline import check_pairs, measure_pairs, pair_data, preferences_json
from tests.unit.preferences.examples import preference

TEXT = """\
run: {name: demo}
model: {path: x}
data: {train: d, preferences: {store: 'sqlite:///STORE', held_out: 0.4}}
algorithm: dpo
rollout: {group_size: 2}
learner: {steps: 1, dpo: {beta: 0.5}}
"""


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return parse_config(TEXT.replace("STORE", str(tmp_path / "p.db")), "c.yaml")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "runs", "demo")


def fill(cfg: Config, count: int, rater: str = "ann") -> None:
    assert cfg.data.preferences is not None
    with PreferenceStore(cfg.data.preferences.store) as store:
        store.add(preference("a" if i % 3 else "tie", rater, shade=i) for i in range(count))


def test_labels_that_come_later_change_no_run(cfg: Config, run: RunDir) -> None:
    fill(cfg, 30)
    changed, pairs = pair_data(cfg, run)
    assert changed.data.train == f"{run.location}/preferences/train"
    train = read_split(changed.data.train, prompt="")
    assert len(train) + len(pairs) == 30
    assert len(pairs) > 3
    fill(cfg, 60, "bob")
    again, same = pair_data(cfg, run)
    assert (again, same) == (changed, pairs)
    assert read_split(again.data.train, prompt="") == train


def test_held_out_samples_whose_pictures_have_pairs_are_said(cfg: Config, run: RunDir) -> None:
    """Those of held-out pairs are not trained on. A resumed run needs no store."""
    fill(cfg, 30)
    _, pairs = pair_data(cfg, run)
    train = read_split(f"{run.location}/preferences/train", prompt="")
    write_parquet(f"{run.location}/other", [train[0]])
    data = cfg.data.model_copy(update={"train": f"{run.location}/other", "eval": "elsewhere"})
    own = cfg.model_copy(update={"data": data})
    first, second = trained_on(own, [*pairs, train[0], train[1]])
    assert (first.found, first.rows) == ((train[0].id,), 1)
    assert (second.trained_on, second.found) == ("data.preferences", (train[0].id, train[1].id))
    assert second.rows == 30 - len(pairs)
    assert cfg.data.preferences is not None
    Path(cfg.data.preferences.store.removeprefix("sqlite:///")).unlink()
    assert [each.found for each in trained_on(own, [*pairs, train[0]], resume=True)] == [(train[0].id,)]


def test_a_copy_that_was_cut_off_is_made_anew(cfg: Config, run: RunDir) -> None:
    fill(cfg, 30)
    _, pairs = pair_data(cfg, run)
    run.delete("preferences/train")
    assert pair_data(cfg, run)[1] == pairs


def test_a_store_with_nothing_to_train_on_is_found_before_the_run_begins(cfg: Config) -> None:
    with pytest.raises(PreferenceError, match=r"p\.db: there is no such file"):
        check_pairs(cfg)
    fill(cfg, 0)
    with pytest.raises(PreferenceError, match="nobody has labelled a pair yet"):
        check_pairs(cfg)
    fill(cfg, 4)
    assert check_pairs(cfg) == 4


class FakeController:
    """Says that the policy has moved the captions' log-probs by so much."""

    def __init__(self, moved: Sequence[tuple[float, float]]) -> None:
        self._moved = moved

    def generate(self, samples: Sequence[Sample], sampling: SamplingParams, *, completions: int) -> Generated:
        assert completions == 2
        groups: list[ScoredGroup | None] = []
        for index, (sample, moved) in enumerate(zip(samples, self._moved, strict=False)):
            zero = torch.zeros(2)
            made = tuple(Completion(torch.ones(2), zero + by / 2, "", "stop", zero) for by in moved)
            payload = RolloutGroup(sample, EncodedPrompt(torch.ones(1), {}, ""), made, 0, sampling)
            groups.append(ScoredGroup(GroupKey(-1, index), sample.id, 0, 1, (2, 2), (), payload=payload))
        lost = samples[len(groups) :]
        failures = tuple(DataFailure(GroupKey(-1, 9), sample.id, "broken") for sample in lost)
        return Generated((*groups, *[None] * len(lost)), failures, 0)

    def groups(self, payloads: Sequence[Any]) -> list[RolloutGroup]:
        return list(payloads)


def test_accuracy_and_margin_are_those_of_the_implicit_reward(cfg: Config, run: RunDir) -> None:
    fill(cfg, 60)
    _, pairs = pair_data(cfg, run)
    decided = [p for p in pairs if p.metadata["mmrl_pair"]["preferred"][0] == 1.0][:4]
    tie = next(p for p in pairs if p.metadata["mmrl_pair"]["preferred"][0] == 0.5)
    asked = [*decided, tie, decided[0]]
    before = measure_pairs(cfg, run, "before", FakeController([(0.0, 0.0)] * 5), asked)  # type: ignore[arg-type]
    assert before.startswith("preferences (before): 50.0% of 4 held-out pairs")
    moved = [(2.0, 0.0), (1.0, -1.0), (0.0, 4.0), (3.0, 1.0), (9.0, 0.0)]
    measure_pairs(cfg, run, "after", FakeController(moved), asked)  # type: ignore[arg-type]
    found = preferences_json(run)
    assert found["after"]["pairs"] == 4
    assert found["after"]["left_out"] == 1
    assert found["after"]["accuracy"]["value"] == pytest.approx(3 / 4)
    assert found["after"]["margin"]["value"] == pytest.approx(0.5 * (2 + 2 - 4 + 2) / 4)
    assert found["difference"]["accuracy"]["value"] == pytest.approx(0.25)
    block = next(b for b in fact_blocks({"preferences": found}, [], [], [], "") if b["title"] == "Held-out preferences")
    assert ("pairs, after", "4") in block["rows"]
    assert any(name == "accuracy of the implicit reward, after" for name, _ in block["rows"])


def test_a_run_without_pairs_has_no_figures_of_them(cfg: Config, run: RunDir) -> None:
    plain = cfg.model_copy(update={"data": cfg.data.model_copy(update={"preferences": None})})
    assert pair_data(plain, run) == (plain, [])
    assert check_pairs(plain) == 0
    assert preferences_json(run) == {}
