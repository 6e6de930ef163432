"""Checkpoints: bitwise round trips, PEFT's layout, pruning, damage, full disks."""

from __future__ import annotations

import errno
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pyarrow import fs
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import AdapterError, CheckpointError, RunError
from mmrl_ray.learner.checkpoints import load_checkpoint, save_adapter_folder, save_checkpoint
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.policy.load import accelerate
from mmrl_ray.policy.model import Policy
from mmrl_ray.run_records.checkpoint_choice import newest_valid_checkpoint
from mmrl_ray.run_records.run_dir import RunDir, checkpoint_name, checkpoint_steps
from tests.unit.learner.worlds import make_groups, make_plan, make_policy, payloads, weights

CFG = LearnerSection(steps=6, lr=1e-2, warmup_steps=1)
CONTROLLER = {"cursor": {"epoch": 1, "row": 7}, "masked": 3, "buffer": b"PAR1\x00\xff"}


@pytest.fixture(params=["local", "object store"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    if request.param == "local":
        return RunDir.create(tmp_path, "r1")
    return RunDir.create("", "r1", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))


@pytest.fixture
def local(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "r1")


def learn(policy: Policy, learner: LearnerStep, steps: range) -> None:
    groups = make_groups(make_policy(Path(policy.path)))
    for step in steps:
        learner.run(make_plan(groups, CFG, step=step), payloads)


def save(run: RunDir, step: int, policy: Policy, learner: LearnerStep, keep: int = 2) -> str:
    return save_checkpoint(run, step, policy=policy, learner=learner.state(), controller=CONTROLLER, keep=keep)


def small(tiny: Path) -> tuple[Policy, LearnerStep]:
    policy = make_policy(tiny)
    return policy, LearnerStep(policy, CFG)


def damage(run: RunDir, step: int, file: str = "state.safetensors") -> None:
    data = run.read_bytes(f"{checkpoint_name(step)}/{file}")
    run.write_bytes(f"{checkpoint_name(step)}/{file}", data[:-7])


def test_three_steps_and_three_after_a_resume_are_six_bit_for_bit(tiny: Path, run: RunDir) -> None:
    straight, learner = small(tiny)
    learn(straight, learner, range(6))
    expected = learner.state()

    policy, learner = small(tiny)
    learn(policy, learner, range(3))
    save(run, 3, policy, learner)
    drawn = (torch.rand(3), random.random(), np.random.rand())

    resumed, learner = small(tiny)
    learn(resumed, learner, range(1))  # some other past
    checkpoint = load_checkpoint(run, 3, resumed)
    learner.restore(checkpoint.learner)
    assert checkpoint.step == 3
    assert checkpoint.controller == CONTROLLER
    assert torch.equal(weights(resumed), weights(policy))
    again = (torch.rand(3), random.random(), np.random.rand())
    assert torch.equal(again[0], drawn[0])
    assert again[1:] == drawn[1:]

    learn(resumed, learner, range(3, 6))
    found = learner.state()
    assert torch.equal(weights(resumed), weights(straight))
    moments = [name for name in expected.tensors if name.startswith("optimizer/")]
    assert len(moments) == 3 * sum(p.requires_grad for p in straight.model.parameters())
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in moments)
    assert found.facts["scheduler"] == expected.facts["scheduler"]
    assert learner.updates == 6


def test_any_checkpoint_is_a_peft_adapter(tiny: Path, local: RunDir) -> None:
    policy, learner = small(tiny)
    save(local, 1, policy, learner)
    base = AutoModelForImageTextToText.from_pretrained(tiny)
    accelerate(base, torch.device("cpu"))  # as a policy's layers do: else the two would agree up to rounding only
    loaded = PeftModel.from_pretrained(base, local.full_path(checkpoint_name(1)))
    ids = torch.tensor([[6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, policy.model(input_ids=ids).logits)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(input_ids=ids).logits, policy.model(input_ids=ids).logits)
    save_adapter_folder(local, "adapter", policy, 3)
    assert local.list("adapter") == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    name = f"{checkpoint_name(1)}/adapter_model.safetensors"
    assert local.read_bytes("adapter/adapter_model.safetensors") == local.read_bytes(name)


def test_nothing_in_it_is_a_pickle(tiny: Path, local: RunDir) -> None:
    policy, learner = small(tiny)
    learn(policy, learner, range(1))
    folder = local.local_path(save(local, 1, policy, learner))
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "controller/buffer",
        "manifest.json",
        "state.json",
        "state.safetensors",
    }
    assert (folder / "controller" / "buffer").read_bytes() == CONTROLLER["buffer"]
    state = json.loads((folder / "state.json").read_text())
    assert state["controller"] == {"cursor": {"epoch": 1, "row": 7}, "masked": 3}


def test_the_newest_are_kept(tiny: Path, run: RunDir) -> None:
    policy, learner = small(tiny)
    for step in (2, 4, 6, 8):
        save(run, step, policy, learner, keep=2)
    assert checkpoint_steps(run) == [6, 8]
    assert newest_valid_checkpoint(run) == 8
    # What a fallback left behind goes, the good ones before it stay.
    damage(run, 8)
    assert newest_valid_checkpoint(run) == 6
    save(run, 7, policy, learner, keep=2)
    assert checkpoint_steps(run) == [6, 7]
    save(run, 9, policy, learner, keep=1)
    assert checkpoint_steps(run) == [9]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "state.safetensors", "state.json", "manifest.json"])
def test_a_truncated_newest_falls_back_loudly(
    tiny: Path, run: RunDir, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy, learner = small(tiny)
    save(run, 2, policy, learner)
    save(run, 4, policy, learner)
    damage(run, 4, file)
    with caplog.at_level(logging.WARNING):
        assert newest_valid_checkpoint(run) == 2
    assert "checkpoint of step 4 is damaged" in caplog.text
    (event,) = run.read_lines("events.jsonl")
    assert (event["kind"], event["step"]) == ("checkpoint_damaged", 4)
    with pytest.raises(CheckpointError, match="step-000004"):
        load_checkpoint(run, 4, policy)
    damage(run, 2)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is valid"):
        newest_valid_checkpoint(run)


def test_a_folder_that_was_never_committed_is_no_checkpoint(tiny: Path, run: RunDir) -> None:
    assert newest_valid_checkpoint(run) is None
    run.write_bytes(f"{checkpoint_name(3)}/state.safetensors", b"half of an upload")
    assert newest_valid_checkpoint(run) is None
    policy, learner = small(tiny)
    save(run, 3, policy, learner)
    assert newest_valid_checkpoint(run) == 3
    assert set(run.list(checkpoint_name(3))) >= {"manifest.json", "state.json"}


def test_a_full_disk_keeps_the_checkpoint_before(tiny: Path, local: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, learner = small(tiny)
    save(local, 2, policy, learner, keep=1)
    for write in ("write_bytes", "write_text"):

        def full(self: Path, *args: Any, **kwargs: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(Path, write, full)
            with pytest.raises(RunError, match=r"the disk is full; .*--resume"):
                save(local, 4, policy, learner, keep=1)
        assert newest_valid_checkpoint(local) == 2
        assert list(local.local_path().iterdir()) == [local.local_path("checkpoints")]
        assert [p.name for p in local.local_path("checkpoints").iterdir()] == ["step-000002"]


def test_the_adapters_own_writer_on_a_full_disk_says_so_too(
    tiny: Path, local: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    policy, learner = small(tiny)
    monkeypatch.setattr("mmrl_ray.policy.lora.adapter.save_file", full)
    with pytest.raises(RunError, match=r"step-000004: the disk is full; .*--resume"):
        save(local, 4, policy, learner)
    assert list(local.local_path().iterdir()) == []


def test_another_models_checkpoint_is_refused(tiny: Path, local: RunDir) -> None:
    policy, learner = small(tiny)
    save(local, 2, policy, learner)
    name = f"{checkpoint_name(2)}/adapter_model.safetensors"
    other = make_policy(tiny)
    with torch.no_grad():
        for parameter in other.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data[..., :-1].contiguous()
    before = weights(other)
    with pytest.raises(AdapterError, match="has shape"):
        load_checkpoint(local, 2, other)
    assert torch.equal(weights(other), before)
    assert local.exists(name)
