"""A user's own algorithm: the example, found from the working directory, and what is said where it is not one."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmrl_ray.algorithms.base import Algorithm, Objective
from mmrl_ray.algorithms.registry import ALGORITHMS, FAMILIES, LOSSES, own_class
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.load import dump_config, load_config, parse_config
from mmrl_ray.config.schema import Config
from mmrl_ray.errors import ConfigError, LearnerError
from mmrl_ray.jobs.submit import own_code
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.losses.aggregation import StepRewards
from mmrl_ray.policy.model import Policy
from tests.unit.learner.worlds import make_groups, make_plan, make_policy, payloads, weights

DOCS = Path(__file__).parents[3] / "docs"
EXAMPLE = Path(__file__).parents[3] / "examples" / "own_algorithm"


@pytest.fixture
def cfg(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(EXAMPLE)
    return load_config("config.yaml")


def test_its_weights(cfg: Config) -> None:
    rewards = torch.tensor([[0.1, 0.1 + 0.05 * np.log(3.0), 0.7]], dtype=torch.float64)
    counts = torch.tensor([[True, True, False]])
    found = cfg.family.weigh(StepRewards(rewards, counts, rewards.abs(), None, torch.full_like(rewards, 2.0), 8))
    assert found.advantages.tolist() == [pytest.approx([2 * 0.25 - 1, 2 * 0.75 - 1, 0.0])]
    assert found.scales.tolist() == [[1.0, 1.0, 0.0]]
    assert found.denominator == 4
    assert found.metrics == {"own/largest_weight": pytest.approx(1.5)}


def test_it_trains(cfg: Config, tiny: Path) -> None:
    learner = LearnerSection.model_validate(cfg.learner.model_dump() | {"steps": 2})
    policy = make_policy(tiny)
    groups = make_groups(policy)
    before = weights(policy)
    step = LearnerStep(policy, learner)
    for number in range(2):
        metrics = step.run(make_plan(groups, learner, step=number), payloads)
        assert metrics["grad_norm"] > 0
    assert not torch.equal(weights(policy), before)


def test_a_resolved_config_names_it_and_reads_back_the_same(cfg: Config) -> None:
    assert cfg.learner.loss == cfg.algorithm == "reward_weighted:RewardWeighted"
    again = parse_config(dump_config(cfg), "again.yaml")
    assert again == cfg == pickle.loads(pickle.dumps(cfg))
    assert own_code(cfg.reward, cfg.algorithm) == str(EXAMPLE)  # what a job takes along


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("algorithm=no_such_module:Mine", "algorithm no_such_module:Mine cannot be imported"),
        ("algorithm=reward_weighted:Mine", "reward_weighted has no class 'Mine' that is"),
        ("algorithm=json:JSONDecoder", "json has no class 'JSONDecoder' that is"),
        ("algorithm=reward_weighted.RewardWeighted", "a class of your own is module:Class: reward_weighted:RewardWeig"),
        ("algorithm=./reward_weighted.py:RewardWeighted", "write the module as in an import, without `.py`"),
        ("learner.own={temprature: 1.0}", "own.temprature: Extra inputs are not permitted"),
        ("learner.own={temperature: 0.0}", "own.temperature: Input should be greater than 0"),
    ],
)
def test_what_is_none_is_refused(cfg: Config, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("config.yaml", [override])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("a_script", "import sys\n\nsys.exit()\n", "a_script.py:3)): it is looked"),
        ("a_script_with_arguments", "import argparse\n\nargparse.ArgumentParser().parse_args()\n", "`if __name__ =="),
        ("a_slip", "def made():\n    return undefined\n\n\nx = made()\n", "a_slip.py:2)): it is looked"),
        ("statistics", "class Mine: pass\n", "/statistics.py: choose another name for yours"),
        (
            "a_preset",
            "from mmrl_ray.algorithms.base import Algorithm\n\n\nclass Mine(Algorithm):\n"
            "    presets = {'mine': {'advantag': 'group'}}\n",
            "its preset names 'advantag', which is no key of learner",
        ),
    ],
)
def test_a_module_that_does_not_work_is_told_by_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, text: str, expected: str
) -> None:
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["mmrl", "train"])
    with pytest.raises(ConfigError) as caught:
        own_class(f"{module}:Mine")
    assert expected in str(caught.value)


def test_the_one_in_the_docs_cubes_advantages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", (DOCS / "howto" / "algorithm.md").read_text(), re.DOTALL)
    (tmp_path / "sharper.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rewards = torch.tensor([[0.0, 4.0]], dtype=torch.float64)
    step = StepRewards(rewards, rewards >= 0, rewards, None, torch.ones_like(rewards), 8)
    found = own_class("sharper:Sharper")(LearnerSection(steps=1, advantage_std=False)).weigh(step)
    assert found.advantages.tolist() == [[-8.0, 8.0]]


class Divides(Algorithm):
    """Its loss has a slip."""

    def objective(self, policy: Policy, seed: int = 0) -> Objective:
        class Share(Objective):
            def share(self, *given: Any) -> Any:
                return 1 / 0

        return Share()


def test_a_slip_in_its_loss_ends_the_run_at_once_and_is_told_by_its_line(tiny: Path) -> None:
    """A LearnerError is not tried again; whatever else a learner raises is, `max_failures` times."""
    learner = LearnerSection(steps=1, loss=f"{__name__}:Divides")
    policy = make_policy(tiny)
    with pytest.raises(
        LearnerError, match=r"Divides raised ZeroDivisionError: division by zero \(.*test_own\.py:\d+\)"
    ):
        LearnerStep(policy, learner).run(make_plan(make_groups(policy), learner), payloads)


def test_keys_of_ones_own_algorithm_are_read_by_it_alone() -> None:
    with pytest.raises(ValueError, match=r"own=\{'a': 1\} is read by an algorithm of your own alone"):
        LearnerSection(steps=1, own={"a": 1})


def test_every_name_belongs_to_one_family() -> None:
    assert len(set(ALGORITHMS)) == len(ALGORITHMS)
    assert len(set(LOSSES)) == len(LOSSES)
    for family in FAMILIES:
        for name, preset in family.presets.items():
            assert preset.get("loss") in (family.losses or (None,)), name
            if family.losses:
                made = LearnerSection(steps=1, **preset)
                assert type(made.family) is family
    with pytest.raises(ConfigError):
        own_class("mmrl_ray.algorithms.base:Objective")


def test_a_resolved_config_shows_the_keys_that_something_reads() -> None:
    shown = {
        loss: LearnerSection(steps=1, loss=loss, advantage="none").model_dump().keys() for loss in ("clipped", "raft")
    }
    assert {"dpo", "ilql"} <= shown["clipped"]  # as resolved configs always have
    assert shown["raft"] - shown["clipped"] == {"raft"}
    assert "own" not in shown["raft"]
