"""A pretended accelerator: real numbers on the CPU, where mixing devices is an error and every wait is counted.

    register()                                  once, before the process's first backward pass
    policy = load_policy(section, device=DEVICE)
    with watched() as traffic:
        …                                       raises MixedDevices where a GPU would
    traffic.reads, traffic.writes               by the line that asked for each

A `DeviceTensor` keeps its numbers in a CPU tensor (`inner`) and says that it is on `DEVICE`, a backend that PyTorch
knows under its name for devices from outside (PrivateUse1). Whatever is done with such tensors comes through
`__torch_dispatch__`; tensors that are made there come through the backend's fallback. Both belong to no thread, so a
server's decode thread and autograd's are seen as well.

**What counts.** On CUDA the host waits for everything queued before it when it reads a number (`float(x)`, `.cpu()`,
`.tolist()`), when the shape of a result depends on numbers (`nonzero`, an index of bools), and when it copies something
from ordinary memory to the device without `non_blocking=True`. The first two are `reads`, the last `writes`.
"""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
_OURS = str(Path(__file__).parents[2] / "mmrl_ray") + "/"
_aten = torch.ops.aten
_SHAPED_BY_NUMBERS = frozenset(
    {
        *(_aten.nonzero.default, _aten.masked_select.default, _aten.equal.default, _aten.is_nonzero.default),
        *(_aten._unique2.default, _aten.unique_consecutive.default, _aten.unique_dim.default, _aten.bincount.default),
        *(_aten._local_scalar_dense.default, _aten.repeat_interleave.Tensor),
    }
)
"""Operators that a GPU cannot answer before the host has read something."""
_INTO_HOST = frozenset({_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default})
_INDEXED = frozenset(
    {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
)
_BOOLS = (torch.bool, torch.uint8)
_MADE_WHOLE = (
    *("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "logspace", "randperm"),
    *("tril_indices", "triu_indices"),
)
"""Operators that PyTorch would make of an empty tensor that it then resizes."""
_BELOW = ("empty.memory_format", "empty_strided", "copy_")
"""What `torch.tensor(data, device=…)` uses, below every `__torch_dispatch__` and every fallback."""


class MixedDevices(RuntimeError):
    """An operator was given tensors of two devices, which a GPU refuses."""


@dataclass(slots=True)
class Traffic:
    """What went between host and device; each `Counter` is by place, the project's line and the library's below it."""

    reads: Counter[str] = field(default_factory=Counter)
    """The host waited for a number, or for a shape that depends on numbers."""
    writes: Counter[str] = field(default_factory=Counter)
    """The host waited until something was copied to the device."""
    operators: Counter[str] = field(default_factory=Counter)
    """On the device, by name: about the number of kernels."""
    emptied: int = 0
    """How often the allocator was asked to give back what it kept."""

    def table(self) -> str:
        """Reads and writes, most frequent first, for messages."""
        kinds = (("read", self.reads), ("write", self.writes))
        rows = [(count, kind, place) for kind, counter in kinds for place, count in counter.items()]
        return "\n".join(f"{count:6} {kind:5} {place}" for count, kind, place in sorted(rows, reverse=True))


class _Module(backend_registration._DummyBackendModule):
    """What `torch.get_device_module` gives."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What `torch.autocast` may be asked for."""
        return [torch.bfloat16, torch.float16]

    free = 1 << 40
    """Bytes that it says to have left."""

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        """Free bytes and all, as of CUDA's."""
        return self.free, 1 << 40

    def empty_cache(self) -> None:
        """As the allocator of CUDA's; there is none here."""
        for traffic in _watching:
            traffic.emptied += 1


_watching: list[Traffic] = []
_kept: list[torch.library.Library] = []


def register() -> torch.device:
    """Makes the device known to PyTorch, for the rest of the process; returns it.

    Of this thread, backward passes run in the thread itself: autograd's own threads end the process when they come to a
    device whose guard is written in Python.
    """
    torch.autograd.set_multithreading_enabled(False)
    if not _kept:
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        # `module.to(device)` makes new parameters: the data of one that is on the CPU cannot become a `DeviceTensor`.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        anything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        anything.fallback(_called, "PrivateUse1")
        aten.impl("_local_scalar_dense", _read_scalar, "PrivateUse1")
        for name in (*_MADE_WHOLE, *_BELOW):
            aten.impl(name, partial(_called, _operator(name)), "PrivateUse1")
        _kept.extend((anything, aten))
    return torch.device(NAME)


@contextmanager
def watched() -> Iterator[Traffic]:
    """Within it, what goes between host and device is counted, in all threads."""
    traffic = Traffic()
    _watching.append(traffic)
    try:
        yield traffic
    finally:
        _watching.remove(traffic)


def device_bytes() -> int:
    """Of all tensors on the device that somebody still holds, views not counted again."""
    gc.collect()
    alive = [each.inner for each in gc.get_objects() if type(each) is DeviceTensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device."""

    inner: torch.Tensor
    """Its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """As `Tensor.data`; what is assigned takes the place of the numbers."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, DeviceTensor) or value.shape != self.shape:
            raise MixedDevices(f"the data of {self!r} cannot become {value!r}")
        self.inner = value.inner

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied: torch.Tensor = DeviceTensor(self.inner.detach().clone())
        memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def tolist(self) -> Any:
        """Read in one piece, as on a GPU."""
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """A GPU has none."""
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_aten, packet), overload or "default")


def _called(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(func, args, kwargs)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operator: is it allowed, does the host wait, and what comes out."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    there = kwargs.get("device")
    onto_device = torch.device(there).type == NAME if there is not None else here
    if func is _aten._to_copy.default:
        _note_copy(isinstance(args[0], DeviceTensor), onto_device, kwargs.get("non_blocking", False))
    elif func is _aten.copy_.default:
        onto_device = isinstance(args[0], DeviceTensor)
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if args[0].numel():  # of nothing, no copy is made
            _note_copy(isinstance(args[1], DeviceTensor), onto_device, non_blocking)
    elif func in _INDEXED:
        onto_device = isinstance(args[0], DeviceTensor)
        _check_index(func, args, onto_device)
    elif here and any(not isinstance(tensor, DeviceTensor) and tensor.dim() > 0 for tensor in tensors):
        kinds = [(NAME if isinstance(t, DeviceTensor) else "cpu", list(t.shape)) for t in tensors]
        raise MixedDevices(f"{func}: {kinds}")
    elif func in _SHAPED_BY_NUMBERS and not (func is _aten.repeat_interleave.Tensor and kwargs.get("output_size")):
        _note("reads", str(func))
        onto_device = func not in _INTO_HOST
    if onto_device:
        for traffic in _watching:
            traffic.operators[str(func)] += 1
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if not onto_device:
        return out
    out = tree_map(lambda x: DeviceTensor(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if here and func is not _aten._to_copy.default else out


def _plain(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _read_scalar(tensor: DeviceTensor) -> Any:
    _note("reads", "aten._local_scalar_dense")
    return tensor.inner.item()


def _note_copy(from_device: bool, onto_device: bool, non_blocking: bool) -> None:
    if from_device and not onto_device:
        _note("reads", "copy")
    elif onto_device and not from_device and not non_blocking:
        _note("writes", "copy")


def _check_index(func: Any, args: Any, on_device: bool) -> None:
    """An index may come from the CPU, at the price of a copy; anything else must be where the tensor is."""
    value = args[2] if len(args) > 2 else None
    # One number for all places of a mask is filled in without counting them.
    fills = value is not None and value.numel() == 1
    for index in args[1]:
        if index is None:
            continue
        if isinstance(index, DeviceTensor) and not on_device:
            raise MixedDevices(f"{func}: an index on the device for a tensor on the CPU")
        if on_device and not isinstance(index, DeviceTensor):
            _note("writes", "index")
        if on_device and index.dtype in _BOOLS and not fills:
            _note("reads", "index of bools")
    if value is not None and value.dim() > 0 and isinstance(value, DeviceTensor) != on_device:
        raise MixedDevices(f"{func}: values {list(value.shape)} of another device than the tensor's")


def _note(kind: str, what: str) -> None:
    if not _watching:
        return
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    ours = next((f for f in reversed(frames) if f.filename.startswith(_OURS)), None)
    last = frames[-1]
    place = f"{what} in {'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"
    if ours is not None and ours is not last:
        place += f", called in {ours.filename.removeprefix(_OURS)}:{ours.lineno}"
    for traffic in _watching:
        getattr(traffic, kind)[place] += 1
