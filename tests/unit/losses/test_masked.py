import math

import pytest
import torch

from mmrl_ray.losses.aggregation import masked_mean, masked_sum


def test_literal() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_sum(values, mask).item() == 8.0
    assert masked_sum(values, mask, dim=1).tolist() == [1.0, 7.0]
    assert masked_mean(values, mask, denominator=16).item() == 0.5


def test_masked_nan_reaches_neither_sum_nor_gradient() -> None:
    values = torch.tensor([1.0, math.nan, -math.inf], requires_grad=True)
    total = masked_sum(values, torch.tensor([True, False, False]))
    total.backward()
    assert total.item() == 1.0
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0, 0.0]


def test_micro_batches_add_up() -> None:
    values = torch.randn(6, 5, dtype=torch.float64)
    mask = torch.rand(6, 5) < 0.6
    parts = [masked_mean(values[i : i + 2], mask[i : i + 2], denominator=mask.sum()) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), values[mask].mean(), rtol=1e-12, atol=0)


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"\[2, 2\], got \[2\]"):
        masked_sum(torch.zeros(2, 2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="float32"):
        masked_sum(torch.zeros(2), torch.ones(2))
    for denominator in (0, -1, math.nan):
        with pytest.raises(ValueError, match="denominator"):
            masked_mean(torch.zeros(2), torch.ones(2, dtype=torch.bool), denominator=denominator)
