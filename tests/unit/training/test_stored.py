"""A run's own copy of another one's rollouts, and what of them is refused before it begins."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmrl_ray.config import Config
from mmrl_ray.config.load import parse_config
from mmrl_ray.data.held_out import overlap_with_hashes
from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import Sample, read_split
from mmrl_ray.errors import ConfigError, RunError
from mmrl_ray.experience.carriers import (
    Completion,
    EncodedPrompt,
    GroupKey,
    RewardBreakdown,
    RewardFailure,
    RolloutGroup,
    SamplingParams,
    Score,
    ScoredGroup,
)
from mmrl_ray.policy.lora.adapter import adapter_state, add_adapter, add_run_adapter, save_adapter
from mmrl_ray.rollouts.stored import stored_group
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.training.offline import check_stored, greedy_sampling, logged_pictures, stored_data
from tests.support.tiny_models import load_family
from tests.unit.experience.factories import group_table
from tests.unit.preferences.examples import picture

TEXT = """\
run: {name: demo}
model: {path: x, lora: {r: 4, alpha: 8}}
data: {train: d, rollouts: {run: SOURCE}}
algorithm: ilql
rollout: {group_size: 3}
learner: {steps: 1, ilql: {beta: 5.0}}
"""


@pytest.fixture
def source(tmp_path: Path) -> RunDir:
    """Steps 0 to 3 of two groups each, one of which is masked."""
    run = RunDir.create(tmp_path / "runs", "again")
    for step in range(4):
        tables = []
        for index in range(2):
            images = (picture(2 * step + index),) if (step, index) != (2, 0) else (picture(60), picture(61))
            sample = Sample(f"s{index}", images, "describe")
            made = tuple(
                Completion(torch.arange(1, 2 + i), -torch.arange(1.0, 2.0 + i) / 3, f"c{step}{index}{i}", "stop")
                for i in range(3)
            )
            rewards: tuple[Score, ...] = tuple(RewardBreakdown(i / 4, {"p": i / 4}, {"p": 1.0}) for i in range(3))
            if (step, index) == (3, 0):
                rewards = (*rewards[:2], RewardFailure("it hung"))
            masked = "its reward failed" if (step, index) == (1, 1) else None
            group = RolloutGroup(sample, EncodedPrompt(torch.arange(3), {}, "k"), made, 0, SamplingParams(), made[0])
            scored = ScoredGroup(
                GroupKey(step, index), sample.id, 0, 3, (1, 2, 3), () if masked else rewards, rewards[0], masked=masked
            )
            tables.append(group_table("again", scored, group))
            names = [f"{image_hash([image])}.png" for image in images]
            for name, image in zip(names, images, strict=True):
                run.write_bytes(f"images/{name}", image)
            if len(images) > 1:
                run.write_json(f"images/{image_hash(images)}.json", names)
        buffer = io.BytesIO()
        pq.write_table(pa.concat_tables(tables), buffer)
        run.write_bytes(f"rollouts/step-{step:06d}.parquet", buffer.getvalue())
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "runs", "demo")


def config(source: RunDir, *overrides: str) -> Config:
    return parse_config(TEXT.replace("SOURCE", source.location), "c.yaml", overrides)


def test_the_log_is_copied_whole_and_what_becomes_of_it_later_changes_no_run(source: RunDir, run: RunDir) -> None:
    cfg = config(source)
    assert check_stored(cfg) == 7  # the masked group has nothing to say
    changed = stored_data(cfg, run)
    assert changed.data.train == f"{run.location}/stored/train"
    samples = {sample.id: sample for sample in read_split(changed.data.train, prompt="")}
    assert len(samples) == 7
    assert len(samples["2.0.0/s0"].images) == 2
    group = stored_group(samples["3.1.0/s1"])
    assert group is not None
    assert [c.text for c in group.completions] == ["c310", "c311", "c312"]
    assert [r.total for r in group.rewards] == [0.0, 0.25, 0.5]
    hung = stored_group(samples["3.0.0/s0"])
    assert hung is not None
    assert [getattr(r, "total", r) for r in hung.rewards] == [0.0, 0.25, RewardFailure("it hung")]
    assert torch.equal(group.completions[2].logprobs, -torch.arange(1.0, 4.0) / 3)
    source.delete("rollouts")
    assert stored_data(cfg, run) == changed
    assert changed.data.rollouts is not None
    assert changed.data.rollouts.run == f"{run.location}/stored"


def test_steps_can_be_chosen(source: RunDir, run: RunDir) -> None:
    cfg = config(source, "data.rollouts.first_step=1", "data.rollouts.last_step=2")
    assert check_stored(cfg) == 3
    assert {s.id[0] for s in read_split(stored_data(cfg, run).data.train, prompt="")} == {"1", "2"}
    with pytest.raises(ConfigError, match="has no group from step 9 to its end"):
        check_stored(config(source, "data.rollouts.first_step=9"))
    with pytest.raises(ConfigError, match="last_step=1 is below first_step=2"):
        config(source, "data.rollouts.first_step=2", "data.rollouts.last_step=1")


def test_what_cannot_be_learnt_from_is_found_before_the_run_begins(source: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"have 3 completions: write rollout\.group_size: 3"):
        check_stored(config(source, "rollout.group_size=8"))
    with pytest.raises(ConfigError, match="has no adapter/: let it finish"):
        check_stored(config(source, "data.rollouts.policy=adapter"))
    with pytest.raises(RunError, match="no run folder at"):
        check_stored(config(source, f"data.rollouts.run={tmp_path}/nowhere"))
    source.delete("rollouts")
    with pytest.raises(RunError, match="has no rollout log"):
        check_stored(config(source))


def test_a_picture_that_is_gone_is_named(source: RunDir, run: RunDir) -> None:
    gone = image_hash([picture(0)])
    source.delete(f"images/{gone}.png")
    with pytest.raises(RunError, match=f"picture {gone} is missing"):
        stored_data(config(source), run)
    assert not run.exists("stored/train")


def test_the_adapter_of_the_other_run_is_what_this_one_begins_with(source: RunDir, run: RunDir, tmp_path: Path) -> None:
    theirs = load_family("llava", tmp_path / "model")
    cfg = config(source, "data.rollouts.policy=adapter")
    add_adapter(theirs, cfg.model.lora, seed=5)
    with torch.no_grad():
        for parameter in theirs.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    save_adapter(theirs.model, source.local_path("adapter"))
    assert check_stored(cfg) == 7
    with pytest.raises(ConfigError, match="has r=4 and alpha=8: write the same"):
        check_stored(config(source, "data.rollouts.policy=adapter", "model.lora.alpha=16"))
    changed = stored_data(cfg, run)
    source.delete("adapter")
    ours = load_family("llava", tmp_path / "model")
    add_run_adapter(ours, changed)
    assert all(torch.equal(t, adapter_state(theirs.model)[n]) for n, t in adapter_state(ours.model).items())
    base = load_family("llava", tmp_path / "model")
    add_run_adapter(base, config(source))
    assert not any(bool(t.any()) for n, t in adapter_state(base.model).items() if "lora_B" in n)


def test_a_broken_adapter_config_is_named(source: RunDir) -> None:
    source.write_text("adapter/adapter_config.json", json.dumps({"r": 4}))
    source.write_bytes("adapter/adapter_model.safetensors", b"")
    with pytest.raises(RunError, match=r"adapter_config\.json cannot be read"):
        check_stored(config(source, "data.rollouts.policy=adapter"))


def test_runs_that_learn_from_no_log_are_left_as_they_are(source: RunDir, run: RunDir) -> None:
    cfg = config(source)
    assert greedy_sampling(cfg, has_learned=True).value_beta == 5.0
    plain = parse_config("run: {name: demo}\nmodel: {path: x}\ndata: {train: d}\nlearner: {steps: 1}\n", "c.yaml")
    assert (check_stored(plain), stored_data(plain, run), greedy_sampling(plain, has_learned=True).value_beta) == (
        0,
        plain,
        0.0,
    )


def test_held_out_samples_whose_pictures_are_in_the_rollouts_are_said(source: RunDir, tmp_path: Path) -> None:
    """Of the steps that are learned from; a group of two pictures is known by both."""
    held_out = [Sample(f"h{i}", (picture(i),), "") for i in (0, 5, 99)]
    held_out.append(Sample("pair", (picture(60), picture(61)), ""))
    cfg = parse_config(TEXT.replace("SOURCE", source.location), "c.yaml")
    assert cfg.data.rollouts is not None
    assert overlap_with_hashes(held_out, logged_pictures(cfg.data.rollouts), "log").found == ("h0", "h5", "pair")
    late = cfg.data.rollouts.model_copy(update={"first_step": 2})
    found = overlap_with_hashes(held_out, logged_pictures(late), "log")
    assert (found.found, found.rows) == (("h5", "pair"), 4)
