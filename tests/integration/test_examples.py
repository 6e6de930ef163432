"""The examples do what they say, each shortened."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmrl_ray.config.load import load_config
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.experience.carriers import RewardBreakdown
from mmrl_ray.rewards.build import try_functions
from tests.integration.training.test_readme import commands

ROOT = Path(__file__).parents[2]


def test_grpo_on_one_screen_runs_as_documented() -> None:
    (command,) = [each for each in commands("python") if "grpo_on_one_screen" in each]
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step   0  mean reward -?\d\.\d{3} ", done.stdout, re.MULTILINE)
    assert re.match(r"held-out reward -?\d\.\d{3} -> -?\d\.\d{3}, e\.g\. '", done.stdout.splitlines()[-1])
    lines = (ROOT / "examples" / "grpo_on_one_screen.py").read_text().splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if "import ray" in line]


def test_own_reward_pays_for_the_colour_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by its config, in a process of its own, as in a run; what is right, the scene's own description says."""
    monkeypatch.chdir(ROOT)
    cfg = load_config(ROOT / "examples" / "own_reward" / "config.yaml")
    train, _ = generate_scenes(ScenesSection(train=3, eval=1, max_objects=1))
    for sample in train:
        (shown,) = sample.metadata["objects"]
        other = "red" if shown["colour"] != "red" else "blue"
        for colour, expected in ((shown["colour"], 1.0), (other, 0.0)):
            score = try_functions(cfg.reward, sample, f"a {colour} {shown['shape']}")["named"]
            assert isinstance(score, RewardBreakdown)
            assert score.total == expected
