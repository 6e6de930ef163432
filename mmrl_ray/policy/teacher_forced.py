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
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.prompts import PER_TOKEN


class _Take(LogitsProcessor):
    """Leaves of the logits the one token that comes next in each row."""

    def __init__(self, tokens: torch.Tensor, prompt_tokens: int) -> None:
        self._tokens, self._prompt_tokens = tokens, prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        following = self._tokens[:, input_ids.shape[1] - self._prompt_tokens]
        return torch.full_like(scores, float("-inf")).scatter(1, following[:, None], 0.0)


@torch.no_grad()
def generated_logprobs(policy: Policy, prompt: EncodedPrompt, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs, float32 [N, T], of completions int64 [N, T] of one prompt; its pixels are needed.

    `temperature` and the forbidden image tokens are π's own (DESIGN: the arithmetic of a step). Raises whatever the
    model's `generate` raises.
    """
    count, length = tokens.shape
    device = policy.device
    model: Any = policy.hf_model
    tokens = tokens.to(device)
    inputs = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones_like(prompt.input_ids)[None]}
    for name, value in prompt.model_inputs.items():
        inputs[name] = value[None] if name in PER_TOKEN else value
    accepted = _accepted(model)
    # The batch that the processor makes of N equal prompts: rows, pictures and tiles follow each other.
    batch = {n: torch.cat([v.to(device)] * count) for n, v in inputs.items() if n in accepted or n not in PER_TOKEN}
    batch = {n: v.to(policy.dtype) if v.is_floating_point() else v for n, v in batch.items()}
    settings = GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=policy.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
    )
    with _own_settings(model):
        output = model.generate(
            **batch,
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Take(tokens, prompt.input_ids.numel())]),
        )
    logits = torch.stack(output.logits, dim=1).float() / temperature
    logits[..., list(policy.image_token_ids)] = float("-inf")
    return logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]


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
