"""What a model takes for every token of a row, against its own generation loop: two-way pictures, experts by type.

Models of a config alone, whose vision features are made up, so that no processor is needed.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.logits import takes_bare_head
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import injected
from tests.unit.policy.test_logits import assert_close, tiny

PICTURE = 7
ADAPTER = {
    "vision_feature_layer": [0],
    "hidden_size": 32,
    "text_hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
MODELS: dict[str, dict[str, Any]] = {
    # A picture's tokens see each other both ways, in some layers within a window that is shorter than the prompt.
    "gemma4": {
        "text": {
            "use_bidirectional_attention": "vision",
            "vocab_size_per_layer_input": 61,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "audio_config": None,
    },
    # All pictures' tokens see each other both ways.
    "molmo2": {"vision": {"image_size": [32, 32]}, "adapter_config": ADAPTER, "image_patch_id": PICTURE},
    # Experts of their own for a picture's tokens and for the marks around them.
    "ernie4_5_vl_moe": {"text": {"rope_parameters": ROPE}, "vision": {"depth": 1, "num_heads": 4}},
}


def policy_of(model: PreTrainedModel, kind: str) -> Policy:
    return Policy(
        model=model.requires_grad_(False),
        processor=None,
        tokenizer=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
        placeholder_id=PICTURE,
        image_token_ids=(PICTURE,),
        eos_token_ids=(2,),
        end_id=2,
        pad_token_id=0,
        reserved_texts=(),
        context_length=128,
        revision_key="",
        path=kind,
        bare_head=takes_bare_head(model, kind),
    )


def prompt(before: int, after: int) -> EncodedPrompt:
    """Words, a picture of six tokens behind a mark, words."""
    ids = torch.tensor([*range(20, 20 + before), *[PICTURE] * 6, *range(40, 40 + after)])
    types = (ids == PICTURE).long()
    marked = types.clone()
    marked[before - 1] = 1
    grid = torch.tensor([[1, 4, 6]])
    return EncodedPrompt(
        ids, {"mm_token_type_ids": types, "moe_mm_token_type_ids": marked, "image_grid_thw": grid}, str(before)
    )


@torch.no_grad()
def stepped(policy: Policy, prompt: EncodedPrompt, features: VisionFeatures, completion: torch.Tensor) -> torch.Tensor:
    """float64 [T]: by the functions that `generate` calls on the model before each step and after it."""
    model: Any = policy.hf_model
    named = inspect.signature(model.forward).parameters
    given = {n: v[None] if "type" in n else v for n, v in prompt.model_inputs.items() if n in named}
    ids = prompt.input_ids[None]
    kept: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": True, **given}
    kept["position_ids"] = model._prepare_position_ids_for_generation(ids, dict(kept))
    logits = []
    with injected(policy, [features]) as pixels:
        for i, token in enumerate(completion):
            inputs = model.prepare_inputs_for_generation(
                ids,
                next_sequence_length=None if i == 0 else 1,
                is_first_iteration=i == 0,
                **kept,
                **(pixels if i == 0 else {}),
            )
            output = model(**inputs, return_dict=True)
            logits.append(output.logits[:, -1].double().index_fill(1, torch.tensor([PICTURE]), -torch.inf))
            kept = model._update_model_kwargs_for_generation(output, kept, is_encoder_decoder=False)
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return torch.cat(logits).log_softmax(dim=-1).gather(1, completion[:, None])[:, 0]


@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_of_every_path_are_those_of_the_models_own_loop(kind: str) -> None:
    facts = {"image_token_id": PICTURE, **MODELS[kind]}
    policy = policy_of(tiny(kind, torch.float32, facts), kind)
    prompts = [prompt(3, 4), prompt(5, 6)]
    features = [VisionFeatures(each) for each in torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))]
    completions = [[torch.tensor([50, 51, 52]), torch.tensor([30, 31, 32, 33, 34])], [torch.tensor([45, 46, 47, 48])]]
    expected = torch.cat(
        [stepped(policy, p, f, c) for p, f, group in zip(prompts, features, completions, strict=True) for c in group]
    )
    for path in ("naive", "shared_prefix", "packed"):
        scores = score_completions(policy, prompts, features, completions, 1.0, path=path)  # type: ignore[arg-type]
        assert_close(scores.logprobs[scores.mask], expected, path)
