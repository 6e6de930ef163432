"""DPO against the paper's equation 7 in float64 NumPy, its gradient against the paper's, and how its figures add up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.losses.dpo import DpoStats, dpo_loss

Case = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def case(seed: int, pairs: int, tokens: int, labels: Sequence[float] = (1.0, 0.0, 0.5, 2 / 3)) -> Case:
    rng = np.random.default_rng(seed)
    shape = (2 * pairs, tokens)
    logprobs, reference = -rng.exponential(2.0, shape), -rng.exponential(2.0, shape)
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, 2 * pairs)[:, None]
    return logprobs, reference, mask, rng.choice(labels, pairs)


def oracle(logprobs: np.ndarray, reference: np.ndarray, mask: np.ndarray, p: np.ndarray, beta: float, eps: float):
    """Pair by pair, straight from the formula, with probabilities in place of log-sigmoids."""
    losses = []
    for k in range(len(p)):
        rewards = []
        for row in (2 * k, 2 * k + 1):
            theta = sum(value for value, real in zip(logprobs[row], mask[row], strict=True) if real)
            ref = sum(value for value, real in zip(reference[row], mask[row], strict=True) if real)
            rewards.append(beta * (theta - ref))
        margin = rewards[0] - rewards[1]
        # −log σ, which a σ next to 1 would round away.
        a_loses, b_loses = math.log1p(math.exp(-margin)), math.log1p(math.exp(margin))
        q = p[k] * (1 - eps) + (1 - p[k]) * eps
        losses.append(q * a_loses + (1 - q) * b_loses)
    return sum(losses)


def run(c: Case, *, denominator: float, beta: float = 0.1, eps: float = 0.0, theta: torch.Tensor | None = None):
    logprobs, reference, mask, p = c
    preferred = torch.from_numpy(np.stack([p, 1 - p], axis=1).reshape(-1))
    # What is padded may be anything.
    padded = torch.from_numpy(np.where(mask, logprobs, np.nan)) if theta is None else theta
    return dpo_loss(
        padded,
        torch.from_numpy(np.where(mask, reference, np.inf)),
        preferred,
        torch.from_numpy(mask),
        denominator=denominator,
        beta=beta,
        label_smoothing=eps,
    )


@settings(deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 5),
    st.integers(1, 7),
    st.floats(0.01, 2.0),
    st.floats(0.0, 0.49),
)
def test_loss_equals_the_formula(seed: int, pairs: int, tokens: int, beta: float, eps: float) -> None:
    c = case(seed, pairs, tokens)
    found = run(c, denominator=7.0, beta=beta, eps=eps)
    np.testing.assert_allclose(found.loss.item(), oracle(*c, beta, eps) / 7.0, rtol=1e-9)


def test_gradient_is_the_papers() -> None:
    """−β·σ(r_rejected − r_chosen) on each token of the chosen caption, + on the rejected one's."""
    logprobs, reference, mask, _ = c = case(3, 4, 5, labels=(1.0,))
    theta = torch.from_numpy(np.where(mask, logprobs, 0.0)).requires_grad_()
    found = run(c, denominator=4.0, beta=0.3, theta=theta)
    (gradient,) = torch.autograd.grad(found.loss, theta)
    rewards = 0.3 * ((logprobs - reference) * mask).sum(axis=1)
    weight = 1 / (1 + np.exp(rewards[0::2] - rewards[1::2]))  # σ(r_rejected − r_chosen)
    signed = np.stack([-weight, weight], axis=1).reshape(-1)
    np.testing.assert_allclose(gradient.numpy(), 0.3 * signed[:, None] * mask / 4.0, rtol=1e-9)
    assert torch.autograd.gradcheck(lambda t: run(c, denominator=4.0, eps=0.1, theta=t).loss, theta)


def test_a_tie_pulls_the_implicit_rewards_together_and_a_smoothed_label_has_an_end() -> None:
    mask = torch.ones(2, 1, dtype=torch.bool)
    zero = torch.zeros(2, 1, dtype=torch.float64)

    def slope(margin: float, p: float, eps: float) -> float:
        theta = torch.tensor([[margin], [0.0]], dtype=torch.float64, requires_grad=True)
        preferred = torch.tensor([p, 1 - p], dtype=torch.float64)
        loss = dpo_loss(theta, zero, preferred, mask, denominator=1, beta=1.0, label_smoothing=eps).loss
        return float(torch.autograd.grad(loss, theta)[0][0, 0])

    assert slope(1.0, 0.5, 0.0) > 0 > slope(-1.0, 0.5, 0.0)
    assert slope(0.0, 0.5, 0.0) == pytest.approx(0.0)
    assert slope(5.0, 1.0, 0.0) < 0  # a sure label pushes for ever
    assert slope(math.log(0.9 / 0.1), 1.0, 0.1) == pytest.approx(0.0)  # a smoothed one until σ(margin) = 1 − ε


def test_extreme_margins_stay_finite() -> None:
    theta = torch.tensor([[-4000.0], [4000.0]], requires_grad=True)
    mask = torch.ones(2, 1, dtype=torch.bool)
    found = dpo_loss(theta, torch.zeros(2, 1), torch.tensor([1.0, 0.0]), mask, denominator=1, beta=0.5)
    assert found.loss.item() == pytest.approx(4000.0)
    assert torch.isfinite(torch.autograd.grad(found.loss, theta)[0]).all()


def test_shares_and_figures_add_up_over_micro_batches() -> None:
    c = case(11, 6, 4)
    whole = run(c, denominator=6.0)
    halves = [run(tuple(part[s] for part, s in zip(c, cut, strict=True)), denominator=6.0) for cut in _cuts(3)]  # type: ignore[arg-type]
    assert sum(h.loss.item() for h in halves) == pytest.approx(whole.loss.item())
    added = halves[0].stats + halves[1].stats
    torch.testing.assert_close(added.to_tensor(), whole.stats.to_tensor())
    assert DpoStats.from_tensor(added.to_tensor()).metrics() == pytest.approx(whole.stats.metrics(), nan_ok=True)


def _cuts(pairs: int) -> list[tuple[slice, ...]]:
    first, second = slice(0, 2 * pairs), slice(2 * pairs, None)
    return [(first, first, first, slice(0, pairs)), (second, second, second, slice(pairs, None))]


def test_figures_are_over_the_pairs_that_somebody_decided() -> None:
    ones = torch.ones(8, 1, dtype=torch.bool)
    theta = torch.tensor([2.0, 0.0, 0.0, 2.0, 1.0, 1.0, 9.0, 0.0])[:, None]
    preferred = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.5, 0.5])
    figures = dpo_loss(theta, torch.zeros(8, 1), preferred, ones, denominator=4, beta=1.0).stats.metrics()
    assert figures["dpo/accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert figures["dpo/reward_chosen"] == pytest.approx((2 + 0 + 1) / 3)
    assert figures["dpo/reward_rejected"] == pytest.approx((0 + 2 + 1) / 3)
    assert figures["dpo/margin"] == pytest.approx(0.0)
    sigmoid = [1 / (1 + math.exp(-m)) for m in (2, -2, 0)]
    assert figures["dpo/confidence"] == pytest.approx(sum(sigmoid) / 3)
    tie = dpo_loss(theta[6:], torch.zeros(2, 1), preferred[6:], ones[6:], denominator=1, beta=1.0).stats.metrics()
    assert math.isnan(tie["dpo/accuracy"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 3}, "two rows a pair"),
        ({"preferred": [1.0, 1.0, 0.0, 1.0]}, "add to 1"),
        ({"preferred": [1.5, -0.5, 0.0, 1.0]}, "add to 1"),
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5\) must|label_smoothing=0.5 in"),
        ({"denominator": 0.0}, "denominator must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    rows = int(change.pop("rows", 4))  # type: ignore[call-overload]
    preferred = torch.tensor(change.pop("preferred", [1.0, 0.0, 0.0, 1.0])[:rows])  # type: ignore[index]
    settings_ = {"denominator": 2.0, "beta": 0.1, **change}
    logprobs, mask = torch.zeros(rows, 2), torch.ones(rows, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        dpo_loss(logprobs, torch.zeros(rows, 2), preferred, mask, **settings_)  # type: ignore[arg-type]
