"""Fusions against float64 NumPy oracles written from the formulas, masks, gradients, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmrl_ray.reward_model.fusion import (
    FUSIONS,
    AttentionFusion,
    CoupledEncodersFusion,
    Fused,
    SharedAttentionFusion,
    WeightedSumFusion,
    build_fusion,
)

NAMES = ("image", "text", "audio")
SHAPES = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4))
Arrays = dict[str, np.ndarray]


def batch(seed: int, b: int, lengths: list[int], dims: list[int]) -> tuple[Arrays, Arrays]:
    """Embeddings, and masks with at least one valid token in each row of each modality."""
    rng = np.random.default_rng(seed)
    embeddings, masks = {}, {}
    for name, length, dim in zip(NAMES, lengths, dims, strict=False):
        embeddings[name] = rng.normal(size=(b, length, dim))
        masks[name] = rng.uniform(size=(b, length)) < 0.6
        masks[name][np.arange(b), rng.integers(0, length, b)] = True
    return embeddings, masks


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def poisoned(embeddings: Arrays, masks: Arrays) -> dict[str, torch.Tensor]:
    """NaN at every padded position: whatever lets one through is found out."""
    return tensors({name: np.where(masks[name][:, :, None], x, np.nan) for name, x in embeddings.items()})


def weight(layer: nn.Module) -> np.ndarray:
    return layer.weight.detach().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def close(got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def attend(
    core: SharedAttentionFusion, embeddings: Arrays, masks: Arrays, row: int
) -> dict[tuple[str, int], np.ndarray]:
    """H of one row's valid tokens, one token at a time."""
    tokens = {(m, i): x[row, i] for m, x in embeddings.items() for i in range(x.shape[1]) if masks[m][row, i]}
    query, key, value = (weight(layer) for layer in (core.query, core.key, core.value))
    out = {}
    for place, token in tokens.items():
        scores = [np.dot(query @ token, key @ other) / math.sqrt(key.shape[0]) for other in tokens.values()]
        out[place] = sum(
            a * (value @ other) for a, other in zip(softmax(np.array(scores)), tokens.values(), strict=True)
        )
    return out


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31 - 1), SHAPES, st.integers(1, 5))
def test_shared_attention_is_the_formula(seed: int, shape: tuple[int, list[int], int], key_dim: int) -> None:
    b, lengths, dim = shape
    embeddings, masks = batch(seed, b, lengths, [dim] * 3)
    core = SharedAttentionFusion(dim, key_dim).double()
    expected = np.zeros((b, sum(lengths), key_dim))
    starts = dict(zip(embeddings, np.cumsum([0, *lengths]), strict=False))
    for row in range(b):
        for (name, i), vector in attend(core, embeddings, masks, row).items():
            expected[row, starts[name] + i] = vector
    close(core(poisoned(embeddings, masks), tensors(masks)), expected)


def layer_norm(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps) * weight(norm) + norm.bias.detach().numpy()
    )


def encoder_layer(layer: nn.TransformerEncoderLayer, x: np.ndarray) -> np.ndarray:
    """Vaswani et al. 2017, after-norm with ReLU, of valid tokens [L, d] alone."""
    heads, dim = layer.self_attn.num_heads, x.shape[1]
    width = dim // heads
    packed = x @ layer.self_attn.in_proj_weight.detach().numpy().T + layer.self_attn.in_proj_bias.detach().numpy()
    q, k, v = np.split(packed, 3, axis=1)
    joined = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        joined.append(np.stack([softmax(row) for row in scores]) @ v[:, part])
    out_proj = layer.self_attn.out_proj
    attended = np.concatenate(joined, axis=1) @ weight(out_proj).T + out_proj.bias.detach().numpy()
    x = layer_norm(x + attended, layer.norm1)
    hidden = np.maximum(x @ weight(layer.linear1).T + layer.linear1.bias.detach().numpy(), 0)
    return layer_norm(x + hidden @ weight(layer.linear2).T + layer.linear2.bias.detach().numpy(), layer.norm2)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 3),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.booleans(),
)
def test_coupled_encoders_is_the_formula(
    seed: int, b: int, lengths: list[int], layers: int, heads: int, grad: bool
) -> None:
    dims = [2, 4, 6][: len(lengths)]
    embeddings, masks = batch(seed, b, lengths, dims)
    fusion = CoupledEncodersFusion(dict(zip(NAMES, dims, strict=False)), 3, layers, heads).double().eval()
    rows = []
    for row in range(b):
        pooled = []
        for name, x in embeddings.items():
            hidden = x[row][masks[name][row]]
            for layer in fusion.encoders[name].layers:
                hidden = encoder_layer(layer, hidden)
            pooled.append(hidden.mean(axis=0))
        rows.append(weight(fusion.output) @ np.concatenate(pooled) + fusion.output.bias.detach().numpy())
    with torch.set_grad_enabled(grad):  # without gradient, torch takes another path
        close(fusion(poisoned(embeddings, masks), tensors(masks)), np.stack(rows))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_attention_and_weighted_sum_are_the_formulas(seed: int, b: int, m: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    names = NAMES[:m]
    pooled = {name: rng.normal(size=(b, dim)) for name in names}
    shuffled = tensors({name: pooled[name] for name in reversed(names)})  # the fusion's order counts, not the batch's
    attention = AttentionFusion(dim, names).double()
    fused, alpha = attention(shuffled)
    weighted = WeightedSumFusion(names).double()
    nn.init.normal_(weighted.logits)
    w = softmax(weighted.logits.detach().numpy())
    for row in range(b):
        a = softmax(weight(attention.score) @ np.concatenate([pooled[name][row] for name in names]))
        close(alpha[row], a)
        close(fused[row], sum(a[i] * pooled[name][row] for i, name in enumerate(names)))
        close(weighted(shuffled)[row], sum(w[i] * pooled[name][row] for i, name in enumerate(names)))
    close(weighted.weights, w)
    assert attention.score.bias is None


def test_literal() -> None:
    attention = AttentionFusion(1, ("image", "text")).double()
    with torch.no_grad():
        attention.score.weight.copy_(torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], dtype=torch.float64))
    fused, alpha = attention({"image": torch.ones(1, 1).double(), "text": torch.full((1, 1), 5.0).double()})
    close(alpha, np.array([[0.75, 0.25]]))
    close(fused, np.array([[0.75 + 0.25 * 5]]))


@pytest.mark.parametrize("name", FUSIONS)
def test_by_name_equals_projection_core_and_mean(name: str) -> None:
    embeddings, masks = batch(1, 3, [4, 2], [5, 3])
    fusion = build_fusion(name, {"image": 5, "text": 3}, 4).double().eval()
    got = fusion(poisoned(embeddings, masks), tensors(masks))
    assert isinstance(got, Fused)
    assert fusion.modalities == ("image", "text")
    projected = {
        n: x @ weight(fusion.projections[n]).T + fusion.projections[n].bias.detach().numpy()
        for n, x in embeddings.items()
    }
    means = {n: np.stack([x[r][masks[n][r]].mean(0) for r in range(3)]) for n, x in projected.items()}
    core = fusion.core
    if isinstance(core, SharedAttentionFusion):
        expected = np.stack([np.mean([*attend(core, projected, masks, r).values()], axis=0) for r in range(3)])
        assert got.weights is None
    elif isinstance(core, CoupledEncodersFusion):
        expected = core(tensors(projected), tensors(masks)).detach().numpy()
        assert got.weights is None
    elif isinstance(core, AttentionFusion):
        fused, alpha = core(tensors(means))
        expected = fused.detach().numpy()
        close(got.weights, alpha.detach().numpy())
    else:
        expected = core(tensors(means)).detach().numpy()
        close(got.weights, np.tile(core.weights.detach().numpy(), (3, 1)))
    close(got.vector, expected)
    # No masks: all tokens count.
    whole = fusion(tensors(embeddings), tensors({n: np.ones_like(m) for n, m in masks.items()})).vector
    close(fusion(tensors(embeddings)).vector, whole.detach().numpy())


@pytest.mark.parametrize("name", FUSIONS)
def test_gradients(name: str) -> None:
    embeddings, masks = batch(2, 2, [3, 2], [2, 3])
    torch.manual_seed(0)
    fusion = build_fusion(name, {"image": 2, "text": 3}, 2).double()
    image, text = tensors(embeddings).values()

    def vector(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return fusion({"image": image, "text": text}, tensors(masks)).vector

    assert torch.autograd.gradcheck(vector, (image.requires_grad_(), text.requires_grad_()))
    leaves = {n: x.requires_grad_() for n, x in poisoned(embeddings, masks).items()}
    # Squared, for the last layer norm of the encoders sums to a constant.
    vector(*leaves.values()).square().sum().backward()
    for n, leaf in leaves.items():
        assert (leaf.grad[~torch.from_numpy(masks[n])] == 0).all()
    # Biases of keys move all scores alike; everything else is reached.
    idle = [n for n, p in fusion.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert idle == []


def test_keeps_the_dtype() -> None:
    embeddings = {n: x.bfloat16() for n, x in tensors(batch(3, 2, [3, 2], [4, 4])[0]).items()}
    for name in FUSIONS:
        assert build_fusion(name, {"image": 4, "text": 4}, 4).bfloat16()(embeddings).vector.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FUSIONS)
def test_refuses(name: str) -> None:
    fusion = build_fusion(name, {"image": 4, "text": 3}, 4)
    good = {"image": torch.zeros(2, 3, 4), "text": torch.zeros(2, 5, 3)}
    masks = {n: torch.ones(x.shape[:2], dtype=torch.bool) for n, x in good.items()}
    with pytest.raises(ValueError, match="lacks modality 'text'"):
        fusion({"image": good["image"]}, masks)
    with pytest.raises(ValueError, match="unknown modality 'audio'"):
        fusion({**good, "audio": good["text"]})
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        fusion({**good, "text": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match="same batch size"):
        fusion({**good, "text": torch.zeros(1, 5, 3)})
    with pytest.raises(ValueError, match="must have the names"):
        fusion(good, {"image": masks["image"]})
    with pytest.raises(ValueError, match=r"bool \[2, 5\], got torch.float32"):
        fusion(good, {**masks, "text": torch.ones(2, 5)})
    masks["text"][1] = False
    with pytest.raises(ValueError, match="row 1 of the batch has no valid token of modality 'text'"):
        fusion(good, masks)


def test_cores_refuse() -> None:
    x = {"image": torch.zeros(2, 3, 4), "text": torch.zeros(2, 1, 4)}
    empty = {"image": torch.zeros(2, 3, dtype=torch.bool), "text": torch.tensor([[True], [False]])}
    with pytest.raises(ValueError, match="row 1 of the batch has no valid token of any modality"):
        SharedAttentionFusion(4)(x, empty)
    with pytest.raises(ValueError, match="row 0 of the batch has no valid token of modality 'image'"):
        CoupledEncodersFusion({"image": 4, "text": 4}, 2, 1, 2)(x, empty)
    with pytest.raises(ValueError, match="num_heads=3"):
        CoupledEncodersFusion({"image": 4, "text": 6}, 2, 1, 3)
    with pytest.raises(ValueError, match="lacks modality 'text'"):
        AttentionFusion(4, ("image", "text"))({"image": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match=r"\[2, 3, 4\]"):
        AttentionFusion(4, ("image", "text"))(x)
    with pytest.raises(ValueError, match=r"'text': \[2, 3\]"):
        WeightedSumFusion(("image", "text"))({"image": torch.zeros(2, 4), "text": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="distinct"):
        WeightedSumFusion(("image", "image"))
    with pytest.raises(ValueError, match="at least one modality"):
        SharedAttentionFusion(4)({})
    with pytest.raises(ValueError, match="unknown fusion 'sum'; choose shared_attention"):
        build_fusion("sum", {"image": 4}, 4)
    with pytest.raises(ValueError, match="at least one modality"):
        build_fusion("attention", {}, 4)
