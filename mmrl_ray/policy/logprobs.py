"""Log-probs of chosen tokens under π: float32, at the rollout temperature, with image tokens forbidden.

`M` tokens, `d` hidden width, `V` vocabulary. A vocabulary of 150 k makes [M, V] the largest tensor of a step, so rows
go through in chunks whose logits are made again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 26
"""Logits one chunk holds at most (256 MiB in float32)."""


def policy_logits(logits: torch.Tensor, forbidden: Sequence[int], temperature: float) -> torch.Tensor:
    """float32 [.., V]: what π's softmax is taken of.

    The one definition for sampler, reference and learner: float32, then divided by the temperature, then minus
    infinity at `forbidden` token ids.
    """
    scaled = logits.float() / temperature
    if forbidden:
        index = torch.tensor(forbidden, dtype=torch.int64, device=logits.device)
        scaled = scaled.index_fill(-1, index, float("-inf"))
    return scaled


def token_logprobs(
    rows: torch.Tensor,
    targets: torch.Tensor,
    *,
    head: Callable[[torch.Tensor], torch.Tensor],
    forbidden: Sequence[int],
    temperature: float,
    entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob of each target, float32 [M], and the entropy of each row's distribution, float32 [M], when asked for.

    Args:
        rows: [M, d], what `head` turns into logits.
        targets: int64 [M].
        head: [m, d] → [m, V].
        forbidden: token ids outside the support of π.
        temperature: above 0.
        entropy: also return entropies; they carry no gradient.
        chunk_elements: logits held at once.
        vocab_size: V, when known; else all rows make one chunk.
    """
    size = max(1, chunk_elements // vocab_size) if vocab_size else max(1, rows.shape[0])
    parts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for start in range(0, rows.shape[0], size):
        arguments = (rows[start : start + size], targets[start : start + size], head, forbidden, temperature, entropy)
        if rows.shape[0] > size and torch.is_grad_enabled():
            parts.append(checkpoint(_chunk, *arguments, use_reentrant=False))
        else:
            parts.append(_chunk(*arguments))
    if not parts:
        nothing = rows.new_zeros(0, dtype=torch.float32)
        return nothing, nothing if entropy else None
    logprobs = torch.cat([logprob for logprob, _ in parts])
    return logprobs, torch.cat([e for _, e in parts if e is not None]) if entropy else None


def _chunk(
    rows: torch.Tensor,
    targets: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    forbidden: Sequence[int],
    temperature: float,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    logits = policy_logits(head(rows), forbidden, temperature)
    normalizer = logits.logsumexp(dim=-1)
    chosen = logits.gather(-1, targets[:, None])[:, 0] - normalizer
    if not entropy:
        return chosen, None
    with torch.no_grad():
        logprobs = logits - normalizer[:, None]
        # 0 · (−inf) is 0 here: a forbidden token adds nothing.
        return chosen, -(logprobs.exp() * logprobs.masked_fill(logprobs == float("-inf"), 0.0)).sum(dim=-1)
