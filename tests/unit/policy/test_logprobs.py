from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmrl_ray.policy.logits import policy_logits, token_logprobs


def numpy_logprobs(
    logits: np.ndarray, targets: np.ndarray, forbidden: list[int], temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen log-probs and entropies in float64, from the definition of a softmax over the allowed tokens."""
    allowed = np.setdiff1d(np.arange(logits.shape[1]), forbidden)
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    probabilities = weights[:, allowed] / weights[:, allowed].sum(axis=1, keepdims=True)
    columns = np.searchsorted(allowed, targets)
    chosen = np.log(probabilities[np.arange(len(targets)), columns])
    return chosen, -(probabilities * np.log(probabilities)).sum(axis=1)


def test_literal_values() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0), 9.0]])
    logprobs, entropies = token_logprobs(
        logits, torch.tensor([1]), head=nn.Identity(), forbidden=[3], temperature=1.0, entropy=True
    )
    assert logprobs.tolist() == pytest.approx([math.log(2 / 8)])
    expected = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert entropies is not None
    assert entropies.tolist() == pytest.approx([expected])
    assert policy_logits(logits, [3], 0.5)[0, 3] == float("-inf")
    assert policy_logits(logits, [3], 0.5)[0, 1].item() == pytest.approx(2 * math.log(2.0))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 7),
    vocabulary=st.integers(3, 11),
    temperature=st.floats(0.2, 3.0),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 10_000),
)
def test_chunks_give_what_the_definition_gives(
    rows: int, vocabulary: int, temperature: float, chunk: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 5, generator=generator)
    weight = torch.randn(vocabulary, 5, generator=generator, requires_grad=True)
    forbidden = [0, vocabulary - 1][: vocabulary - 2]
    allowed = torch.tensor([i for i in range(vocabulary) if i not in forbidden])
    targets = allowed[torch.randint(len(allowed), (rows,), generator=generator)]

    def head(x: torch.Tensor) -> torch.Tensor:
        return x @ weight.T

    def run(elements: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logprobs, entropies = token_logprobs(
            hidden,
            targets,
            head=head,
            forbidden=forbidden,
            temperature=temperature,
            entropy=True,
            chunk_elements=elements,
            vocab_size=vocabulary,
        )
        assert entropies is not None
        [gradient] = torch.autograd.grad((logprobs * torch.arange(1, rows + 1)).sum(), [weight])
        return logprobs.detach(), entropies, gradient

    logprobs, entropies, gradient = run(chunk)
    whole, _, whole_gradient = run(10**9)
    expected, expected_entropies = numpy_logprobs(
        (hidden @ weight.T).detach().double().numpy(), targets.numpy(), forbidden, temperature
    )
    np.testing.assert_allclose(logprobs.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropies.numpy(), expected_entropies, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logprobs, whole, rtol=1e-5, atol=1e-5)  # of logits that may be a few dozen
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-5, atol=1e-5)
    assert gradient[forbidden].abs().max() == 0 if forbidden else True


@pytest.mark.parametrize("elements", [10**9, 12])
def test_an_entropy_has_the_gradient_of_its_definition_where_that_is_asked_for(elements: int) -> None:
    """dH/dz_v = −p_v (log p_v + H) ÷ temperature over the allowed tokens, in float64 NumPy; whole and in chunks."""
    rng = np.random.default_rng(2)
    values, temperature, forbidden = rng.normal(size=(5, 6)), 0.6, [2, 5]
    allowed = [0, 1, 3, 4]
    p = np.exp(values[:, allowed] / temperature)
    p /= p.sum(axis=1, keepdims=True)
    expected = np.zeros((5, 6))
    expected[:, allowed] = -p * (np.log(p) - (p * np.log(p)).sum(axis=1, keepdims=True)) / temperature

    def entropies(*, gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.tensor(values, dtype=torch.float32, requires_grad=True)
        _, found = token_logprobs(
            logits,
            torch.zeros(5, dtype=torch.int64),
            head=nn.Identity(),
            forbidden=forbidden,
            temperature=temperature,
            entropy=True,
            entropy_gradient=gradient,
            chunk_elements=elements,
            vocab_size=6,
        )
        assert found is not None
        return logits, found

    logits, found = entropies(gradient=True)
    (gradient,) = torch.autograd.grad(found.sum(), [logits])
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert not entropies(gradient=False)[1].requires_grad


def test_chunks_are_not_kept_for_the_backward_pass() -> None:
    """Memory that autograd holds after the forward: without chunks all logits, with chunks the rows alone."""
    hidden = torch.randn(64, 4)
    weight = torch.randn(1000, 4, requires_grad=True)

    def kept(elements: int) -> int:
        sizes: list[int] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            token_logprobs(
                hidden,
                torch.zeros(64, dtype=torch.int64),
                head=lambda x: x @ weight.T,
                forbidden=[5],
                temperature=1.0,
                chunk_elements=elements,
                vocab_size=1000,
            )
        return max(sizes)

    assert kept(10**9) == 64_000
    assert kept(8_000) <= 4_000


def test_no_rows() -> None:
    logprobs, entropies = token_logprobs(
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        head=nn.Identity(),
        forbidden=[],
        temperature=1.0,
        entropy=True,
        vocab_size=4,
    )
    assert logprobs.shape == (0,)
    assert entropies is not None
    assert entropies.shape == (0,)


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.linspace(-3, 3, 300).to(torch.bfloat16)[None]
    logprobs, _ = token_logprobs(logits, torch.tensor([7]), head=nn.Identity(), forbidden=[], temperature=1.0)
    assert logprobs.dtype == torch.float32
    expected = logits.double().log_softmax(-1)[0, 7]
    assert logprobs.item() == pytest.approx(expected.item(), rel=1e-6)
