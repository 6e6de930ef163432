"""Implicit Q-learning against its formula in float64 NumPy, token by token; the expectile against its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.losses.ilql import IlqlStats, TokenValues, expectile_loss, ilql_loss, token_targets

Case = dict[str, np.ndarray]


def case(seed: int, rows: int, tokens: int) -> Case:
    rng = np.random.default_rng(seed)
    shape = (rows, tokens)
    return {
        "q": rng.normal(size=(2, *shape)),
        "conservative": rng.exponential(size=(2, *shape)),
        "target_q": rng.normal(size=(2, *shape)),
        "v": rng.normal(size=shape),
        "logprobs": -rng.exponential(size=shape),
        "rewards": rng.normal(size=rows),
        "scales": rng.uniform(0.1, 1.0, rows),
        "mask": np.arange(tokens) < rng.integers(1, tokens + 1, rows)[:, None],
    }


def oracle(c: Case, gamma: float, tau: float, alpha: float, w: float) -> float:
    """Completion by completion and token by token, with a case for each sign of the advantage."""
    total = 0.0
    for i, mask in enumerate(c["mask"]):
        length = int(mask.sum())
        for t in range(length):
            y = c["rewards"][i] if t == length - 1 else gamma * c["v"][i, t + 1]
            u = min(c["target_q"][0, i, t], c["target_q"][1, i, t]) - c["v"][i, t]
            token = (c["q"][0, i, t] - y) ** 2 + (c["q"][1, i, t] - y) ** 2
            token += tau * u * u if u > 0 else (1 - tau) * u * u
            token += alpha * (c["conservative"][0, i, t] + c["conservative"][1, i, t])
            total += c["scales"][i] * (token - w * c["logprobs"][i, t])
    return total


def tensors(c: Case, names: Sequence[str] = ("q", "conservative", "target_q", "v", "logprobs")) -> dict[str, Any]:
    """What is padded may be anything."""
    return {name: torch.from_numpy(np.where(c["mask"], c[name], np.nan)).requires_grad_() for name in names}


def run(c: Case, t: dict[str, Any] | None = None, *, denominator: float = 7.0, **keys: Any):
    t = tensors(c) if t is None else t
    return ilql_loss(
        TokenValues(t["q"], t["conservative"], t["target_q"], t["v"]),
        t["logprobs"],
        torch.from_numpy(c["rewards"]),
        torch.from_numpy(c["mask"]),
        scales=torch.from_numpy(c["scales"]),
        denominator=denominator,
        **{"gamma": 0.9, "expectile": 0.7, "conservative_weight": 0.1, "bc_weight": 0.5, **keys},
    )


@settings(deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 5),
    st.integers(1, 6),
    st.floats(0, 1),
    st.floats(0.01, 0.99),
    st.floats(0, 2),
    st.floats(0, 2),
)
def test_loss_equals_the_formula(
    seed: int, rows: int, tokens: int, gamma: float, tau: float, alpha: float, w: float
) -> None:
    c = case(seed, rows, tokens)
    found = run(c, gamma=gamma, expectile=tau, conservative_weight=alpha, bc_weight=w)
    np.testing.assert_allclose(found.loss.item(), oracle(c, gamma, tau, alpha, w) / 7.0, rtol=1e-9, atol=1e-12)


def test_literal_values() -> None:
    c: Case = {
        "q": np.array([[[0.5, 1.0]], [[0.0, 2.0]]]),
        "conservative": np.array([[[1.0, 2.0]], [[3.0, 4.0]]]),
        "target_q": np.array([[[0.25, 1.0]], [[0.75, 0.5]]]),
        "v": np.array([[0.5, 0.25]]),
        "logprobs": np.array([[-1.0, -2.0]]),
        "rewards": np.array([1.5]),
        "scales": np.array([1.0]),
        "mask": np.array([[True, True]]),
    }
    # γ = ½: targets ⅛ and 1.5. TD: 0.375² + 0.125² + 0.5² + 0.5² = 0.65625. u = −¼ and ¼; τ = 0.8: (0.2 + 0.8)/16.
    # α = 0.1 of 10, w = 2 of 3.
    found = run(c, gamma=0.5, expectile=0.8, conservative_weight=0.1, bc_weight=2.0, denominator=2.0)
    assert found.loss.item() == pytest.approx((0.65625 + 0.0625 + 1.0 + 6.0) / 2, rel=1e-12)
    metrics = found.stats.metrics()
    assert metrics["ilql/td"] == pytest.approx(0.65625 / 4)
    assert metrics["ilql/q"] == pytest.approx(0.375)
    assert metrics["ilql/v"] == pytest.approx(0.375)
    assert metrics["ilql/conservative"] == pytest.approx(2.5)
    assert metrics["ilql/nll"] == pytest.approx(1.5)


def test_gradient_leaves_targets_alone_and_is_that_of_the_formula() -> None:
    c = case(3, 3, 4)
    t = tensors(c)
    run(c, t).loss.backward()
    assert t["target_q"].grad is None
    step = 1e-6
    for name in ("q", "v", "conservative", "logprobs"):
        for place in np.argwhere(np.broadcast_to(c["mask"], c[name].shape))[:5]:
            sides = []
            for sign in (1, -1):
                moved = {**c, name: c[name].copy()}
                moved[name][tuple(place)] += sign * step
                # V of the next state is a target: it stands still.
                targets = token_targets(
                    torch.from_numpy(c["v"]), *map(torch.from_numpy, (c["rewards"], c["mask"])), 0.9
                )
                y = targets.numpy()
                u = moved["target_q"].min(axis=0) - moved["v"]
                token = ((moved["q"] - y) ** 2).sum(0) + np.where(u < 0, 0.3, 0.7) * u**2
                token = token + 0.1 * moved["conservative"].sum(0) - 0.5 * moved["logprobs"]
                sides.append((np.where(c["mask"], token, 0.0).sum(1) * c["scales"]).sum() / 7.0)
            assert t[name].grad[tuple(place)].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-7)
        assert bool((t[name].grad[..., ~torch.from_numpy(c["mask"])] == 0).all()), "padding got a gradient"


def test_shares_add_up_to_the_step() -> None:
    c = case(5, 6, 5)
    whole = run(c)
    parts = [run({k: v[:, rows] if v.ndim == 3 else v[rows] for k, v in c.items()}) for rows in (slice(2), slice(2, 6))]
    assert sum(p.loss.item() for p in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    added = parts[0].stats + parts[1].stats
    assert torch.allclose(added.to_tensor(), whole.stats.to_tensor())
    assert IlqlStats.from_tensor(added.to_tensor()).metrics() == pytest.approx(whole.stats.metrics())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.1, 0.5, 0.7, 0.9, 0.99]))
def test_the_minimum_is_the_expectile(seed: int, tau: float) -> None:
    """Newey & Powell 1987: e with τ·E[(x − e)₊] = (1 − τ)·E[(e − x)₊]."""
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=50))
    e = x.mean()
    for _ in range(300):  # asymmetric least squares
        weight = tau + (1 - 2 * tau) * (x < e).double()
        e = (weight * x).sum() / weight.sum()
    e.requires_grad_()
    (gradient,) = torch.autograd.grad(expectile_loss(x - e, tau).sum(), e)
    assert abs(gradient.item()) < 1e-9
    assert tau * (x - e).clamp(min=0).sum().item() == pytest.approx((1 - tau) * (e - x).clamp(min=0).sum().item())


def test_half_is_half_the_square() -> None:
    u = torch.tensor([-2.0, 0.0, 3.0])
    assert expectile_loss(u, 0.5).tolist() == [2.0, 0.0, 4.5]
    assert expectile_loss(u, 0.9).tolist() == pytest.approx([0.4, 0.0, 8.1])


@pytest.mark.parametrize(
    ("change", "keys", "reason"),
    [
        ({}, {"expectile": 1.0}, "expectile=1.0"),
        ({}, {"gamma": 1.5}, "gamma=1.5"),
        ({}, {"conservative_weight": -1.0}, "conservative_weight=-1.0"),
        ({}, {"denominator": 0.0}, "denominator"),
        ({"mask": np.array([[True, False, True]] * 2)}, {}, "one after the other"),
        ({"mask": np.array([[False, False, False], [True] * 3])}, {}, "one after the other"),
        ({"rewards": np.zeros(3)}, {}, "rewards"),
    ],
)
def test_what_does_not_fit_is_refused(change: Case, keys: dict[str, float], reason: str) -> None:
    c = {**case(0, 2, 3), "mask": np.ones((2, 3), dtype=bool)}
    t = tensors(c)
    with pytest.raises(ValueError, match=reason):
        run({**c, **change}, t, **keys)
    with pytest.raises(ValueError, match="q must be"):
        run(c, {**t, "q": t["q"][0]})


# -- a small decision problem with known values ---------------------------------------------------------------------


def test_values_of_a_small_problem_are_those_of_its_best_continuations() -> None:
    """Two words, each 0, 1 or 2: the heads, as tables, learn the in-sample maximum (τ → 1), and at τ = ½ the mean.

    Rewards by (first, second); (2, 2) would be the best, but nobody ever said it.
    """
    earned = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.4, (1, 1): 0.5, (2, 0): 0.2, (2, 1): 0.3}
    firsts = torch.tensor([first for first, _ in earned])
    words = torch.tensor(list(earned))
    rewards = torch.tensor(list(earned.values()), dtype=torch.float64)
    for tau, expected in ((0.5, (0.5, 0.45, 0.25)), (0.999, (1.0, 0.5, 0.3))):
        gamma = 0.5
        q = torch.zeros(2, 4, 3, dtype=torch.float64, requires_grad=True)  # states: the start, then after each word
        v = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        target = torch.zeros_like(q)
        states = torch.stack([torch.zeros_like(firsts), 1 + firsts], dim=1)  # [B, T]
        rows = words[None, ..., None].expand(2, -1, -1, 1)
        optimizer = torch.optim.Adam([q, v], lr=0.08)
        for step in range(700):
            if step == 500:
                optimizer.param_groups[0]["lr"] = 0.004
            taken = q[:, states, words]
            found = ilql_loss(
                TokenValues(
                    taken,
                    -q[:, states].log_softmax(-1).gather(-1, rows)[..., 0],
                    target[:, states, words],
                    v[states],
                ),
                torch.zeros_like(words, dtype=torch.float64),
                rewards,
                torch.ones_like(words, dtype=torch.bool),
                scales=torch.ones(6, dtype=torch.float64),
                denominator=12.0,
                gamma=gamma,
                expectile=tau,
                conservative_weight=0.0,
            )
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
            target = torch.lerp(target, q.detach(), 0.2)
        for first, value in enumerate(expected):
            assert v[1 + first].item() == pytest.approx(value, abs=0.01)
            assert q[0, 0, first].item() == pytest.approx(gamma * value, abs=0.01)
        start = gamma * (max(expected) if tau > 0.9 else sum(expected) / 3)
        assert v[0].item() == pytest.approx(start, abs=0.01)
        assert q[0, 1, 1].item() == pytest.approx(1.0, abs=0.01)
        assert q[0, 3, 2].item() == 0.0, "the value of what nobody said was asked for"
    assert math.isfinite(found.loss.item())
