"""Kernels and bytes of a forward or backward pass at full size, without weights and without a GPU.

What is made of a model's weights is fake: it has a shape, a dtype and a storage of so many bytes, and no numbers. Token
ids, masks and positions stay real, so that code which looks at them goes its usual way; a number that is read off a
fake tensor is 0.

    policy = fake(make_policy("meta", torch.bfloat16))     an adapter on it already, if it is to have one
    with Counted() as counted:
        scores = score_completions(policy, …)
    counted.kernels, counted.peak_bytes

Attention is counted as CUDA runs it: `scaled_dot_product_attention` with a mask is the memory-efficient kernel, which
takes the mask as numbers and keeps them for the backward pass; without one it is the flash kernel. So are norms, which
PyTorch computes in one kernel there.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmrl_ray.policy.model import Policy

_BLOCK = 512
"""Bytes that CUDA's allocator rounds up to."""
_LARGE = 1 << 20
"""Bytes from which a tensor made beside the model is fake, too."""
_ALIGNED = 8
"""Elements of a mask at whose multiples its rows have to begin: PyTorch's `preprocess_mask`."""
_MODE = FakeTensorMode(allow_non_fake_inputs=True)
_CPU = torch.device("cpu")
aten = torch.ops.aten
_NO_KERNEL = {
    *(aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default),
    *(aten.detach.default, aten._unsafe_view.default, aten.lift_fresh.default, aten._local_scalar_dense.default),
    *(aten.alias.default, aten.new_empty_strided.default, torch.ops.prim.device.default),
}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def fake(policy: Policy) -> Policy:
    """The policy itself, whose model was made on the meta device: it now says that it is on the CPU."""
    for module in policy.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter.data, FakeTensor):
                module._parameters[name] = _fake_parameter(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):
                module._buffers[name] = fake_tensor(buffer.shape, buffer.dtype)
    _tie(policy)
    policy.device, policy.bare_head = _CPU, True
    return policy


def _tie(policy: Policy) -> None:
    if getattr(policy.hf_model.config, "tie_word_embeddings", False):
        policy.hf_model.get_output_embeddings().weight = policy.hf_model.get_input_embeddings().weight


def _fake_parameter(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(fake_tensor(parameter.shape, parameter.dtype), requires_grad=parameter.requires_grad)


def fake_tensor(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """Of no numbers."""
    return FakeTensor(_MODE, torch.empty(shape, dtype=dtype, device="meta"), _CPU)


class Counted(TorchDispatchMode):
    """Within it, kernels and bytes of fake tensors are counted."""

    def __init__(self, *, autocast: torch.dtype | None = None) -> None:
        """`autocast`: of all within."""
        super().__init__()
        self.kernels = 0
        """Operators on fake tensors that launch something: no views, no bare allocations."""
        self.by_name: Counter[str] = Counter()
        """The same by operator."""
        self.live_bytes = 0
        """Of fake tensors made within and not gone yet; weights are none of them. After a forward pass this is what
        autograd keeps for the backward pass, and the result."""
        self.peak_bytes = 0
        self._seen: set[int] = set()
        self._autocast = autocast
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(_cuda_kernels())
        if self._autocast is not None:
            self._stack.enter_context(torch.autocast("cpu", self._autocast))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.__exit__(*error)

    def restart(self) -> None:
        """Counts kernels anew, and the peak from what is live."""
        self.kernels, self.peak_bytes = 0, self.live_bytes
        self.by_name.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)}
        if not given:
            made = func(*args, **kwargs)
            return tree_map_only(torch.Tensor, self._faked_if_large, made) if _makes(func) else made
        if func is aten._local_scalar_dense.default:
            return 0.0 if args[0].dtype.is_floating_point else 0
        if func in (aten.equal.default, aten.is_nonzero.default):
            return False
        if func in _INDEXED:
            args = (args[0], _as_numbers(args[1]), *args[2:])
        made = func(*args, **kwargs)
        if func not in _NO_KERNEL and not _is_view(func):
            self.kernels += 1
            self.by_name[func.overloadpacket.__name__] += 1
        for leaf in tree_leaves(made):
            if isinstance(leaf, FakeTensor) and leaf.untyped_storage()._cdata not in given:
                self._note(leaf)
        return made

    def _faked_if_large(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.nbytes < _LARGE or tensor.is_meta or isinstance(tensor, FakeTensor):
            return tensor
        made = fake_tensor(tensor.shape, tensor.dtype)
        self._note(made)
        return made

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = math.ceil(storage.nbytes() / _BLOCK) * _BLOCK
        self._seen.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live_bytes -= size


def _makes(func: Any) -> bool:
    """Whether an operator makes a tensor of no other."""
    return not any("Tensor" in str(argument.type) for argument in func._schema.arguments)


def _is_view(func: Any) -> bool:
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    return alias is not None and not alias.is_write


def _as_numbers(indices: Any) -> list[Any]:
    """Masks as the places that they are true at: their number is no secret, as it would be of fake ones."""
    found: list[Any] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8) and not isinstance(index, FakeTensor):
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


def _cuda_kernels() -> ExitStack:
    """Within it scaled dot products and norms are the operators that CUDA has, by whatever name a module calls them.

    (A mode would not do: none is on where a backward pass makes layers again.)
    """
    stack = ExitStack()
    for own, instead in ((nn.functional.scaled_dot_product_attention, _attend), (nn.functional.rms_norm, _normalize)):
        for module in list(sys.modules.values()):
            if vars(module).get(own.__name__) is own:
                stack.enter_context(mock.patch.object(module, own.__name__, instead))
    return stack


def _normalize(
    input: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    # CUDA's fused kernel is taken apart on other devices; this one launches and keeps as much.
    return torch.native_layer_norm(input, list(normalized_shape), weight, None, eps or 1e-6)[0]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is None and query.dtype != torch.float32:  # it takes grouped heads as they are
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    bias = attn_mask
    if bias is not None:
        if not isinstance(bias, FakeTensor):
            bias = _MODE.from_tensor(bias)
        if bias.dtype == torch.bool:
            bias = torch.where(bias, 0.0, torch.full((), -torch.inf, dtype=query.dtype))
        if any(stride % _ALIGNED for stride in bias.stride()[:-1]) or bias.stride(-1) != 1:
            missing = _ALIGNED - bias.shape[-1] % _ALIGNED
            bias = nn.functional.pad(bias, (0, missing))[..., : bias.shape[-1]]
        bias = bias.expand(*query.shape[:2], query.shape[2], key.shape[2])
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, wants_gradient, dropout_p, is_causal, scale=scale
    )[0]
