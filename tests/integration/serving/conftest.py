"""A run made by hand, and one `mmrl serve` of it for the whole module, in a process of its own as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from mmrl_ray.config.load import dump_config, parse_config
from mmrl_ray.experience.carriers import derive_seed
from mmrl_ray.learner.checkpoints import save_adapter_folder, save_live_version
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.processes import free_port
from mmrl_ray.run_records.run_dir import STATISTICS, RunDir
from tests.integration.rollouts.conftest import local_ray

__all__ = ["local_ray"]

REFERENCES = [["a red circle on the left", "a circle"], ["two blue squares", "blue squares above"], ["a green star"]]
WORDS = "describe the image . a red green blue circle square star on left above two squares of is there and big small"
START_S = 180.0
PROMPT = "describe the image ."


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(0.05)


@dataclass
class ServedRun:
    """A run folder as training leaves it, of a tiny random model with random adapters."""

    run: RunDir
    base: Path
    policy: Policy
    step: int = 3
    """Of the newest version."""

    def publish(self, step: int) -> None:
        """A new version beside the others, as a learner that trains for a live policy writes it."""
        self.randomise(step)
        save_live_version(self.run, self.policy, step)
        self.step = step

    def randomise(self, step: int) -> None:
        torch.manual_seed(derive_seed(step, "version"))
        with torch.no_grad():
            for name, parameter in self.policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.5)


def make_run(folder: Path, *, hidden: int = 32) -> ServedRun:
    base = build_tiny_llava(
        folder / "base", vocabulary=WORDS.split(), patch_size=16, hidden=hidden, layers=2, heads=2, vision_hidden=32,
        vision_layers=1, vision_heads=2, initializer_range=0.2,
    )  # fmt: skip
    cfg = parse_config(
        f"""
run: {{name: tiny, root: {folder / "runs"}}}
model: {{path: {base}, dtype: float32}}
data: {{train: none, prompt: {PROMPT}}}
rollout: {{max_new_tokens: 8}}
reward:
  parts: {{caption: {{kind: caption}}, cider: {{kind: cider_d}}}}
  weights: {{caption: 0.7, cider: 0.3}}
learner: {{steps: 9}}
""",
        "test",
    )
    run = RunDir.create(cfg.run.root, cfg.run.name)
    run.write_text("config.yaml", dump_config(cfg))
    run.write_text(STATISTICS, CorpusStatistics.from_references(REFERENCES).to_json())
    policy = load_policy(cfg.model)
    add_adapter(policy, cfg.model.lora, 0)
    made = ServedRun(run, base, policy)
    made.randomise(made.step)
    save_adapter_folder(run, "adapter", policy, made.step)
    return made


@dataclass
class Server:
    """`mmrl serve`, and what it told."""

    process: subprocess.Popen[str]
    url: str
    key: str
    made: ServedRun
    said: list[str]

    def pids(self, deployment: str) -> list[int]:
        """Processes of a deployment's replicas."""
        return replica_pids(self.process.pid, deployment)

    def metrics_port(self) -> int:
        """Where its Ray exports metrics to Prometheus."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            session = next((a for a in child.cmdline() if a.startswith("--session_dir=")), None)
            if session is not None:
                (file,) = Path(session.partition("=")[2]).glob("metrics_export_port_*")
                return int(file.read_text())
        raise AssertionError("no Ray found below `mmrl serve`")


def replica_pids(driver: int, deployment: str) -> list[int]:
    """Replica processes of a deployment on the local Ray that process `driver` started."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        try:
            name = " ".join(child.cmdline()).strip()
        except psutil.Error:
            continue
        if re.match(rf"ray::ServeReplica:[^:]+:{deployment}\b", name):
            found.append(child.pid)
    return found


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "XDG_DATA_HOME": str(folder / "data"), "COLUMNS": "200"}
    for name in [n for n in environment if n.startswith("RAY_")]:
        del environment[name]
    return subprocess.Popen(
        [sys.executable, "-m", "mmrl_ray.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    with serving(folder, make_run(folder), "serving.policy.max_replicas=2", "serving.policy.min_replicas=2") as made:
        yield made


@contextmanager
def serving(folder: Path, made: ServedRun, *more: str) -> Iterator[Server]:
    """`mmrl serve` of a run, with `more` settings, until it is left."""
    port = free_port()
    sets = ["serving.refresh_s=0.2", *more]
    sets += ["serving.policy.health_check_period_s=1.0", "serving.policy.resources.cpus=0.5"]
    process = start(["serve", made.run.location, "--port", str(port), *(x for s in sets for x in ("--set", s))], folder)
    said: list[str] = []
    try:
        deadline = time.monotonic() + START_S
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.rstrip())
            if line.startswith("curl") or time.monotonic() > deadline:
                break
        key = re.search(r"mmrl-[\w-]{43}", "\n".join(said))
        assert key is not None, "\n".join(said)
        yield Server(process, f"http://127.0.0.1:{port}", key[0], made, said)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait(30)
