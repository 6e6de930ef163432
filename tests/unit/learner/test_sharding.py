"""FSDP2 in a process group of one: what is split and what is not, and that the step's numbers stay as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mmrl_ray.config.learner import KlSection, LearnerSection
from mmrl_ray.errors import ConfigError
from mmrl_ray.learner.objective import ImportanceWatch
from mmrl_ray.learner.ranks import shard_layers
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.policy.lora.adapter import adapter_state
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.packed import checkpoint_layers
from mmrl_ray.policy.vision import VisionCache
from tests.unit.learner.worlds import gradient, make_groups, make_plan, make_policy, payloads, sample

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def section(**keys: Any) -> LearnerSection:
    kl = KlSection(weight=0.1)
    return LearnerSection(**{"steps": 4, "max_grad_norm": 1e9, "micro_batch_tokens": 1, "kl": kl, "passes": 2, **keys})


def sharded(tiny: Path, *, checkpointing: bool) -> Policy:
    policy = make_policy(tiny)
    shard_layers(policy, CPU)
    if checkpointing:
        checkpoint_layers(policy)
    return policy


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sharded_step_is_the_replicated_one(tiny: Path, alone: None, checkpointing: bool) -> None:
    cfg = section(adapter_l2=0.01, l2_to_pretrained=0.01)
    plain = make_policy(tiny)
    groups = make_groups(plain, noise=0.2)
    plan = make_plan(groups, cfg)
    expected = LearnerStep(plain, cfg).run(plan, payloads)
    policy = sharded(tiny, checkpointing=checkpointing)
    metrics = LearnerStep(policy, cfg, path="packed", in_lockstep=True).run(plan, payloads)
    assert (metrics["shared_prefix"], metrics["packed_rows"]) == (True, True)
    theirs = gradient(plain)
    assert float((gradient(policy) - theirs).norm() / theirs.norm()) < 1e-5
    for name in ("loss", "loss/policy", "loss/kl", "grad_norm", "entropy"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_importance_on_sharded_layers_is_the_replicated_one_and_leaves_the_step_alone(
    tiny: Path, alone: None, checkpointing: bool
) -> None:
    cfg = section()
    plain = make_policy(tiny)
    groups = make_groups(plain, noise=0.2)
    plan = make_plan(groups, cfg)
    expected = ImportanceWatch(plain, VisionCache(0), 1).measure(lambda: groups[0])
    LearnerStep(plain, cfg).run(plan, payloads)
    policy = sharded(tiny, checkpointing=checkpointing)
    learner = LearnerStep(policy, cfg, path="packed", in_lockstep=True)
    watch = ImportanceWatch(policy, VisionCache(0), 1)
    for _ in range(2):
        found = watch.measure(lambda: groups[0])
        for name in ("importance/image", "importance_rms/text"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4)
    learner.run(plan, payloads)
    assert float((gradient(policy) - gradient(plain)).norm() / gradient(plain).norm()) < 1e-5


def test_only_the_frozen_weights_of_layers_are_split(tiny: Path, alone: None) -> None:
    before = adapter_state(make_policy(tiny).model)
    policy = sharded(tiny, checkpointing=False)
    split = {name for name, p in policy.model.named_parameters() if isinstance(p, DTensor)}
    assert len(split) == 2 * 9, "of 2 layers: 7 linear weights and 2 norms"
    assert not any("lora" in name or "vision" in name or "embed" in name for name in split)
    assert all(".layers." in name for name in split)
    after = adapter_state(policy.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_start_up_check_runs_on_sharded_layers(tiny: Path, alone: None) -> None:
    policy = sharded(tiny, checkpointing=True)
    choice = choose_path(policy, encode_prompts(policy, [sample(0)]), wanted="packed")
    assert choice.path == "packed", choice.reason
    assert choice.wanted_gap.to_model < 1e-5


def test_a_decoder_without_layers_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(tiny)
    monkeypatch.setattr(policy.hf_model, "get_decoder", lambda: SimpleNamespace())
    with pytest.raises(
        ConfigError, match=r"SimpleNamespace has no list of layers to split; set learner.sharding: none"
    ):
        shard_layers(policy, CPU)
