"""Policy-gradient losses: the formulas in float64 NumPy, literal values, gradients, and sums over micro-batches."""

import itertools
import math
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.losses.aggregation import LossStats, PolicyLoss, completion_scales
from mmrl_ray.losses.policy_gradient import policy_loss, reward_guided_loss

NAMES = ["reward_guided", "clipped", "gspo", "cispo"]
LOW, HIGH, CAP = 0.2, 0.28, 1.5
Case = dict[str, np.ndarray]


def case(seed: int, b: int = 4, t: int = 6, spread: float = 0.4) -> Case:
    rng = np.random.default_rng(seed)
    prox = -rng.exponential(1.0, (b, t))
    lengths = rng.integers(0, t + 1, b)
    return {
        "theta": prox + rng.normal(0, spread, (b, t)),
        "prox": prox,
        "mu": prox + rng.normal(0, spread, (b, t)),
        "advantages": rng.normal(size=b),
        "scales": rng.uniform(0.2, 1.0, b),
        "mask": np.arange(t) < lengths[:, None],
    }


def run(name: str, c: Case, denominator: float = 7.0, theta: torch.Tensor | None = None) -> PolicyLoss:
    tensors = {k: torch.from_numpy(v) for k, v in c.items()}
    return policy_loss(
        name,
        tensors["theta"] if theta is None else theta,
        tensors["prox"],
        tensors["mu"],
        tensors["advantages"],
        tensors["mask"],
        scales=tensors["scales"],
        denominator=denominator,
        off_policy_cap=CAP,
        clip_low=LOW,
        clip_high=HIGH,
    )


def oracle(name: str, c: Case, denominator: float) -> tuple[float, np.ndarray]:
    """Loss and its gradient with respect to theta, completion by completion, from the papers' formulas."""
    total, gradient = 0.0, np.zeros_like(c["theta"])
    for b, advantage in enumerate(c["advantages"]):
        for t in range(c["theta"].shape[1]):
            if not c["mask"][b, t]:
                continue
            theta, prox, mu = c["theta"][b, t], c["prox"][b, t], c["mu"][b, t]
            scale = c["scales"][b] / denominator
            valid = c["mask"][b]
            if name == "reward_guided":
                weight = min(math.exp(theta) / math.exp(mu), CAP) * advantage * scale
                total -= weight * theta
                gradient[b, t] -= weight
                continue
            ratio = math.exp(theta) / math.exp(prox)
            behaviour = math.exp(prox) / math.exp(mu)
            if name == "gspo":
                n = valid.sum()
                ratio = (np.prod(np.exp(c["theta"][b][valid])) / np.prod(np.exp(c["prox"][b][valid]))) ** (1 / n)
                behaviour = (np.prod(np.exp(c["prox"][b][valid])) / np.prod(np.exp(c["mu"][b][valid]))) ** (1 / n)
            bounded = min(max(ratio, 1 - LOW), 1 + HIGH)
            weight = min(behaviour, CAP) * scale
            if name == "cispo":
                total -= weight * bounded * advantage * theta
                gradient[b, t] -= weight * bounded * advantage
            else:
                total -= weight * min(ratio * advantage, bounded * advantage)
                if ratio * advantage <= bounded * advantage:
                    gradient[b, t] -= weight * ratio * advantage
    return total, gradient


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.integers(1, 6))
def test_equals_the_formula(name: str, seed: int, b: int, t: int) -> None:
    c = case(seed, b, t)
    expected, gradient = oracle(name, c, 3.5)
    padded = {k: np.where(c["mask"], v, np.nan) if k in ("theta", "prox", "mu") else v for k, v in c.items()}
    theta = torch.from_numpy(padded["theta"]).requires_grad_()
    got = run(name, padded, 3.5, theta)
    got.loss.backward()
    assert theta.grad is not None
    np.testing.assert_allclose(got.loss.item(), expected, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(theta.grad.numpy(), gradient, rtol=1e-9, atol=1e-13)


@settings(deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_reward_guided_is_the_expectation(seed: int, b: int, t: int, per_token: bool) -> None:
    c = case(seed, b, t)
    weights = np.random.default_rng(seed).normal(size=(b, t) if per_token else b)
    if not c["mask"].any():
        return
    spread = weights if per_token else np.repeat(weights[:, None], t, axis=1)
    expected = -np.mean(spread[c["mask"]] * c["theta"][c["mask"]])
    got = reward_guided_loss(
        torch.from_numpy(c["theta"]),
        torch.from_numpy(weights),
        torch.from_numpy(c["mask"]),
        denominator=c["mask"].sum(),
    )
    np.testing.assert_allclose(got.item(), expected, rtol=1e-9, atol=1e-13)


def test_reward_guided_literal() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert reward_guided_loss(logprobs, torch.tensor([2.0, -1.0]), mask, denominator=3).item() == 1.0
    weights = torch.tensor([[1.0, 0.5], [2.0, 7.0]])
    assert reward_guided_loss(logprobs, weights, mask, denominator=4).item() == 2.0


def one_token(name: str, ratio: float, advantage: float, behaviour: float = 1.0) -> tuple[float, float, PolicyLoss]:
    """Loss and d loss / d log π_θ of a single token with the ratios π_θ/π_prox and π_prox/μ."""
    log_prox = -1.0
    theta = torch.tensor([[log_prox + math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    c = {
        "prox": np.array([[log_prox]]),
        "mu": np.array([[log_prox - math.log(behaviour)]]),
        "advantages": np.array([advantage]),
        "scales": np.ones(1),
        "mask": np.ones((1, 1), dtype=bool),
    }
    got = run(name, c, 1.0, theta)
    (gradient,) = torch.autograd.grad(got.loss, theta)
    return got.loss.item(), gradient.item(), got


@pytest.mark.parametrize("name", ["clipped", "gspo"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.56, 0.0),  # clipped at 1 + 0.28
        (1.5, -2.0, 3.0, 3.0),  # the pessimistic side is not clipped
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),  # clipped at 1 - 0.2
    ],
)
def test_clipped_literal(name: str, ratio: float, advantage: float, loss: float, gradient: float) -> None:
    value, slope, got = one_token(name, ratio, advantage)
    assert value == pytest.approx(loss)
    assert slope == pytest.approx(gradient)
    assert got.stats.clipped.item() == (gradient == 0)


def test_cispo_literal() -> None:
    for ratio, weight in ((1.1, 1.1), (1.5, 1.28), (0.5, 0.8)):
        log_theta = -1.0 + math.log(ratio)
        value, slope, got = one_token("cispo", ratio, 2.0)
        assert value == pytest.approx(-2.0 * weight * log_theta)
        assert slope == pytest.approx(-2.0 * weight)  # never 0: only the weight is clipped
        assert got.stats.clipped.item() == (weight != ratio)


@pytest.mark.parametrize(("behaviour", "weight"), [(0.5, 0.5), (1.2, 1.2), (4.0, CAP)])
def test_off_policy_weight_literal(behaviour: float, weight: float) -> None:
    for name in ("clipped", "gspo", "cispo"):
        _, slope, got = one_token(name, 1.0, 2.0, behaviour)
        assert slope == pytest.approx(-2.0 * weight)
        assert got.stats.capped.item() == (behaviour > CAP)
    _, slope, _ = one_token("reward_guided", 1.0, 2.0, behaviour)
    assert slope == pytest.approx(-2.0 * weight)


def test_gspo_takes_the_geometric_mean_of_the_completion() -> None:
    theta = torch.tensor([[math.log(2.0), math.log(0.5), math.log(4.0), 5.0]], dtype=torch.float64, requires_grad=True)
    c = {
        "prox": np.zeros((1, 4)),
        "mu": -np.log(np.array([[8.0, 1.0, 1.0, 3.0]])),
        "advantages": np.array([-1.0]),
        "scales": np.array([1 / 3]),
        "mask": np.array([[True, True, True, False]]),
    }
    got = run("gspo", c, 1.0, theta)
    s = 4.0 ** (1 / 3)
    assert got.loss.item() == pytest.approx(s * CAP)  # the geometric mean of mu's ratios is 2, capped
    (gradient,) = torch.autograd.grad(got.loss, theta)
    assert gradient[0].tolist() == pytest.approx([s * CAP / 3] * 3 + [0.0])
    assert got.stats.metrics()["ratio_mean"] == pytest.approx(s)
    assert got.stats.metrics()["behaviour_ratio_mean"] == pytest.approx(2.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("proximal", ["given", "none"])
def test_on_policy_gradient_is_reward_guided(name: str, proximal: str) -> None:
    c = {k: torch.from_numpy(v) for k, v in case(5).items()}
    theta = c["theta"].clone().requires_grad_()
    got = policy_loss(
        name,
        theta,
        theta.detach() if proximal == "given" else None,
        theta.detach(),
        c["advantages"],
        c["mask"],
        scales=c["scales"],
        denominator=3.0,
        off_policy_cap=1.0,
        clip_low=LOW,
        clip_high=HIGH,
    )
    (gradient,) = torch.autograd.grad(got.loss, theta)
    plain = reward_guided_loss(theta, c["advantages"] * c["scales"], c["mask"], denominator=3.0)
    (expected,) = torch.autograd.grad(plain, theta)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    metrics = got.stats.metrics()
    assert metrics["clip_fraction"] == metrics["behaviour_capped_fraction"] == 0
    assert metrics["ratio_mean"] == metrics["behaviour_ratio_mean"] == metrics["effective_samples"] == 1


def test_gradcheck_of_what_is_differentiable_throughout() -> None:
    c = case(6)
    theta = torch.from_numpy(c["theta"]).requires_grad_()
    weights, mask = torch.from_numpy(c["advantages"]), torch.from_numpy(c["mask"])
    assert torch.autograd.gradcheck(lambda x: reward_guided_loss(x, weights, mask, denominator=3.0), (theta,))
    assert torch.autograd.gradcheck(lambda x: run("clipped", c, 3.0, x).loss, (theta,))


def test_gspo_gradient_is_that_of_the_sequence_form() -> None:
    """gradcheck cannot see through a stop-gradient; the paper's sequence form has none."""
    c = case(8, spread=0.05)
    c["scales"] = 1 / np.maximum(c["mask"].sum(1), 1)
    theta = torch.from_numpy(c["theta"]).requires_grad_()
    (gradient,) = torch.autograd.grad(run("gspo", c, 4.0, theta).loss, theta)
    t = {k: torch.from_numpy(v) for k, v in c.items()}
    lengths = t["mask"].sum(1).clamp(min=1)
    s = (((theta - t["prox"]) * t["mask"]).sum(1) / lengths).exp()
    w = (((t["prox"] - t["mu"]) * t["mask"]).sum(1) / lengths).exp().clamp(max=CAP)
    surrogate = torch.minimum(s * t["advantages"], s.clamp(1 - LOW, 1 + HIGH) * t["advantages"])
    (expected,) = torch.autograd.grad(-(surrogate * w * t["mask"].any(1)).sum() / 4.0, theta)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_micro_batches_add_up(name: str, aggregation: str) -> None:
    c = case(9, b=6)
    scales, denominator = completion_scales(aggregation, c["mask"].sum(1), max_new_tokens=6)
    c["scales"] = scales.numpy()
    whole = run(name, c, denominator)
    parts = [
        run(name, {k: v[rows] for k, v in c.items()}, denominator) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=1e-12, atol=0)
    added = parts[0].stats + parts[1].stats + parts[2].stats
    torch.testing.assert_close(added.to_tensor(), whole.stats.to_tensor(), rtol=1e-12, atol=0)


def test_stats_literal() -> None:
    sums = LossStats(*(torch.tensor(float(x)) for x in (4, 1, 5, 6, 10, 2)))
    assert sums.metrics() == {
        "clip_fraction": 0.25,
        "ratio_mean": 1.25,
        "behaviour_ratio_mean": 1.5,
        "behaviour_capped_fraction": 0.5,
        "effective_samples": 0.9,
    }
    assert LossStats.from_tensor(sums.to_tensor()) == sums
    assert set((sums + sums).to_tensor().tolist()) == {8.0, 2.0, 10.0, 12.0, 20.0, 4.0}
    nothing = LossStats(*(torch.zeros(()) for _ in fields(LossStats)))
    assert set(nothing.metrics().values()) == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_stats_against_the_ratios(name: str) -> None:
    c = case(10, b=6)
    m = c["mask"]
    over = c["theta"] - (c["mu"] if name == "reward_guided" else c["prox"])
    off = (c["theta"] if name == "reward_guided" else c["prox"]) - c["mu"]
    if name == "gspo":
        ratio = np.exp([row[k].mean() for row, k in zip(over, m, strict=True) if k.any()])
        behaviour = np.exp([row[k].mean() for row, k in zip(off, m, strict=True) if k.any()])
    else:
        ratio, behaviour = np.exp(over[m]), np.exp(off[m])
    got = run(name, c).stats
    expected = [len(ratio), ratio.sum(), behaviour.sum(), (behaviour**2).sum(), (behaviour > CAP).sum()]
    sums = [got.count, got.ratio, got.behaviour, got.behaviour_squared, got.capped]
    np.testing.assert_allclose([x.item() for x in sums], expected, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_behaviour_ratios_stay_finite(name: str) -> None:
    c = case(11)
    c["mu"] = c["prox"] - 1e4
    theta = torch.from_numpy(c["theta"]).requires_grad_()
    got = run(name, c, 1.0, theta)
    (gradient,) = torch.autograd.grad(got.loss, theta)
    assert torch.isfinite(gradient).all()
    assert all(math.isfinite(v) for v in got.stats.metrics().values())


@pytest.mark.parametrize("loss", ["clipped", "gspo", "sapo", "ppo"])
def test_a_ratio_that_float32_cannot_hold_leaves_the_others_their_gradient(loss: str) -> None:
    """e^100 of a token that the clip or the gate has done with: 0 · ∞ in the backward pass would be NaN."""
    policy: Any = SimpleNamespace(hidden_size=1, device=torch.device("cpu"))
    cfg = LearnerSection(steps=1, loss=loss, advantage="none")
    for advantage, first in itertools.product((1.0, 0.0, -1.0), (-1.0, -101.0)):
        theta = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
        proximal = torch.tensor([[first], [-1.0]])
        mask = torch.ones(2, 1, dtype=torch.bool)
        batch: Any = SimpleNamespace(
            advantages=torch.tensor([advantage, 1.0]), scales=torch.ones(2), behaviour_logprobs=proximal
        )
        scores: Any = SimpleNamespace(logprobs=theta, mask=mask, hidden=torch.zeros(2, 1))
        share, sums = cfg.family.objective(policy).share(batch, scores, proximal, 2.0, place=0)
        share.backward()
        assert theta.grad is not None
        assert theta.grad[1].item() == pytest.approx(-0.5)
        assert theta.grad[0].item() == pytest.approx(0.0 if first < -1.0 else -advantage / 2)
        assert bool(sums.isfinite().all())


def test_no_gradient_to_anything_but_the_policy() -> None:
    for name in NAMES:
        t = {k: torch.from_numpy(v) for k, v in case(12).items()}
        leaves = [t[k].requires_grad_() for k in ("prox", "mu")]
        theta = t["theta"].requires_grad_()
        loss = policy_loss(
            name, theta, t["prox"], t["mu"], t["advantages"], t["mask"],
            scales=t["scales"], denominator=2.0, off_policy_cap=CAP, clip_low=LOW, clip_high=HIGH,
        ).loss  # fmt: skip
        loss.backward()
        assert theta.grad is not None
        assert all(leaf.grad is None for leaf in leaves)


def test_refuses() -> None:
    c = case(13)
    with pytest.raises(ValueError, match="unknown loss 'ppo'"):
        run("ppo", c)
    for name in NAMES:
        with pytest.raises(ValueError, match=r"\[4, 5\]"):
            run(name, {**c, "mu": c["mu"][:, :5]})
        with pytest.raises(ValueError, match=r"\[3\]"):
            run(name, {**c, "advantages": c["advantages"][:3]})
        with pytest.raises(ValueError, match=r"\[4, 6\], got \[4, 5\]"):
            run(name, {**c, "mask": c["mask"][:, :5]})
        with pytest.raises(ValueError, match="denominator"):
            run(name, c, denominator=0)
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[B, T\], got \[3\]"):
        reward_guided_loss(x[0], torch.zeros(3), mask[0], denominator=1)
    with pytest.raises(ValueError, match=r"\[2, 3\], got \[3\]"):
        reward_guided_loss(x, torch.zeros(3), mask, denominator=1)
