"""Every command of README and docs, each once and in their order, in a folder that holds what they take for granted."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml

from mmrl_ray.data.samples import read_split
from mmrl_ray.processes import free_port
from tests.support.programs import Program

from .conftest import DEADLINE_S, Workplace

ROOT = Path(__file__).parents[3]


ELSEWHERE = ("mmrl submit ", "mmrl jobs ")
"""Need a job server: tests/integration/jobs runs them."""
ON_RAY = ("sft",)
"""Join a Ray, as this process has."""


def pages() -> list[Path]:
    """README, then the pages of docs in the order of their table of contents, then what else speaks to people."""
    index = (ROOT / "docs" / "index.md").read_text()
    listed = [line for block in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for line in block.split()]
    found = [ROOT / "docs" / f"{name}.md" for name in listed if (ROOT / "docs" / f"{name}.md").exists()]
    return [ROOT / "README.md", *found, ROOT / "CONTRIBUTING.md"]


def commands(tool: str) -> list[str]:
    """Distinct commands in the shell blocks of all pages that call `tool`, without their comments."""
    blocks = [b for page in pages() for b in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    lines = [line.split("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = dict.fromkeys(" ".join(line.split()) for line in lines)
    return [line for line in found if line.startswith(f"{tool} ")]


@pytest.fixture
def place(workplace: Workplace, tmp_path: Path) -> Path:
    """The files that the commands name: COCO, Karpathy's splits, photographs, configs."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    # The same in seconds; how well it learns is another test's affair.
    agent = yaml.safe_load((tmp_path / "configs" / "value_based.yaml").read_text())
    agent["data"]["scenes"] |= {"train": 30, "eval": 6}
    agent["value_based"] |= {"learning_starts": 64, "pictures": 4}
    agent["learner"] |= {"steps": 8, "checkpoint_every": 8}
    agent["resources"] = {"rollout": {"cpus": 0.5}, "learner": {"cpus": 0.5}}
    (tmp_path / "configs" / "value_based.yaml").write_text(yaml.safe_dump(agent))
    samples = read_split(workplace.folder / "train", prompt="")[:6]
    for folder in ("train2017", "coco/val2014", "."):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for i, sample in enumerate(samples):
            (tmp_path / folder / f"{i}.png").write_bytes(sample.images[0])
    (tmp_path / "photo.jpg").write_bytes(samples[0].images[0])
    numbered = list(enumerate(samples))
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i, _ in numbered],
        "annotations": [
            {"id": 10 * i + j, "image_id": i, "caption": text}
            for i, s in numbered
            for j, text in enumerate(s.references)
        ],
    }
    (tmp_path / "captions_train2017.json").write_text(json.dumps(coco))
    karpathy = {
        "dataset": "coco",
        "images": [
            {
                "filename": f"{i}.png",
                "filepath": "val2014",
                "split": "test",
                "cocoid": i,
                "imgid": i,
                "sentences": [{"raw": text} for text in s.references],
            }
            for i, s in numbered
        ],
    }
    (tmp_path / "dataset_coco.json").write_text(json.dumps(karpathy))
    lines = [json.dumps({"image": f"{i}.png", "captions": list(s.references)}) for i, s in numbered]
    (tmp_path / "photos.jsonl").write_text("\n".join(lines) + "\n")
    votes = [
        {"image": "0.png", "caption_a": "red", "caption_b": text, "choice": "b", "rater": "ann"}
        for text in ("a circle", "a red circle")
    ]
    (tmp_path / "votes.jsonl").write_text("\n".join(map(json.dumps, votes)))
    settings = {
        **workplace.settings,
        "run": {"name": "mine"},
        "data": {"train": "data/photos", "eval": "data/coco/test", "prompt": "describe the image ."},
        "sft": {"steps": 2, "batch_size": 4, "warmup_steps": 0},
        "learner": {"steps": 2, "groups_per_step": 2},
    }
    # Its training is tested by itself; here it is the command.
    reward_model = yaml.safe_load((tmp_path / "configs" / "reward-model.yaml").read_text())
    reward_model["training"] = {"steps": 2}
    (tmp_path / "configs" / "reward-model.yaml").write_text(yaml.safe_dump(reward_model))
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@dataclass
class Served:
    """The documented server, on a port and with a key database of its own."""

    workplace: Workplace
    place: Path
    port: int
    process: subprocess.Popen[str] | None = None

    def start(self, arguments: list[str]) -> None:
        """Returns when it has printed its URL; later commands have its key."""
        environment = {name: value for name, value in self.workplace.environment.items() if name != "RAY_ADDRESS"}
        key = self.workplace.call("keys", "create", "test", cwd=self.place).split()
        alone = replace(self.workplace, environment=environment)
        self.process = alone.begin(*arguments, "--port", str(self.port), cwd=self.place)
        assert self.process.stdout is not None
        output = ""
        while "curl" not in output:
            line = self.process.stdout.readline()
            assert line, f"it ended: {output}"
            output += line
        found = next(word for word in key if word.startswith("mmrl-"))
        self.workplace = replace(self.workplace, environment={**self.workplace.environment, "MMRL_API_KEY": found})


@dataclass
class Trainings:
    """Runs that go on, each in a process of its own, until a command asks for theirs."""

    workplace: Workplace
    place: Path
    begun: dict[str, Program] = field(default_factory=dict)
    """By the command."""

    def start(self, command: str) -> None:
        """The same one is started once."""
        if command not in self.begun:
            self.begun[command] = self.workplace.start(*shlex.split(command)[1:], cwd=self.place)

    def wait_for(self, command: str = "") -> None:
        """Those whose run the command names; all of them without one."""
        asked = set(re.findall(r"runs/(\w+)", command))
        for begun, process in self.begun.items():
            names = set(re.findall(r"run\.name=(\w+)|--resume runs/(\w+)|configs/(\w+)\.yaml", begun)[0])
            if process.returncode is None and (not command or names & asked):
                output, _ = process.communicate(timeout=DEADLINE_S)
                assert process.returncode == 0, f"{begun}\n{output}"
                assert "Traceback" not in output, begun

    def end(self) -> None:
        """Whatever is left of a test that failed."""
        for process in self.begun.values():
            if process.returncode is None:
                process.kill()
                process.communicate()


@contextmanager
def served(workplace: Workplace, place: Path) -> Iterator[Served]:
    environment = {**workplace.environment, "HOME": str(place / "home")}
    server = Served(replace(workplace, environment=environment), place, free_port())
    try:
        yield server
    finally:
        if server.process is not None:
            server.process.send_signal(signal.SIGINT)
            output, _ = server.process.communicate(timeout=DEADLINE_S)
            assert "Traceback" not in output


@pytest.fixture
def trainings(workplace: Workplace, place: Path) -> Iterator[Trainings]:
    found = Trainings(workplace, place)
    yield found
    found.end()


def trains(command: str) -> bool:
    return command.startswith("mmrl train ") and "--dry-run" not in command


def turn(command: str) -> int:
    """Later than its place says where others can go on meanwhile: the server, and what waits for the other runs."""
    if re.search(r"http://127|^mmrl serve (?!.*--print-config)", command):
        return 1
    return 2 if re.search(r"^mmrl (?!train).* runs/(?!again)\w", command) else 0


@pytest.mark.timeout(600)
def test_every_mmrl_command_of_readme_and_docs_runs(workplace: Workplace, place: Path, trainings: Trainings) -> None:
    found = sorted((c for c in commands("mmrl") if not c.startswith(ELSEWHERE)), key=turn)
    assert len(found) >= 40
    for command in filter(trains, found):
        if " configs/" in command:  # it needs nothing that another command makes
            trainings.start(command)
    with served(workplace, place) as server:
        for command in found:
            arguments = shlex.split(command)[1:]
            trainings.wait_for(command)
            if trains(command):
                trainings.start(command)
                continue
            if arguments[0] == "serve" and "--print-config" not in arguments:
                server.start(arguments)
                continue
            # The run is over by now: another test scales one in progress.
            code = 1 if arguments[0] == "scale" else 0
            here = [a.replace(":8000", f":{server.port}") for a in arguments]
            began = time.monotonic()
            run = server.workplace.mmrl if arguments[0] in ON_RAY else server.workplace.call
            output = run(*here, code=code, cwd=place)
            print(f"{time.monotonic() - began:6.1f} s  {command}")
            assert ("the run is finished; only a run in progress" in output) == (code == 1), output
            assert "Traceback" not in output, command
        trainings.wait_for()
        assert server.process is not None
    assert (place / "runs" / "again" / "report.html").exists()
    assert (place / "photo-explained.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_split(place / "data" / "coco" / "train", prompt="")) == 6
    for run in ("again", "liked", "valued"):
        summary = json.loads((place / "runs" / run / "summary.json").read_text())
        assert summary["status"] == "finished"
    last = (place / "runs" / "liked" / "metrics.jsonl").read_text().splitlines()[-1]
    assert 0 <= json.loads(last)["dpo/accuracy"] <= 1
    last = (place / "runs" / "valued" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["ilql/td"] >= 0
    assert (place / "runs" / "valued" / "adapter" / "value_heads.safetensors").exists()
    assert (place / "rewards" / "scenes" / "report.json").exists()


def test_every_make_target_of_readme_and_docs_is_there() -> None:
    found = commands("make")
    assert {"make quickstart", "make test", "make check", "make docs"} <= set(found)
    for command in found:
        done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
