"""Merged weights: the same policy as the branch computes, and the base untouched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft.tuners.lora import LoraLayer

from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import AdapterError
from mmrl_ray.policy.lora.adapter import add_adapter, reference_policy
from mmrl_ray.policy.lora.routing import MergedAdapter, VersionedPolicy
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


def test_merged_weights_may_lie_in_memory_otherwise(load: Load) -> None:
    policy = load()
    add_adapter(policy, LORA, seed=0)
    train_a_little(policy)
    plain = MergedAdapter(policy.model)
    turned = MergedAdapter(policy.model, lambda weight: weight.t().contiguous().t())
    train_a_little(policy)
    for merged in (plain, turned):
        merged.refresh()
    for one, other in zip(plain._merged, turned._merged, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()
        assert other.t().is_contiguous()


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


def test_in_16_bits_it_keeps_of_the_adapter_what_its_branch_keeps(load: Load) -> None:
    """Both round to the base's dtype once, and neither is further from the policy in float64; the base comes back."""
    policy, exact = load(dtype="bfloat16"), load(dtype="bfloat16")
    for each in (policy, exact):
        add_adapter(each, LORA, seed=0)
        train_a_little(each)
    exact.model.double()
    exact.dtype = torch.float64
    wanted = logits(exact)
    with reference_policy(exact.model):
        effect = (wanted - logits(exact)).norm()
    weights = {name: p.clone() for name, p in policy.hf_model.named_parameters()}
    branch = (logits(policy).double() - wanted).norm()
    with MergedAdapter(policy.model).active():
        merged = (logits(policy).double() - wanted).norm()
    assert merged <= 1.3 * branch
    assert merged < 0.1 * effect, "the adapter is felt"
    assert all(torch.equal(p, weights[name]) for name, p in policy.hf_model.named_parameters())


def test_in_16_bits_a_device_that_waits_for_launches_merges_and_a_cpu_does_not(load: Load) -> None:
    policy = load(dtype="bfloat16")
    add_adapter(policy, LORA, seed=0)
    products: list[torch.Tensor] = []
    for layer in policy.model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A["default"].register_forward_hook(lambda *args: products.append(args[2]))  # type: ignore[operator]
    on_cpu = VersionedPolicy(policy)
    with on_cpu.merged():
        logits(policy)
    assert products
    policy.device = torch.device("meta")  # it is asked of what kind it is; the tensors stay where they are
    elsewhere = VersionedPolicy(policy)
    policy.device = torch.device("cpu")
    products.clear()
    with elsewhere.merged():
        logits(policy)
    assert not products


def test_bare_models_and_other_dtypes_are_refused(load: Load) -> None:
    with pytest.raises(AdapterError, match="no adapter"):
        MergedAdapter(load().hf_model)
    policy = load()
    add_adapter(policy, LORA, seed=0)
    policy.model.double()
    with pytest.raises(AdapterError, match="float64"):
        MergedAdapter(policy.model)
