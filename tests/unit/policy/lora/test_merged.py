"""Merged weights: the same policy as the branch computes, and the base untouched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import AdapterError
from mmrl_ray.policy.lora.adapter import add_adapter, reference_policy
from mmrl_ray.policy.lora.routing import MergedAdapter
from mmrl_ray.policy.model import Policy
from tests.unit.policy.lora.test_adapter import logits, train_a_little

Load = Callable[..., Policy]
LORA = LoraSection(r=4, alpha=12)


def test_merged_is_the_adapted_policy_without_its_branch(load: Load) -> None:
    policy = load()
    base = logits(policy)
    add_adapter(policy, LORA, seed=0)
    train_a_little(policy)
    adapted = logits(policy)
    assert not torch.allclose(adapted, base, atol=1e-2), "the adapter is felt"
    merged = MergedAdapter(policy.model)
    with merged.active():
        torch.testing.assert_close(logits(policy), adapted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(policy), adapted, rtol=0, atol=0)
    with reference_policy(policy.model):
        torch.testing.assert_close(logits(policy), base, rtol=0, atol=0)


def test_it_keeps_the_version_it_took_in_until_it_is_refreshed(load: Load) -> None:
    policy = load()
    add_adapter(policy, LORA, seed=0)
    merged = MergedAdapter(policy.model)
    before = logits(policy)
    train_a_little(policy)
    after = logits(policy)
    with merged.active():
        torch.testing.assert_close(logits(policy), before, rtol=1e-4, atol=1e-5)
    merged.refresh()
    with merged.active():
        torch.testing.assert_close(logits(policy), after, rtol=1e-4, atol=1e-5)


def test_an_error_inside_leaves_the_base_in_place(load: Load) -> None:
    policy = load()
    base = logits(policy)
    add_adapter(policy, LORA, seed=0)
    train_a_little(policy)
    merged = MergedAdapter(policy.model)
    with pytest.raises(RuntimeError, match="stop"), merged.active():
        raise RuntimeError("stop")
    with reference_policy(policy.model):
        torch.testing.assert_close(logits(policy), base, rtol=0, atol=0)


def test_16_bits_and_bare_models_are_refused(load: Load) -> None:
    with pytest.raises(AdapterError, match="no adapter"):
        MergedAdapter(load().hf_model)
    policy = load(dtype="bfloat16")
    add_adapter(policy, LORA, seed=0)
    with pytest.raises(AdapterError, match="bfloat16"):
        MergedAdapter(policy.model)
