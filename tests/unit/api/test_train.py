"""What `train` makes of its arguments, what the calling process is afterwards, and which Ray it is in."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmrl_ray import Config, train
from mmrl_ray.api import host
from mmrl_ray.api.training import run_config
from mmrl_ray.config.load import load_config
from mmrl_ray.errors import ConfigError, Interrupted, RunError
from mmrl_ray.evaluation.model_source import quieten
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.telemetry.logs import CONTEXT, logs_json, start_logging
from mmrl_ray.training import train as training

YAML = """\
run: {name: demo}
model: {path: builtin:tiny-llava}
data: {train: data/train, scenes: {train: 40, eval: 4}}
sft: {steps: 20}
learner: {steps: 10, groups_per_step: 8}
"""


def settings() -> dict[str, Any]:
    return {
        "run": {"name": "demo"},
        "model": {"path": "builtin:tiny-llava"},
        "data": {"train": Path("data/train"), "scenes": {"train": 40, "eval": np.int64(4)}},
        "sft": {"steps": 20},
        "learner": {"steps": 10, "groups_per_step": 8},
    }


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(YAML)
    return path


def test_a_dictionary_a_config_and_a_file_are_the_same(file: Path) -> None:
    wanted = load_config(file, ["learner.lr=0.00002", "run.name=again"])
    given = settings()
    for config in (file, str(file), given, Config.model_validate(settings() | {"data": load_config(file).data})):
        for overrides in ({"learner.lr": 2e-5, "run.name": "again"}, ["learner.lr=2e-5", "run.name=again"]):
            assert run_config(config, overrides=overrides) == (wanted, False)
    assert given == settings(), "what was given is left alone"


def test_a_wrong_key_is_told_as_by_the_program(file: Path) -> None:
    file.write_text(YAML.replace("groups_per_step", "group_per_step") + "extra: 1\n")
    wrong = settings() | {"extra": 1}
    wrong["learner"] = {"steps": 10, "group_per_step": 8}
    told = []
    for config in (file, wrong):
        with pytest.raises(ConfigError) as caught:
            train(config)
        told.append([line.split(": ", 1)[1] for line in str(caught.value).splitlines()])
    assert told[0] == told[1]
    assert told[0][0].startswith("learner.group_per_step: unknown key (value 8); did you mean")
    with pytest.raises(ConfigError, match=r'--set learner\.lr: must be a number, not "x"'):
        train(settings(), overrides={"learner.lr": "x"})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((None, {}), "nothing to train"),
        ((3, {}), "int is no config: give a Config"),
        ((None, {"resume": "runs/x"}), "no run folder at "),
        (("c.yaml", {"resume": "runs/x"}), "both name a run"),
        (("d.yaml", {}), "d.yaml: no such config; did you mean c.yaml"),
        ((settings(), {"overrides": {"learner.lr": object()}}), "hold what no config can"),
    ],
)
def test_what_cannot_be_trained_is_refused(file: Path, arguments: tuple[Any, dict[str, Any]], told: str) -> None:
    config, options = arguments
    with pytest.raises((ConfigError, RunError)) as caught:
        train(config, **options)
    assert told in str(caught.value)


def test_a_run_is_gone_on_with_wherever_it_lies(file: Path) -> None:
    run = RunDir.create("moved", "there")
    run.write_text("config.yaml", YAML)
    for given in ({"resume": "moved/there"}, {"config": "moved/there", "resume": True}):
        cfg, is_resumed = run_config(given.pop("config", None), **given, overrides=["learner.steps=12"])  # type: ignore[arg-type]
        assert is_resumed
        assert (Path(cfg.run.root).name, cfg.run.name, cfg.learner.steps) == ("moved", "there", 12)
    assert run_config(file, resume_or_start=True)[1] is False
    RunDir.create("runs", "demo")
    assert run_config(file, resume_or_start=True)[1] is True


def test_what_stopped_it_is_raised_and_the_process_is_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.environ.copy()
    levels = {name: logging.getLogger(name).level for name in ("mmrl_ray", "transformers", "peft")}
    handlers, threads, filters = [*logging.getLogger().handlers], torch.get_num_threads(), [*warnings.filters]
    monkeypatch.setenv("KEPT", "as it is")
    handler, told = signal.getsignal(signal.SIGINT), CONTEXT.fields.get("run")

    def whole(cfg: Config, **options: Any) -> str:
        os.environ.update(KEPT="changed", RAY_AUTH_MODE="token")
        os.environ.pop("HOME", None)
        start_logging("json", run="demo", role="driver")
        quieten()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(threads + 1)
        raise Interrupted("stopped after 3 steps")

    monkeypatch.setattr(training, "train", whole)
    with pytest.raises(Interrupted, match="stopped after 3 steps") as caught:
        train(file)
    assert caught.value.__notes__ == ["In Python: train(resume='runs/demo')"]
    assert dict(os.environ) == before | {"KEPT": "as it is"}
    assert not logs_json()
    assert [*logging.getLogger().handlers] == handlers
    assert {name: logging.getLogger(name).level for name in levels} == levels
    assert (torch.get_num_threads(), CONTEXT.fields.get("run"), [*warnings.filters]) == (threads, told, filters)
    assert signal.getsignal(signal.SIGINT) is handler
    with host.kept_as_it_was(), host.own_process(), pytest.raises(Interrupted):
        train(file)  # the program's last words are in the format of its log
    assert not logs_json()
