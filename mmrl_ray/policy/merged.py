"""An adapter added into a second copy of the weights that it adapts, for passes without gradient.

Each adapted layer then is one matrix product instead of three, which counts where the products are small: decoding.
The sum is exact up to rounding in float32. In a 16-bit dtype it would round the adapter away, and the policy that
samples would no longer be the one that learns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from mmrl_ray.errors import AdapterError
from mmrl_ray.policy.adapter import reference_policy


class MergedAdapter:
    """W + s·BA of every adapted layer, beside the W that the reference policy needs bit for bit.

    Raises:
        AdapterError: the model has no LoRA adapter, or its weights are not float32.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, PeftModel):
            raise AdapterError(f"{type(model).__name__} has no adapter to merge; add one first (add_adapter)")
        self._model = model
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        weights = [_weight(layer) for layer in self._layers]
        if other := {str(weight.dtype) for weight in weights} - {str(torch.float32)}:
            raise AdapterError(f"adapted weights of {', '.join(sorted(other))} would round the adapter away")
        self._merged = [weight.detach().clone() for weight in weights]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the adapter's present weights in."""
        for layer, merged in zip(self._layers, self._merged, strict=True):
            delta: torch.Tensor = layer.get_delta_weight(self._model.active_adapter)  # type: ignore[operator]
            torch.add(_weight(layer), delta, out=merged)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the model computes with the merged weights, and without a branch for the adapter."""
        own = [_weight(layer).data for layer in self._layers]
        with reference_policy(self._model):
            try:
                self._hold(self._merged)
                yield
            finally:
                self._hold(own)

    def _hold(self, weights: list[torch.Tensor]) -> None:
        for layer, weight in zip(self._layers, weights, strict=True):
            _weight(layer).data = weight


def _weight(layer: LoraLayer) -> nn.Parameter:
    return cast(nn.Parameter, layer.get_base_layer().weight)
