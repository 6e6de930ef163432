"""How token losses become one number: a per-token weight for each completion, over one denominator of the step.

| name            | scale of each token | denominator               | used by              |
|-----------------|---------------------|---------------------------|----------------------|
| `token_mean`    | 1                   | tokens                    | DAPO, CISPO          |
| `sequence_mean` | 1 ÷ its length      | completions               | GRPO, GSPO           |
| `sequence_sum`  | 1                   | completions               | REINFORCE, SCST, RLOO|
| `constant`      | 1                   | completions × max tokens  | Dr. GRPO             |

Lengths and denominators are those of the whole step, over all ranks and micro-batches, groups without signal included.
A completion without a reward counts nowhere: its scale is 0, and neither its tokens nor itself are in a denominator.

Sums over valid positions, and their quotient by one explicit denominator.

A mean over whatever a micro-batch or a rank happens to hold does not add up to the mean of the step; a sum over one
denominator of the whole step does. `B` completions, `T` tokens a completion; masks are bool, True counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def completion_scales(
    aggregation: str,
    lengths: torch.Tensor | Sequence[int],
    *,
    max_new_tokens: int | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Scales [N] (float64) and the denominator for N completions of `lengths` [N] tokens.

    `mask`, bool [N], names those that count, all by default; the result is that of the others left out, with 0 in
    their places.

    Raises:
        ValueError: an unknown name, no completions, a negative length, no token at all, or `constant` without
            `max_new_tokens`, or with one below the longest completion.
    """
    tokens = torch.as_tensor(lengths, dtype=torch.int64)
    if mask is not None:
        if mask.shape != tokens.shape or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool [N] = {list(tokens.shape)}, got {list(mask.shape)} {mask.dtype}")
        kept, denominator = completion_scales(aggregation, tokens[mask], max_new_tokens=max_new_tokens)
        return torch.zeros(tokens.shape, dtype=torch.float64).masked_scatter(mask, kept), denominator
    if tokens.ndim != 1 or tokens.numel() == 0 or bool((tokens < 0).any()) or int(tokens.sum()) == 0:
        raise ValueError(f"lengths must be [N], N >= 1, at least 0 and not all 0, got {tokens.tolist()}")
    ones = torch.ones(tokens.shape, dtype=torch.float64)
    count = float(tokens.numel())
    if aggregation == "token_mean":
        return ones, float(tokens.sum())
    if aggregation == "sequence_mean":
        return torch.where(tokens > 0, 1.0 / tokens.clamp(min=1).to(torch.float64), 0.0), count
    if aggregation == "sequence_sum":
        return ones, count
    if aggregation == "constant":
        if max_new_tokens is None or max_new_tokens < int(tokens.max()):
            raise ValueError(
                f"aggregation 'constant' needs max_new_tokens of at least the longest completion "
                f"({int(tokens.max())} tokens), got {max_new_tokens}"
            )
        return ones, count * max_new_tokens
    raise ValueError(f"unknown aggregation {aggregation!r}; choose token_mean, sequence_mean, sequence_sum or constant")


def masked_sum(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sum of `values` where `mask`; what is masked (NaN included) reaches neither the sum nor its gradient.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.
    """
    check_mask(values, mask)
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, *, denominator: float | torch.Tensor) -> torch.Tensor:
    """`masked_sum(values, mask) / denominator`, a scalar; the denominator is that of the whole step.

    Raises:
        ValueError: as `masked_sum`, or the denominator is not above 0.
    """
    return masked_sum(values, mask) / check_denominator(denominator)


def check_mask(values: torch.Tensor, mask: torch.Tensor) -> None:
    """Raises ValueError, with the shapes received, unless `mask` is bool and of the shape of `values`."""
    if values.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool and of the values' shape {list(values.shape)}, got {list(mask.shape)} {mask.dtype}"
        )


def check_tokens(logprobs: torch.Tensor, mask: torch.Tensor) -> None:
    """Raises ValueError, with the shapes received, unless both are [B, T] and the mask is bool."""
    if logprobs.ndim != 2:
        raise ValueError(f"logprobs must be [B, T], got {list(logprobs.shape)}")
    check_mask(logprobs, mask)


def check_denominator(denominator: float | torch.Tensor) -> float | torch.Tensor:
    """The denominator, if it is above 0 (a NaN is not); ValueError otherwise."""
    if not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}")
    return denominator
