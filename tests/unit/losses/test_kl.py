"""KL estimators: formulas, their bias measured on an exact categorical, and the loss over scales and denominator."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.losses.regularizers import kl_loss, kl_penalty, kl_per_token

ORACLES = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) - 1 + d}


def case(seed: int, b: int = 3, t: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logprobs, reference = -rng.exponential(1.0, (b, t)), -rng.exponential(1.0, (b, t))
    mask = rng.uniform(size=(b, t)) < 0.7
    return logprobs, reference, mask, rng.uniform(0.1, 2.0, b)


@settings(deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.integers(1, 6), st.sampled_from(["k2", "k3"]))
def test_loss_equals_the_formula(seed: int, b: int, t: int, name: str) -> None:
    logprobs, reference, mask, scales = case(seed, b, t)
    expected = np.sum((ORACLES[name](logprobs - reference) * scales[:, None])[mask]) / 7.5
    padded = torch.from_numpy(np.where(mask, logprobs, np.nan))
    got = kl_loss(
        name,
        padded,
        torch.from_numpy(reference),
        torch.from_numpy(mask),
        scales=torch.from_numpy(scales),
        denominator=7.5,
    )
    np.testing.assert_allclose(got.loss.item(), expected, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(
        got.value.item(), np.sum(ORACLES["k3"](logprobs - reference)[mask]), rtol=1e-9, atol=1e-14
    )
    assert got.count.item() == mask.sum()


def test_literal() -> None:
    logprobs, reference = torch.tensor([math.log(0.5), -1.0]), torch.tensor([math.log(0.25), -1.0])
    log2 = math.log(2)
    for name, expected in (("k1", [log2, 0]), ("k2", [log2**2 / 2, 0]), ("k3", [0.5 - 1 + log2, 0])):
        torch.testing.assert_close(kl_per_token(name, logprobs, reference), torch.tensor(expected))


def test_k3_keeps_small_differences() -> None:
    d = torch.tensor([1e-4], dtype=torch.float32)
    assert kl_per_token("k3", d, torch.zeros(1)).item() == pytest.approx(5e-9, rel=0.05)


def test_bias_is_as_documented() -> None:
    """Expectations over an exact categorical, so that no sampling noise hides a bias."""
    theta = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([-0.5, 0.4, 0.1], dtype=torch.float64), 0)
    logp = torch.log_softmax(theta, 0)
    p = logp.exp()
    (reverse,) = torch.autograd.grad((p * (logp - reference)).sum(), theta, retain_graph=True)
    (forward,) = torch.autograd.grad((reference.exp() * (reference - logp)).sum(), theta, retain_graph=True)
    truth = (p * (logp - reference)).sum()
    expected_gradient = {"k1": torch.zeros(3, dtype=torch.float64), "k2": reverse, "k3": forward}
    for name, gradient in expected_gradient.items():
        mean = (p.detach() * kl_per_token(name, logp, reference)).sum()
        (got,) = torch.autograd.grad(mean, theta, retain_graph=True)
        torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-12)
        assert (abs(mean.item() - truth.item()) < 1e-12) == (name != "k2")
    assert (forward - reverse).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_gradcheck_and_no_gradient_to_the_reference(name: str) -> None:
    logprobs, reference, mask, scales = (torch.from_numpy(x) for x in case(3))
    logprobs.requires_grad_()
    reference.requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return kl_loss(name, x, reference, mask, scales=scales, denominator=4).loss

    assert torch.autograd.gradcheck(loss, (logprobs,))
    loss(logprobs).backward()
    assert reference.grad is None
    assert (logprobs.grad[~mask] == 0).all()


def test_micro_batches_add_up() -> None:
    logprobs, reference, mask, scales = (torch.from_numpy(x) for x in case(4, b=6))

    def run(rows: slice) -> torch.Tensor:
        got = kl_loss("k3", logprobs[rows], reference[rows], mask[rows], scales=scales[rows], denominator=9)
        return torch.stack([got.loss, got.value, got.count])

    torch.testing.assert_close(run(slice(0, 2)) + run(slice(2, 6)), run(slice(0, 6)), rtol=1e-12, atol=0)


def test_penalty() -> None:
    behaviour, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert kl_penalty(behaviour, reference) == pytest.approx(-0.5, rel=1e-12)
    assert kl_penalty(torch.tensor([-1.0]), torch.tensor([-4.0])) == 3.0
    with pytest.raises(ValueError, match="must match"):
        kl_penalty(behaviour, reference[:1])


def test_refuses() -> None:
    x, mask, scales = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
    with pytest.raises(ValueError, match="inside the reward"):
        kl_loss("k1", x, x, mask, scales=scales, denominator=1)
    with pytest.raises(ValueError, match="unknown KL estimator"):
        kl_loss("k4", x, x, mask, scales=scales, denominator=1)
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        kl_loss("k3", x, x[:, :2], mask, scales=scales, denominator=1)
    with pytest.raises(ValueError, match=r"\[3\]"):
        kl_loss("k3", x, x, mask, scales=torch.ones(3), denominator=1)
    with pytest.raises(ValueError, match="denominator"):
        kl_loss("k3", x, x, mask, scales=scales, denominator=0)
    with pytest.raises(ValueError, match="must match"):
        kl_per_token("k1", x, x[:1])
