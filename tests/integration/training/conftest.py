"""One Ray for this folder's runs, which join it as they would a cluster; data and base model are made once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mmrl_ray.cli import app
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import scenes_vocabulary, write_scenes
from mmrl_ray.policy.tiny import build_tiny_llava
from tests.support.local_ray import local_ray
from tests.support.programs import Program

DEADLINE_S = 240.0


@dataclass
class Workplace:
    """Where runs are made, by the command line, in processes of their own."""

    folder: Path
    environment: dict[str, str]
    settings: dict[str, Any]

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def config(self, name: str, **overrides: Any) -> Path:
        merged = {**self.settings, "run": {"name": name, "seed": 3, "root": str(self.runs)}}
        for section, keys in overrides.items():
            merged[section] = {**merged.get(section, {}), **keys} if isinstance(keys, dict) else keys
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merged))
        return path

    def start(self, *arguments: str | Path, cwd: Path | None = None) -> Program:
        return Program([*map(str, arguments)], self.environment, cwd or self.folder)

    def begin(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
        """As a user does: in a fresh interpreter, which has what this process gives on. For what signals are sent."""
        command = [sys.executable, "-m", "mmrl_ray.cli", *map(str, arguments)]
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        folder = cwd or self.folder
        return subprocess.Popen(command, stdout=pipe, stderr=both, text=True, env=self.environment, cwd=folder)

    def mmrl(self, *arguments: str | Path, code: int = 0, cwd: Path | None = None) -> str:
        process = self.start(*arguments, cwd=cwd)
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == code, output
        return output

    def call(self, *arguments: str | Path, code: int = 0, cwd: Path | None = None) -> str:
        """What the program printed, in this process: for commands that start no Ray."""
        with chdir(cwd or self.folder):
            result = CliRunner().invoke(app, [*map(str, arguments)], env=self.environment)
        assert result.exit_code == code, f"{result.output}\n{result.exc_info}"
        return result.output


def wait_for(condition: Callable[[], bool], process: Program | subprocess.Popen[str], what: str) -> None:
    """Until `condition` holds; fails when the process ends before, or the deadline passes."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the run ended before {what}: {process.communicate()[0]}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no {what} within {DEADLINE_S:g} s: {process.communicate()[0]}")
        time.sleep(0.05)


def prepare(folder: Path) -> dict[str, Any]:
    """Makes data and base model; returns what all configs here share."""
    write_scenes(ScenesSection(train=24, eval=6), folder / "train", folder / "eval")
    build_tiny_llava(
        folder / "base",
        vocabulary=["describe", "the", "image", ".", *scenes_vocabulary()],
        patch_size=16,
        hidden=32,
        layers=2,
        heads=2,
        vision_hidden=32,
        vision_layers=1,
        vision_heads=2,
    )
    actor = {"cpus": 0.5, "threads": 1}
    return {
        "model": {"path": str(folder / "base"), "dtype": "float32"},
        "data": {"train": str(folder / "train"), "eval": str(folder / "eval"), "prompt": "describe the image ."},
        "algorithm": "grpo",
        "rollout": {"group_size": 3, "max_new_tokens": 6, "groups_per_assignment": 2},
        "reward": {
            "host": "inline",  # Serve has tests of its own, and costs every run seconds
            "parts": {
                "caption": {"kind": "caption"},
                "fluent": {"kind": "fluency"},
                "short": {"kind": "format", "pattern": ".{0,20}"},
            },
            "weights": {"caption": 1.0, "fluent": 0.1, "short": 0.01},
        },
        "learner": {"steps": 6, "groups_per_step": 4, "lr": 1e-2, "checkpoint_every": 3},
        "resources": {"learner": actor, "rollout": actor},
    }


@pytest.fixture(scope="package")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("workplace")
    settings = prepare(folder)
    with local_ray(cpus=4, logs=True) as address:
        environment = {**os.environ, "RAY_ADDRESS": address, "COLUMNS": "200"}
        yield Workplace(folder, environment, settings)
