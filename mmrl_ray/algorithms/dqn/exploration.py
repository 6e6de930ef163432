"""How the agent tries what it does not think best: ε-greedy and Boltzmann (docs/equations.md 12 and 13), and schedules.

Pure: torch alone. `B` states, `A` actions; `valid` is bool [B, A], True for the actions that a state allows, all of
them by default. What a masked action's Q holds, NaN included, does not matter.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from mmrl_ray.losses.schedule import cosine_annealing

ScheduleName = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)


def epsilon_greedy(
    q: torch.Tensor,
    epsilon: float,
    generator: torch.Generator | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """One action a state, int64 [B]: with probability ε any valid one, each equally likely, else argmax_a Q(s, a).

    Exactly greedy at ε = 0 and exactly uniform at ε = 1; the first of equally good actions is the greedy one.

    Args:
        q: [B, A].
        epsilon: in [0, 1].
        generator: on the device of `q`; torch's global one by default.
        valid: bool [B, A].

    Raises:
        ValueError: shapes that do not fit, ε outside [0, 1], a state without a valid action, or NaN for a valid one.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon={epsilon} must be in [0, 1]")
    allowed = _allowed(q, valid)
    greedy = torch.where(allowed, q, -torch.inf).argmax(dim=1)
    # An action of value minus infinity ties with the masked ones.
    greedy = torch.where(allowed.gather(1, greedy[:, None])[:, 0], greedy, allowed.int().argmax(dim=1))
    drawn = torch.multinomial(allowed.float(), 1, generator=generator)[:, 0]
    explores = torch.rand(len(q), generator=generator, device=q.device) < epsilon
    return torch.where(explores, drawn, greedy)


def boltzmann_probabilities(q: torch.Tensor, temperature: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    """P(a given s) = exp(Q(s, a)/τ) / Σ_a' exp(Q(s, a')/τ), [B, A]; 0 for masked actions, each row sums to 1.

    Args:
        q: [B, A], finite where valid.
        temperature: τ above 0; towards 0 it becomes greedy.
        valid: bool [B, A].

    Raises:
        ValueError: shapes that do not fit, τ not above 0, a state without a valid action, or NaN for a valid one.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    allowed = _allowed(q, valid)
    best = torch.where(allowed, q, -torch.inf).amax(dim=1, keepdim=True).detach()
    # Below the best by so and so many τ: never above 0, so exp cannot overflow. In float64, where no τ rounds to 0.
    below = (q - best).double() / temperature
    return torch.where(allowed, below, -torch.inf).softmax(dim=1).to(q.dtype)


def scheduled(name: str, step: int, total_steps: int, start: float, end: float) -> float:
    """An ε or a τ after `step` of `total_steps`: from `start` down to `end`, where it stays.

    `linear`, `cosine` (docs/equations.md 8), or `constant`, which is `start` for ever.

    Raises:
        ValueError: an unknown name, a negative step, no step at all, or not 0 <= end <= start.
    """
    if step < 0 or total_steps < 1 or not 0 <= end <= start:
        raise ValueError(
            f"need 0 <= step, 1 <= total_steps and 0 <= end <= start, got step={step}, total_steps={total_steps}, "
            f"start={start}, end={end}"
        )
    if name == "constant":
        return start
    if name == "linear":
        return start + (end - start) * min(1.0, step / total_steps)
    if name == "cosine":
        return cosine_annealing(step, total_steps, start, end)
    raise ValueError(f"unknown schedule {name!r}; choose {', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}")


def _allowed(q: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """bool [B, A] with a True in each row; raises ValueError as the functions above say."""
    if q.ndim != 2 or q.shape[1] < 1 or not q.is_floating_point():
        raise ValueError(f"q must be floating-point [B, A] with at least one action, got {q.dtype} {list(q.shape)}")
    allowed = torch.ones_like(q, dtype=torch.bool) if valid is None else valid
    if allowed.shape != q.shape or allowed.dtype != torch.bool:
        raise ValueError(f"valid must be bool {list(q.shape)}, got {allowed.dtype} {list(allowed.shape)}")
    stuck = (~allowed.any(dim=1)).nonzero().flatten().tolist()
    if stuck:
        raise ValueError(f"row {stuck[0]} of valid allows no action")
    if bool((q.isnan() & allowed).any()):
        raise ValueError("the Q of a valid action is NaN")
    return allowed
