"""Which adapter's weights a forward pass goes through: each row its own, or all of them one version's.

Rows that share one adapter take PEFT's ordinary path with that adapter active, and rows of the base one with every
adapter off: both as fast as a model with one adapter or none. In a batch of several adapters, the layers compute the
base's part and each adapter's is added to its own rows. That is what PEFT's `adapter_names` does, which makes its
indices of Python lists anew in every layer: three waits of the host an adapter and layer, 1,500 a step with two
adapters on 252 layers. Here they are on the device already, and nothing waits.

A run's one adapter takes the weights of one version after another's. It may be added into a second copy of the weights
that it adapts, for passes without gradient: each adapted layer then is one matrix product instead of three and, in a
16-bit dtype, three more kernels around them, which counts where the products are small, in decoding. The sum is made in
float32 and rounded once, to the base's dtype. In 16 bits that drops of a small adapter what the branch drops too, whose
result is rounded to the same dtype when it has been added to the base's: of bfloat16 layers 2048 wide, with adapters
from 1e-4 to 1e-1 of the base's weights, either kept as much of the adapter, with the same error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from mmrl_ray.errors import AdapterError
from mmrl_ray.policy.heads import decoding_heads, split_heads
from mmrl_ray.policy.lora.adapter import adapter_state, branches_off, load_adapter_state
from mmrl_ray.policy.lora.variants import merged_weight
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.quantized import is_quantized

Rows = list[tuple[str, torch.Tensor]]
"""Of each adapter of a batch but the base, the rows that go through it: int64, on the device."""
BASE = "__base__"
"""PEFT's name for a row without adapter."""
_MOST_OF_FREE_MEMORY = 0.3
"""For merged copies, of what a GPU has left once the model is on it: keys and pictures want the rest."""
_MOST_BATCHES = 64
"""Batches whose rows are remembered: more than are ever decoded at the same time."""


class RowAdapters:
    """Switches the adapters of one policy from pass to pass. For the thread that runs the model."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._layers: list[Any] = []
        self._active: str | None = None
        self._rows: dict[tuple[str, ...], Rows] = {}
        """By the adapters of a batch's rows."""
        self.adapts_vision = False
        """Whether vision features depend on the adapter."""
        self.refresh()

    def refresh(self) -> None:
        """Looks at the model again, after an adapter was put on it or taken off."""
        model = self._policy.model
        self._layers = [m for m in model.modules() if isinstance(m, LoraLayer)] if isinstance(model, PeftModel) else []
        self._active = None
        self._rows.clear()
        self.adapts_vision = self._policy.vision_trainable

    @contextmanager
    def on(self, names: Sequence[str | None], rows: Rows | None = None) -> Iterator[None]:
        """Within it, row i of a batch of `len(names)` goes through the adapter `names[i]`, a PEFT name or `BASE`.

        None in every place leaves the model as it is. `rows` is what `rows_of` gave for the names; who has it and keeps
        it may record the pass.

        Raises:
            ValueError: some of `names` are None and some are not.
        """
        distinct = set(names)
        if distinct == {None}:
            yield
        elif None in distinct:
            raise ValueError("rows with a named adapter and rows with whichever is active cannot share a pass")
        elif len(distinct) == 1:
            self._activate(str(names[0]))
            yield
        else:
            self._activate(BASE)
            hook = partial(_add_branches, self.rows_of(names) if rows is None else rows)
            handles = [layer.register_forward_hook(hook) for layer in self._layers]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def rows_of(self, names: Sequence[str | None]) -> Rows:
        """The same ones at each step of a decode loop."""
        key = tuple(map(str, names))
        if key not in self._rows:
            if len(self._rows) >= _MOST_BATCHES:
                self._rows.clear()
            self._rows[key] = [
                (name, self._policy.place(torch.tensor([i for i, each in enumerate(key) if each == name])))
                for name in dict.fromkeys(key)
                if name != BASE
            ]
        return self._rows[key]

    def _activate(self, name: str) -> None:
        if name == self._active:
            return
        for layer in self._layers:
            if name == BASE:
                layer.enable_adapters(False)
            else:
                if layer.disable_adapters:
                    layer.enable_adapters(True)
                layer.set_adapter([name], inference_mode=True)
        self._active = name


def _add_branches(rows: Rows, layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Adds each adapter's branch to what the base makes of its rows, as PEFT computes it."""
    for name, index in rows:
        if name in layer.lora_A:
            down, up = layer.lora_A[name], layer.lora_B[name]
            branch = up(down(args[0].index_select(0, index).to(down.weight.dtype))) * layer.scaling[name]
            output.index_add_(0, index, branch.to(output.dtype))
    return output


class VersionedPolicy:
    """A policy with an adapter, for passes without gradient. One thread at a time."""

    def __init__(self, policy: Policy) -> None:
        """Freezes every weight of `policy`; its adapter as it stands is the one that `load` calls "as it was made"."""
        self.policy = policy
        self.adapts_vision = policy.vision_trainable
        """Whether vision features change with the version: then they are neither kept nor shipped."""
        policy.model.requires_grad_(False)
        self._as_made = adapter_state(policy.model)
        self._merged = MergedAdapter(policy.model, policy.acceleration.copy_weight) if _merges(policy) else None
        self._version: int | None = None

    def load(self, version: int, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Makes these the adapter's weights and the value heads; does nothing where `version` is loaded already.

        Args:
            version: of the policy.
            weights: the adapter's, and value heads or none; None: the adapter as it was made.

        Raises:
            AdapterError: the weights do not fit the adapter, or the value heads the model.
        """
        if version == self._version:
            return
        self._version = None  # whatever goes wrong in between, the next call loads again
        adapter, heads = split_heads(self._as_made if weights is None else weights)
        load_adapter_state(self.policy.model, adapter)
        self.policy.value_heads.clear()
        if heads:
            self.policy.value_heads[None] = decoding_heads(self.policy, heads)
        if self._merged is not None:
            self._merged.refresh()
        self._version = version

    def merged(self) -> AbstractContextManager[None]:
        """Within it the adapter is merged, where that saves time."""
        return self._merged.active() if self._merged is not None else nullcontext()


def _merges(policy: Policy) -> bool:
    """Whether a second copy of the adapted weights is worth its memory and there is room for it.

    In 16 bits it is on a device that waits for kernels to be launched, but not on a CPU, where products take the time.
    """
    if any(isinstance(m, LoraLayer) and is_quantized(m.get_base_layer()) for m in policy.model.modules()):
        return False  # the copy would be what quantisation saves
    if policy.device.type == "cpu":
        return policy.dtype == torch.float32
    if policy.device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(policy.device)
    copies = sum(_weight(m).nbytes for m in policy.model.modules() if isinstance(m, LoraLayer))
    return copies <= _MOST_OF_FREE_MEMORY * free


class MergedAdapter:
    """`merged_weight` of every adapted layer, beside the W that the reference policy needs bit for bit. Modules that
    train whole are what they are.

    Args:
        model: with its adapter.
        copy: makes the tensors that hold the sums (`Acceleration.copy_weight`).

    Raises:
        AdapterError: the model has no LoRA adapter, or its weights are no floating-point numbers of 16 or 32 bits.
    """

    def __init__(self, model: nn.Module, copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> None:
        if not isinstance(model, PeftModel):
            raise AdapterError(f"{type(model).__name__} has no adapter to merge; add one first (add_adapter)")
        self._model = model
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        weights = [_weight(layer) for layer in self._layers]
        if other := {weight.dtype for weight in weights} - {torch.float32, torch.bfloat16, torch.float16}:
            named = ", ".join(sorted(map(str, other)))
            raise AdapterError(f"adapted weights of {named} cannot take an adapter in; use a base of 16 or 32 bits")
        self._merged = [copy(weight.detach()) for weight in weights]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the adapter's present weights in."""
        for layer, merged in zip(self._layers, self._merged, strict=True):
            weight = merged_weight(layer, str(self._model.active_adapter))
            # Transposed, a copy into columns is PyTorch's fast one.
            by_column = merged.ndim == 2 and merged.t().is_contiguous()
            (merged.t() if by_column else merged).copy_(weight.t() if by_column else weight)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the model computes with the merged weights, and without a branch for the adapter."""
        own = [_weight(layer).data for layer in self._layers]
        with branches_off(self._layers):
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
