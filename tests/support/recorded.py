"""A stand-in for a CUDA graph on the CPU: records operators with their tensors, and does the same ones again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrl_ray.policy.model import Captured


class Recorder:
    """As `Acceleration.capture`: recording computes nothing that stays, and a replay runs no Python of the function.

    Whatever the function reads of Python is what it was when it was recorded, as in a graph.
    """

    def __init__(self, *, refuses: bool = False) -> None:
        self.captures = self.replays = 0
        self._refuses = refuses

    def __call__(self, function: Callable[[], tuple[torch.Tensor, ...]]) -> Captured | None:
        self.captures += 1
        if self._refuses:
            return None
        with _Tape() as tape:
            made = function()
        for tensor, before in reversed(tape.written):
            tensor.copy_(before)

        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, out in tape.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                        old.copy_(new)

        return Captured(replay, made)


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.written += [(args[0], args[0].clone())]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number is read while a step is recorded")
        self.calls.append((func, args, kwargs or {}, out))
        return out
