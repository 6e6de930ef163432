"""Linear layers in float32 on the CPU by oneDNN.

PyTorch hands float32 products to MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which PyTorch
brings too, uses whatever the processor has: on an AMD core with AVX-512 it is twice as fast in both directions, and for
a single row too, where it reads weights that are not in the cache at twice the rate. Small products are left to MKL: it
sets them up in 2 µs where oneDNN takes 12.

Weights that stay as they are can be packed beforehand, into the order that oneDNN reads them in: a few rows then take
0.6 of the time, and hundreds 0.9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from mmrl_ray.policy.model import PlainLinear

_LARGE_PRODUCT = 1 << 20
"""Multiplications from which oneDNN is the faster."""
_LARGE_WEIGHT = 1 << 17
"""Elements from which a weight is read faster by oneDNN, however few the rows."""
_PACKED_FOR_ROWS = 256
"""oneDNN is told how many rows are to come; with this many it chooses an order that suits fewer as well."""
_MOST_PACKED_BYTES = 2 << 30
"""Packed weights lie in memory beside the others: of a model with more than this, none are."""


def use_onednn(model: nn.Module) -> None:
    """Lets every plain `nn.Linear` of `model` compute by oneDNN where it can: float32 on the CPU.

    Weights, names and state dicts stay as they are. Layers of a class of their own are left alone.
    """
    if not is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


def pack_weights(model: nn.Module) -> None:
    """Packs the weights of `model`'s oneDNN layers for products without a gradient; they must not change any more.

    Takes as much memory again as those weights do, so nothing happens where they are more than 2 GiB. A layer that is
    given another weight computes with that one, unpacked.
    """
    layers = [m for m in model.modules() if isinstance(m, OneDnnLinear) and _fits(m.weight)]
    if sum(layer.weight.nbytes for layer in layers) <= _MOST_PACKED_BYTES:
        for layer in layers:
            layer.pack()


def is_available() -> bool:
    """Whether this build of PyTorch has the operators."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


class OneDnnLinear(PlainLinear):
    """An `nn.Linear` that multiplies by oneDNN; the same numbers up to rounding."""

    _packed: tuple[int, torch.Tensor] | None = None
    """The address of the weight that was packed, and what it was packed into."""

    def pack(self) -> None:
        """See `pack_weights`."""
        packed = torch.ops.mkldnn._reorder_linear_weight.default(self.weight.detach(), _PACKED_FOR_ROWS)
        self._packed = self.weight.data_ptr(), packed

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}  # nothing copies or sends it

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[.., in] → [.., out]."""
        weight, bias = self.weight, self.bias
        large = weight.numel() >= _LARGE_WEIGHT or input.numel() * weight.shape[0] >= _LARGE_PRODUCT
        if not large or not _fits(input) or not _fits(weight) or input.numel() == 0 or torch.is_autocast_enabled("cpu"):
            return linear(input, weight, bias)
        if torch.is_grad_enabled():
            trains = weight.requires_grad or (bias is not None and bias.requires_grad)
            if input.requires_grad or trains:
                return _Product.apply(input, weight, bias)
        if self._packed is not None and self._packed[0] == weight.data_ptr():
            weight = self._packed[1]
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
    return tensor.dtype is torch.float32 and tensor.is_cpu


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return product
