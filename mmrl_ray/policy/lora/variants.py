"""What kinds of LoRA differ in: the weight they make of a base's, first weights, dropout, modules that train whole.

    plain, rsLoRA      W + s·BA, s = alpha / r or alpha / √r
    DoRA               m ⊙ (W + s·BA) / ‖W + s·BA‖, a magnitude m and a norm for each output (arXiv:2402.09353)
    orthogonal         B = R q_even, A = q_oddᵀ Rᵀ of the rows of one orthogonal matrix, so that BA = 0
    trained whole      a float32 copy of a module beside the frozen one, whatever the model's dtype

W [out, in], A [r, in], B [out, r], m [out].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

_SPREAD = 0.1
"""Of orthogonal first weights, as PEFT has it."""


@torch.no_grad()
def merged_weight(layer: Any, adapter: str) -> torch.Tensor:
    """What a layer computes with, adapter and all, as one weight in float32; the base's must be numbers.

    Args:
        layer: PEFT's.
        adapter: PEFT's name of it.
    """
    weight: torch.Tensor = layer.get_delta_weight(adapter).float()
    torch.add(layer.get_base_layer().weight, weight, out=weight)
    if is_dora(layer, adapter):
        magnitude = layer.lora_magnitude_vector[adapter].weight
        weight *= (magnitude / torch.linalg.norm(weight, dim=1))[:, None]
    return weight


def is_dora(layer: Any, adapter: str) -> bool:
    """Whether an adapted layer has a magnitude that trains."""
    return adapter in getattr(layer, "lora_magnitude_vector", ())


def saved_wrappers(model: nn.Module) -> list[ModulesToSaveWrapper]:
    """Where modules train whole, in the model's order."""
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def keep_in_float32(model: nn.Module) -> None:
    """Has modules that train whole do so in float32: steps of an optimiser are lost in the rounding of 16 bits.

    What they are given is cast to it, and what they give is cast back to the base's dtype.
    """
    for wrapper in saved_wrappers(model):
        for copy in wrapper.modules_to_save.values():
            dtype = next(p.dtype for p in wrapper.original_module.parameters())
            if dtype != torch.float32:
                copy.float()
                copy.forward = partial(_in_float32, copy.forward, dtype)


def back_to_the_base_dtype(model: nn.Module) -> None:
    """Undoes `keep_in_float32`, for modules that are about to take the place of the base's."""
    for wrapper in saved_wrappers(model):
        for copy in wrapper.modules_to_save.values():
            forward: Any = copy.forward
            if isinstance(forward, partial) and forward.func is _in_float32:
                own, dtype = forward.args
                copy.to(dtype).forward = own


def _in_float32(own: Callable[..., Any], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    args = tuple(_cast(each, torch.float32) for each in args)
    given = own(*args, **{name: _cast(value, torch.float32) for name, value in kwargs.items()})
    return tuple(_cast(each, dtype) for each in given) if isinstance(given, tuple) else _cast(given, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@torch.no_grad()
def draw_orthogonal(model: nn.Module, seed: int) -> None:
    """First weights of every adapter of `model` whose product is 0 although neither factor is.

    Drawn on the CPU in float32: the same for a seed on any device, whatever the base's dtype. Ranks are even.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name, down in layer.lora_A.items():
            up = layer.lora_B[name]
            rank, inputs = down.weight.shape
            rows, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
            half = rank // 2
            first = (torch.randn(inputs, half, generator=generator) @ rows[0::2]).t() * _SPREAD
            second = torch.randn(len(up.weight), half, generator=generator) @ rows[1::2] * _SPREAD
            down.weight.copy_(first)
            up.weight.copy_(second)


@contextmanager
def dropout_on(model: nn.Module) -> Iterator[None]:
    """Within it the adapter's dropout drops, where it has any: for passes that it learns by, and no others."""
    dropouts = [
        module
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for module in layer.lora_dropout.values()
        if isinstance(module, nn.Dropout)
    ]
    for module in dropouts:
        module.train()
    try:
        yield
    finally:
        for module in dropouts:
            module.eval()


def has_dropout(model: nn.Module) -> bool:
    """Whether passes within `dropout_on` draw anything."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return any(isinstance(module, nn.Dropout) for layer in layers for module in layer.lora_dropout.values())
