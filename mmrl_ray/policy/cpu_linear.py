"""Linear layers in float32 on the CPU by oneDNN.

PyTorch hands float32 products to MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which PyTorch
brings too, uses whatever the processor has: on an AMD core with AVX-512 it is twice as fast in both directions, and for
a single row too, where it reads weights that are not in the cache at twice the rate. Small products are left to MKL: it
sets them up in 2 µs where oneDNN takes 12.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

_LARGE_PRODUCT = 1 << 20
"""Multiplications from which oneDNN is the faster."""
_LARGE_WEIGHT = 1 << 17
"""Elements from which a weight is read faster by oneDNN, however few the rows."""


def use_onednn(model: nn.Module) -> None:
    """Lets every plain `nn.Linear` of `model` compute by oneDNN where it can: float32 on the CPU.

    Weights, names and state dicts stay as they are. Layers of a class of their own are left alone.
    """
    if not is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


def is_available() -> bool:
    """Whether this build of PyTorch has the operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class OneDnnLinear(nn.Linear):
    """An `nn.Linear` that multiplies by oneDNN; the same numbers up to rounding."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[.., in] → [.., out]."""
        weight, bias = self.weight, self.bias
        large = weight.numel() >= _LARGE_WEIGHT or input.numel() * weight.shape[0] >= _LARGE_PRODUCT
        if not large or not _fits(input) or not _fits(weight) or input.numel() == 0 or torch.is_autocast_enabled("cpu"):
            return linear(input, weight, bias)
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if torch.is_grad_enabled() and (input.requires_grad or trains):
            return _Product.apply(input, weight, bias)
        return _multiply(input, weight, bias)


class _Product(torch.autograd.Function):
    """x Wᵀ + b, whose operator knows no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grads[0].flatten(0, -2)  # [M, out]
        to_x = _multiply(grads[0], weight.t(), None) if needs_x else None
        to_weight = _multiply(grad.t(), x.flatten(0, -2).t(), None) if needs_weight else None
        return to_x, to_weight, grad.sum(0) if needs_bias else None


def _fits(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return product
