"""The last layer's MLP at the last position only: that position and every key and value stay what they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmrl_ray.policy.last_layer import mlp_at_last_position
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.prompts import encode_prompts
from tests.support.tiny_models import make_samples

Load = Callable[..., Policy]


def test_keys_values_and_the_last_position_are_the_models_own(load: Load) -> None:
    policy = load()
    prompt = encode_prompts(policy, make_samples()[:1])[0]
    inputs = {name: value for name, value in prompt.model_inputs.items() if name != "mm_token_type_ids"}
    rows: list[int] = []
    mlp = policy.hf_model.get_decoder().layers[-1].mlp
    seen = mlp.gate_proj.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    with torch.no_grad():
        whole = policy.core(input_ids=prompt.input_ids[None], use_cache=True, **inputs)
        with mlp_at_last_position(policy):
            pruned = policy.core(input_ids=prompt.input_ids[None], use_cache=True, **inputs)
        after = policy.core(input_ids=prompt.input_ids[None], use_cache=True, **inputs)
    seen.remove()
    length = prompt.input_ids.numel()
    assert rows == [length, 1, length], "within it one position goes through the MLP, and before and after all do"
    torch.testing.assert_close(pruned.last_hidden_state[:, -1], whole.last_hidden_state[:, -1], rtol=1e-5, atol=1e-6)
    for mine, own in zip(pruned.past_key_values.layers, whole.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, own.keys)
        assert torch.equal(mine.values, own.values)
    assert torch.equal(after.last_hidden_state, whole.last_hidden_state)


def test_an_error_inside_leaves_the_model_as_it_was(load: Load) -> None:
    policy = load()
    mlp = policy.hf_model.get_decoder().layers[-1].mlp
    with pytest.raises(RuntimeError, match="stop"), mlp_at_last_position(policy):
        raise RuntimeError("stop")
    assert not mlp._forward_hooks
    assert not mlp._forward_pre_hooks
