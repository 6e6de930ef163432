"""States of captions inside a policy, and how much a caption depends on each modality (docs/equations.md 9, 11, 17).

Prompts with one caption each go through the policy once, with the language model's input embeddings caught on the way:

    [pad pad  prompt  IMAGE IMAGE …  prompt │ caption caption pad]
              text    image          text     caption

`N` prompts, `P` prompt tokens (left-padded), `T` caption tokens (right-padded), `R = P + T`, `d` embedding width. It is
an ordinary forward without a cache, so that it is right for every model, whatever path its run takes. Features that
enter further layers by themselves (Qwen3-VL's deepstack) are no input embeddings, and stay as they are.

**States** (`caption_states`) are means over tokens, float32 [N, d].

**Importance** (`modality_importance`) is I_m = ‖∂L/∂E_m‖, the Frobenius norm a sample of a loss's gradient in the
embeddings E_m [B, L_m, d] of modality m, in the embeddings' dtype. Of a policy (`caption_importance`) the loss is
L = −log π(caption | image, prompt), summed over the caption's tokens; the loss of reinforcement learning would be 0
where the advantage is. E_m are the language model's input embeddings of image and prompt, made leaves; those of the
caption's own words are not counted as a modality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import IMAGE, MODALITIES, CaptionState, EncodedPrompt, VisionFeatures
from mmrl_ray.policy.logits import token_logprobs
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.collate import pad_prompts, row_arguments, vision_arguments

BATCH = 16
"""Rows that go through the model together."""

Exchange = Callable[[torch.Tensor], torch.Tensor]
"""Sees the input embeddings [N, R, d] and gives those to go on with."""
Embeddings = Mapping[str, torch.Tensor]
"""By modality, [B, L_m, d]; what the loss was computed of, with gradient."""


@torch.no_grad()
def caption_states(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    captions: Sequence[torch.Tensor],
) -> list[CaptionState]:
    """The state of each caption, in order, on the CPU.

    Args:
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
    width = batch.input_ids.shape[1]
    with vision_arguments(policy, prompts, features) as vision, _exchanged(policy, exchange):
        output = policy.core(**row_arguments(policy, batch, targets, mask), use_cache=False, **vision)
    return Rows(output.last_hidden_state[:, width - 1 : -1], policy.place(targets), policy.place(mask))


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


def token_importance(
    loss: torch.Tensor, embeddings: Embeddings, *, retain_graph: bool = False
) -> dict[str, torch.Tensor]:
    """‖∂L/∂E_m‖ of every single token: [B, L_m] for each modality; 0 for a modality that the loss does not touch.

    No `.grad` is written.

    Args:
        loss: a scalar, the sum over samples that do not see each other.
        embeddings: leaves (or any tensors) that `loss` was computed of.
        retain_graph: `loss` is asked for further gradients.

    Raises:
        ValueError: `loss` is no scalar with gradient, there is no modality, or an embedding is not [B, L_m, d] with
            gradient and of one B with the others.
    """
    _check(loss, embeddings)
    gradients = torch.autograd.grad(loss, list(embeddings.values()), retain_graph=retain_graph, allow_unused=True)
    return {
        name: each.new_zeros(each.shape[:2]) if gradient is None else torch.linalg.vector_norm(gradient, dim=-1)
        for (name, each), gradient in zip(embeddings.items(), gradients, strict=True)
    }


def modality_importance(loss: torch.Tensor, embeddings: Embeddings) -> dict[str, torch.Tensor]:
    """I_m, [B] for each modality; raises as `token_importance`. Padding that the loss does not see adds nothing."""
    return {name: torch.linalg.vector_norm(each, dim=-1) for name, each in token_importance(loss, embeddings).items()}


def importance_share(importance: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """I_m ÷ ΣI, [B] for each modality; nan where all are 0. A share grows with a modality's number of tokens."""
    if not importance:
        raise ValueError("a share needs one modality or more, got none")
    shapes = {name: list(each.shape) for name, each in importance.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"importances of the same samples have one shape [B], got {shapes}")
    total = torch.stack(list(importance.values())).sum(dim=0)
    return {name: torch.where(total > 0, each / total, torch.nan) for name, each in importance.items()}


def importance_rms(importance: Mapping[str, torch.Tensor], embeddings: Embeddings) -> dict[str, torch.Tensor]:
    """I_m ÷ √(L_m d), [B] for each modality: the same for a modality whatever the number of its tokens."""
    rms = {}
    for name, each in importance.items():
        _, tokens, width = embeddings[name].shape
        rms[name] = each / math.sqrt(tokens * width) if tokens * width else torch.full_like(each, torch.nan)
    return rms


def _check(loss: torch.Tensor, embeddings: Embeddings) -> None:
    if loss.ndim != 0 or not loss.requires_grad:
        raise ValueError(f"importance needs a scalar loss with gradient, got shape {list(loss.shape)}")
    shapes = {name: list(each.shape) for name, each in embeddings.items()}
    if not shapes or any(len(shape) != 3 for shape in shapes.values()) or len({s[0] for s in shapes.values()}) > 1:
        raise ValueError(f"embeddings are [B, L, d] of one B, for one modality or more; got {shapes}")
    fixed = [name for name, each in embeddings.items() if not each.requires_grad]
    if fixed:
        raise ValueError(f"embeddings of {', '.join(fixed)} carry no gradient; got {shapes}")


@dataclass(frozen=True, slots=True)
class Importance:
    """What one caption hangs on."""

    loss: float
    """−log π of the caption, nats."""
    share: Mapping[str, float]
    """I_m ÷ ΣI; nan where all are 0."""
    rms: Mapping[str, float]
    """I_m ÷ √(L_m d), nats a unit of embedding: comparable between modalities of different numbers of tokens."""
    image_tokens: torch.Tensor | None
    """float32 [L_image]: of each image token, in the order of the prompt, on the CPU; when asked for."""


def caption_importance(
    policy: Policy,
    prompt: EncodedPrompt,
    features: VisionFeatures | None,
    caption: torch.Tensor,
    *,
    temperature: float = 1.0,
    by_token: bool = False,
) -> Importance:
    """One forward and backward pass of one prompt with one caption. Parameters get no gradient.

    Args:
        prompt: with pixels where `features` is None.
        features: from `vision_features`, or None to run the vision tower inside.
        caption: int64 [T], one token or more.
        temperature: π's.
        by_token: also of each image token, by a second backward pass.

    Raises:
        ValueError: the caption has no token.
        ModelError: the model does not hand embeddings to its language model.
    """
    where = places(policy, [prompt], [caption])
    columns = {name: getattr(where, name)[0].nonzero()[:, 0] for name in MODALITIES}
    leaves: dict[str, torch.Tensor] = {}

    def make_leaves(embeddings: torch.Tensor) -> torch.Tensor:
        embeddings = embeddings.detach()
        for name, index in columns.items():
            leaves[name] = embeddings[:, index].clone().requires_grad_(True)
            embeddings = embeddings.index_copy(1, index, leaves[name])
        return embeddings

    with torch.enable_grad():
        rows = forward_rows(policy, [prompt], None if features is None else [features], [caption], make_leaves)
        logprobs, _ = token_logprobs(
            rows.hidden[rows.mask],
            rows.targets[rows.mask],
            head=policy.logits,
            forbidden=policy.image_token_ids,
            temperature=temperature,
            vocab_size=policy.vocab_size,
        )
        loss = -logprobs.sum()
        tokens = token_importance(loss, {IMAGE: leaves[IMAGE]}, retain_graph=True)[IMAGE][0] if by_token else None
        whole = modality_importance(loss, leaves)
    return Importance(
        loss=float(loss.detach()),
        share={name: float(each) for name, each in importance_share(whole).items()},
        rms={name: float(each) for name, each in importance_rms(whole, leaves).items()},
        image_tokens=None if tokens is None else tokens.float().cpu(),
    )
