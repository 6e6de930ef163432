"""Which adapter each row of a forward pass goes through.

Rows that share one adapter take PEFT's ordinary path with that adapter active, and rows of the base one with every
adapter off: both as fast as a model with one adapter or none. Only a batch of several adapters takes PEFT's
`adapter_names`, which gathers each adapter's rows in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from mmrl_ray.policy.model import Policy

BASE = "__base__"
"""PEFT's name for a row without adapter."""


class RowAdapters:
    """Switches the adapters of one policy from pass to pass. For the thread that runs the model."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._layers: list[Any] = []
        self._active: str | None = None
        self.adapts_vision = False
        """Whether vision features depend on the adapter."""
        self.refresh()

    def refresh(self) -> None:
        """Looks at the model again, after an adapter was put on it or taken off."""
        model = self._policy.model
        self._layers = [m for m in model.modules() if isinstance(m, LoraLayer)] if isinstance(model, PeftModel) else []
        self._active = None
        self.adapts_vision = self._policy.vision_trainable

    @contextmanager
    def on(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it, row i of a batch of `len(names)` goes through the adapter `names[i]`, a PEFT name or `BASE`.

        None in every place leaves the model as it is.

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
            self._activate(next(str(name) for name in names if name != BASE))  # a disabled layer reads no names
            hook = partial(_name_rows, list(names))
            handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in self._layers]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

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


def _name_rows(
    names: list[str | None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
