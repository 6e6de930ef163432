"""The last layer at the last position only: that position and every key and value stay what they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.prefix import last_layer_at_last_position
from tests.support.tiny_models import make_samples

Load = Callable[..., Policy]


def test_keys_values_and_the_last_position_are_the_models_own(load: Load) -> None:
    policy = load()
    prompt = encode_prompts(policy, make_samples()[:1])[0]
    inputs = {name: value for name, value in prompt.model_inputs.items() if name != "mm_token_type_ids"}
    layer = policy.hf_model.get_decoder().layers[-1]
    watched = {"gate": layer.mlp.gate_proj, **{name: getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"}}
    rows: dict[str, list[int]] = {name: [] for name in watched}
    # Hooks run in the order they were put on: these see what the modules made, before anything is padded to it.
    seen = [
        module.register_forward_hook(lambda module, args, made, name=name: rows[name].append(made.shape[1]))
        for name, module in watched.items()
    ]
    with torch.no_grad():
        whole = policy.core(input_ids=prompt.input_ids[None], use_cache=True, **inputs)
        with last_layer_at_last_position(policy):
            pruned = policy.core(input_ids=prompt.input_ids[None], use_cache=True, **inputs)
        after = policy.core(input_ids=prompt.input_ids[None], use_cache=True, **inputs)
    for hook in seen:
        hook.remove()
    length = prompt.input_ids.numel()
    pruned_rows, all_rows = [length, 1, length], [length, length, length]
    expected = {"gate": pruned_rows, "q": pruned_rows, "o": pruned_rows, "k": all_rows, "v": all_rows}
    assert rows == expected, "within it the last position alone, but for keys and values; before and after all of them"
    torch.testing.assert_close(pruned.last_hidden_state[:, -1], whole.last_hidden_state[:, -1], rtol=1e-5, atol=1e-6)
    for mine, own in zip(pruned.past_key_values.layers, whole.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, own.keys)
        assert torch.equal(mine.values, own.values)
    assert torch.equal(after.last_hidden_state, whole.last_hidden_state)


def test_an_error_inside_leaves_the_model_as_it_was(load: Load) -> None:
    policy = load()
    with pytest.raises(RuntimeError, match="stop"), last_layer_at_last_position(policy):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in policy.hf_model.get_decoder().layers[-1].modules())
