"""Learning-rate schedule: cosine annealing after a linear warm-up (docs/equations.md 8)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def cosine_annealing(step: int, total_steps: int, lr_max: float, lr_min: float, warmup_steps: int = 0) -> float:
    """The learning rate of optimiser step `step`, counted from 0.

    Warm-up: lr_max · step ÷ warmup_steps for the first `warmup_steps` steps (so the very first is 0). Then
    η_min + ½(η_max − η_min)(1 + cos(tπ/T)) with t = step − warmup_steps and T = total_steps − warmup_steps, and η_min
    from `total_steps` on.

    Raises:
        ValueError: warmup_steps is not in [0, total_steps), step is negative, or lr_min is not in [0, lr_max].
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} must be at least 0 and below total_steps={total_steps}")
    if step < 0 or not 0 <= lr_min <= lr_max:
        raise ValueError(f"need step >= 0 and 0 <= lr_min <= lr_max, got step={step}, lr_min={lr_min}, lr_max={lr_max}")
    if step < warmup_steps:
        return lr_max * step / warmup_steps
    if step >= total_steps:
        return lr_min
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return lr_min + 0.5 * (lr_max - lr_min) * (1.0 + math.cos(math.pi * progress))


def cosine_scheduler(
    optimizer: torch.optim.Optimizer, *, total_steps: int, lr_min: float = 0.0, warmup_steps: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Torch's own scheduler following `cosine_annealing`; each parameter group's `lr` is its lr_max.

    Call `.step()` once after each optimiser step. Make it before loading the optimiser's state, which holds the
    current rate; the scheduler's `state_dict()` is then all that a resumed run needs.

    Raises:
        ValueError: as `cosine_annealing`, or a group's learning rate is 0.
    """
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    if not all(peak > 0 for peak in peaks):
        raise ValueError(f"every parameter group needs a learning rate above 0, got {peaks}")
    cosine_annealing(0, total_steps, min(peaks), lr_min, warmup_steps)  # complains now rather than at a later step
    factors = [_factor(peak, total_steps, lr_min, warmup_steps) for peak in peaks]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def _factor(peak: float, total_steps: int, lr_min: float, warmup_steps: int) -> Callable[[int], float]:
    # A plain function: torch leaves those out of state_dict(), so that a checkpoint holds numbers only.
    def factor(step: int) -> float:
        return cosine_annealing(step, total_steps, peak, lr_min, warmup_steps) / peak

    return factor
