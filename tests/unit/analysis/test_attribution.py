"""docs/equations.md 9 against gradients written down by hand, in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.analysis.attribution import importance_rms, importance_share, modality_importance, token_importance


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 6),
)
def test_it_is_the_norm_of_the_gradient_of_each_sample(seed: int, batch: int, lengths: list[int], width: int) -> None:
    """L = Σ_b (Σ_m ⟨C_m, E_bm⟩)³ has ∂L/∂E_bm = 3 (Σ_m ⟨C_m, E_bm⟩)² C_m: every modality has a part in all."""
    rng = np.random.default_rng(seed)
    values = {f"m{i}": rng.normal(size=(batch, length, width)) for i, length in enumerate(lengths)}
    weights = {name: rng.normal(size=each.shape[1:]) for name, each in values.items()}
    leaves = {name: torch.tensor(each, requires_grad=True) for name, each in values.items()}
    inner = sum((leaves[n] * torch.from_numpy(weights[n])).sum(dim=(1, 2)) for n in leaves)
    loss = (inner**3).sum()
    sums = sum((values[n] * weights[n]).sum(axis=(1, 2)) for n in values)
    expected = {n: 3 * sums**2 * np.sqrt((weights[n] ** 2).sum()) for n in values}
    found = modality_importance(loss, leaves)
    assert all(leaf.grad is None for leaf in leaves.values())
    for name in values:
        np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-9, atol=1e-12)
        size = weights[name].size
        np.testing.assert_allclose(
            importance_rms(found, leaves)[name].numpy(), expected[name] / np.sqrt(size), rtol=1e-9, atol=1e-12
        )
    total = sum(expected.values())
    shares = importance_share(found)
    for name in values:
        np.testing.assert_allclose(shares[name].numpy(), expected[name] / total, rtol=1e-9)


def test_tokens_add_up_to_their_modality_and_unused_ones_are_0() -> None:
    image = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]], requires_grad=True)
    text = torch.ones(1, 2, 2, requires_grad=True)
    unused = torch.ones(1, 3, 2, requires_grad=True)
    loss = 0.5 * image.square().sum() + text[:, 0].sum()
    embeddings = {"image": image, "text": text, "unused": unused}
    tokens = token_importance(loss, embeddings)
    assert tokens["image"].tolist() == [[3.0, 4.0]]
    assert tokens["text"].tolist() == [[pytest.approx(math.sqrt(2)), 0.0]]
    assert tokens["unused"].tolist() == [[0.0, 0.0, 0.0]]
    whole = modality_importance(0.5 * image.square().sum(), {"image": image})
    assert whole["image"].tolist() == [5.0]


def test_a_loss_that_hangs_on_nothing_has_no_shares() -> None:
    e = torch.ones(2, 3, 4, requires_grad=True)
    shares = importance_share(modality_importance((e * 0).sum(), {"image": e}))
    assert torch.isnan(shares["image"]).all()


def test_a_modality_without_tokens_has_no_rms() -> None:
    e, none = torch.ones(1, 1, 2, requires_grad=True), torch.ones(1, 0, 2, requires_grad=True)
    both = {"image": e, "text": none}
    found = modality_importance(e.sum(), both)
    assert found["text"].tolist() == [0.0]
    assert math.isnan(importance_rms(found, both)["text"].item())


def test_what_it_cannot_take_is_an_error_with_shapes() -> None:
    e = torch.ones(2, 3, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"scalar loss with gradient, got shape \[2\]"):
        modality_importance(e.sum(dim=(1, 2)), {"image": e})
    with pytest.raises(ValueError, match=r"shape \[\]"):
        modality_importance(torch.tensor(1.0), {"image": e})
    with pytest.raises(ValueError, match=r"\{'image': \[2, 12\]\}"):
        modality_importance(e.sum(), {"image": e.reshape(2, 12)})
    with pytest.raises(ValueError, match=r"'text': \[3, 1, 4\]"):
        modality_importance(e.sum(), {"image": e, "text": torch.ones(3, 1, 4, requires_grad=True)})
    with pytest.raises(ValueError, match="embeddings of text carry no gradient"):
        modality_importance(e.sum(), {"image": e, "text": torch.ones(2, 1, 4)})
    with pytest.raises(ValueError, match="one modality or more"):
        modality_importance(e.sum(), {})
    with pytest.raises(ValueError, match="got none"):
        importance_share({})
    with pytest.raises(ValueError, match=r"'b': \[3\]"):
        importance_share({"a": torch.zeros(2), "b": torch.zeros(3)})
