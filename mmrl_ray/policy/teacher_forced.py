"""What transformers itself says about given completions: its own `generate`, made to take each of their tokens.

This is the judge of the start-up comparison (`parity.py`), and so has nothing of this project's forwards in it: the
processor's outputs go in as they are, and masks, positions, token types, caches and what a model does to its logits are
`generate`'s affair. It is causal by construction: a token's logits are there before the next token is.

`N` completions of one prompt, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.prompts import PER_TOKEN


@torch.no_grad()
def generated_logprobs(policy: Policy, prompt: EncodedPrompt, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs, float32 [N, T], of completions int64 [N, T] of one prompt; its pixels are needed.

    Each completion alone, since some families' own batches change what they say (HunYuan-VL numbers pictures on through
    a batch). `temperature` and the forbidden image tokens are π's own. Raises
    whatever the model's `generate` raises.
    """
    model: Any = policy.hf_model
    accepted = _accepted(model)
    inputs = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones_like(prompt.input_ids)[None]}
    for name, value in prompt.model_inputs.items():
        if name in accepted or name not in PER_TOKEN:
            inputs[name] = value[None] if name in PER_TOKEN else value
    inputs = {n: v.to(policy.device, policy.dtype if v.is_floating_point() else None) for n, v in inputs.items()}
    settings = GenerationConfig(
        max_new_tokens=tokens.shape[1],
        do_sample=False,
        pad_token_id=policy.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
    )
    made = []
    with _own_settings(model):
        for row in tokens.tolist():
            # Not by a logits processor: Janus' `generate` drops those that it is given.
            output = model.generate(**inputs, generation_config=settings, prefix_allowed_tokens_fn=_Taken(row, prompt))
            made.append(torch.cat(output.logits))
    logits = torch.stack(made).float() / temperature
    logits[..., list(policy.image_token_ids)] = float("-inf")
    return logits.log_softmax(dim=-1).gather(-1, tokens.to(logits.device)[..., None])[..., 0]


class _Taken:
    """The one token that may come next in a row."""

    def __init__(self, tokens: list[int], prompt: EncodedPrompt) -> None:
        self._tokens, self._prompt_tokens = tokens, prompt.input_ids.numel()

    def __call__(self, row: int, seen: torch.Tensor) -> list[int]:
        return [self._tokens[seen.numel() - self._prompt_tokens]]


def _accepted(model: Any) -> set[str]:
    takes = (model.forward, model.prepare_inputs_for_generation)
    return {name for function in takes for name in inspect.signature(function).parameters}


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Without the checkpoint's generation settings: an end token or a penalty of theirs would end or change rows."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
