"""What a policy's captions and their samples look like from inside: means over tokens, for docs/equations.md 11, 17.

`N` captions, `R` tokens a row, `d` width.

Prompts with one caption each through the policy, with the language model's input embeddings caught on the way.

`N` prompts, `P` prompt tokens (left-padded), `T` caption tokens (right-padded), `R = P + T`, `d` width.

    [pad pad  prompt  IMAGE IMAGE …  prompt │ caption caption pad]
              text    image          text     caption

One ordinary forward without a cache, so that it is right for every model whatever path its run takes. Features that
enter further layers by themselves (Qwen3-VL's deepstack) are no input embeddings, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import CaptionState, EncodedPrompt, VisionFeatures
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.collate import pad_prompts, row_arguments, vision_arguments

BATCH = 16
"""Rows that go through the model together."""
IMAGE, TEXT = "image", "text"
MODALITIES = (IMAGE, TEXT)
"""What a caption is an answer to: the picture's tokens, and those of the prompt around them."""

Exchange = Callable[[torch.Tensor], torch.Tensor]
"""Sees the input embeddings [N, R, d] and gives those to go on with."""


@torch.no_grad()
def caption_states(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    captions: Sequence[torch.Tensor],
) -> list[CaptionState]:
    """The state of each caption, in order, on the CPU.

    Args:
        policy: the model.
        prompts: N of them.
        features: N from `vision_features`, or None to run the vision tower inside.
        captions: N of int64 [T], one token or more each.

    Raises:
        ValueError, ModelError: of `forward_rows`.
    """
    states: list[CaptionState] = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        states += _batch(policy, prompts[part], None if features is None else features[part], captions[part])
    return states


def _batch(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    captions: Sequence[torch.Tensor],
) -> list[CaptionState]:
    caught: list[torch.Tensor] = []

    def catch(embeddings: torch.Tensor) -> torch.Tensor:
        caught.append(embeddings)
        return embeddings

    rows = forward_rows(policy, prompts, features, captions, catch)
    (embeddings,) = caught
    where = places(policy, prompts, captions)
    said = where.caption.clone()
    said[:, -rows.mask.shape[1] :] &= _words(policy, rows.targets, rows.mask)
    return [
        CaptionState(
            action=_mean(embeddings[i], said[i]),
            modalities={name: _mean(embeddings[i], getattr(where, name)[i]) for name in MODALITIES},
            hidden=_mean(rows.hidden[i], rows.mask[i]),
        )
        for i in range(len(prompts))
    ]


def _words(policy: Policy, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """bool [N, T]: what a caption says, without the end of the turn: with it, a mean would also measure the length.

    A caption of nothing else keeps it.
    """
    ends = torch.tensor(policy.eos_token_ids, device=targets.device)
    words = mask & ~torch.isin(targets, ends)
    return torch.where(words.any(dim=1, keepdim=True), words, mask)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """float32 [d]: of the rows of [·, d] where the mask is True. Equal tokens give equal means in any batch."""
    return values[mask].float().mean(dim=0).cpu()


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows after their pass."""

    hidden: torch.Tensor
    """[N, T, d]: the last hidden states that predict the caption's tokens."""
    targets: torch.Tensor
    """int64 [N, T]."""
    mask: torch.Tensor
    """bool [N, T], True at caption tokens."""


@dataclass(frozen=True, slots=True)
class Places:
    """Whose token stands where; bool [N, R] each."""

    image: torch.Tensor
    text: torch.Tensor
    caption: torch.Tensor


def places(policy: Policy, prompts: Sequence[EncodedPrompt], captions: Sequence[torch.Tensor]) -> Places:
    """Where each modality's tokens, and the caption's, lie in the rows that `forward_rows` makes."""
    width = max(prompt.input_ids.numel() for prompt in prompts)
    length = max(caption.numel() for caption in captions)
    image, text, caption_at = (torch.zeros(len(prompts), width + length, dtype=torch.bool) for _ in range(3))
    for i, (prompt, caption) in enumerate(zip(prompts, captions, strict=True)):
        begin = width - prompt.input_ids.numel()
        is_image = prompt.input_ids == policy.placeholder_id
        image[i, begin:width] = is_image
        text[i, begin:width] = ~is_image
        caption_at[i, width : width + caption.numel()] = True
    return Places(*(each.to(policy.device) for each in (image, text, caption_at)))


def forward_rows(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    captions: Sequence[torch.Tensor],
    exchange: Exchange,
) -> Rows:
    """One pass of N rows; `exchange` is called once, with the embeddings that enter the language model.

    Args:
        policy: the model.
        prompts: N of them.
        features: N from `vision_features`, or None to run the vision tower inside.
        captions: N of int64 [T], one token or more each.
        exchange: see there.

    Raises:
        ValueError: the numbers differ, or a caption has no token.
        ModelError: the model does not hand embeddings to its language model.
    """
    if len(captions) != len(prompts) or not prompts or any(caption.numel() == 0 for caption in captions):
        lengths = [caption.numel() for caption in captions]
        raise ValueError(f"one caption of a token or more for each of {len(prompts)} prompts, got lengths {lengths}")
    batch = pad_prompts(policy, prompts)
    targets = nn.utils.rnn.pad_sequence(list(captions), batch_first=True, padding_value=policy.pad_token_id)
    mask = torch.arange(targets.shape[1]) < torch.tensor([caption.numel() for caption in captions])[:, None]
    targets, mask = targets.to(policy.device), mask.to(policy.device)
    width = batch.input_ids.shape[1]
    with vision_arguments(policy, prompts, features) as vision, _exchanged(policy, exchange):
        output = policy.core(**row_arguments(policy, batch, targets, mask), use_cache=False, **vision)
    return Rows(output.last_hidden_state[:, width - 1 : -1], targets, mask)


@contextmanager
def _exchanged(policy: Policy, exchange: Exchange) -> Iterator[None]:
    """Whatever else changes the embeddings on their way into the layers comes after, and counts as the policy's."""
    calls: list[bool] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None or calls:
            return None
        calls.append(True)
        return args, {**kwargs, "inputs_embeds": exchange(embeddings)}

    handle = policy.decoder.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise ModelError(
            f"{policy.path}: {type(policy.decoder).__name__} is not given embeddings, so its modalities cannot be told"
        )
