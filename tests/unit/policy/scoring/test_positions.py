"""Positions against those that transformers' own `generate` hands to the rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import PER_TOKEN, encode_prompts
from mmrl_ray.policy.scoring.collate import completion_positions, pad_prompts
from tests.support.tiny_models import make_samples

Load = Callable[..., Policy]
TOKENS = 3


def generated_positions(policy: Policy, prompt: EncodedPrompt) -> torch.Tensor:
    """int64 [A, P + T - 1]: of the prompt and of the tokens that `generate` puts behind it."""
    seen: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    hook = policy.decoder.get_submodule("rotary_emb").register_forward_pre_hook(note, with_kwargs=True)
    ids = prompt.input_ids[None]
    inputs = {name: value[None] if name in PER_TOKEN else value for name, value in prompt.model_inputs.items()}
    with hook:
        policy.hf_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            **inputs,
        )
    return torch.cat([positions[:, 0] for positions in seen], dim=-1)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_5", "glm4v", "paddleocr_vl", "hunyuan_vl"])
def test_positions_in_a_padded_batch_are_those_of_generate_alone(family: str, load: Load) -> None:
    policy = load(family)
    prompts = encode_prompts(policy, make_samples())
    batch = pad_prompts(policy, prompts)
    behind = completion_positions(policy, batch.next_position, TOKENS - 1)
    assert not batch.attention_mask.all(), "the batch is padded"
    for i, prompt in enumerate(prompts):
        own = batch.position_ids[:, i, batch.attention_mask[i].bool()]
        assert torch.equal(torch.cat([own, behind[:, i]], dim=-1), generated_positions(policy, prompt))
