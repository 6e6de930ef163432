"""What makes a policy faster on a CPU, and changes nothing but rounding. Without this file all else works as it does.

`load.accelerate` looks for it by its name, which is the device's; nothing else knows of it.

**Linear layers in float32 by oneDNN.** PyTorch hands float32 products to MKL, which keeps to AVX2 on processors that
are not Intel's. oneDNN, which PyTorch brings too, uses whatever the processor has: on an AMD core with AVX-512 it is
twice as fast in both directions, and for a single row too, where it reads weights that are not in the cache at twice
the rate. Small products are left to MKL: it sets them up in 2 µs where oneDNN takes 12. Weights that stay as they are
can be packed beforehand, into the order that oneDNN reads them in: a few rows then take 0.6 of the time, and hundreds
0.9.

Weights that an adapter was added into change with each version, and are read at every decode step: they lie in memory
column by column (`by_column`), which oneDNN reads nearly as fast as packed ones: a step's 46 MB, 16 rows, in 6.9 ms
instead of 10.0.

**Adapters that learn in float32** (`use_fused_adapters`): an adapted layer is one step of autograd instead of nine. Its
branch is added to what the base gives as it is computed, without a product of its own to be scaled and added; the
branch's products, of which one side is 8 or 16 numbers wide, are put so that MKL or oneDNN takes the long side as rows,
two to four times as fast as the other way round.

**Attention of completions in float32** (`attend_completions`): those of a prompt attend to its keys where they lie,
all their queries in one product, and to their own in another; one softmax goes over both. A copy of the prompt's keys
for each of them would be made in every layer, kept for the backward pass, and its gradients summed: with eight
completions of 24 tokens behind 261, forward and backward together take 11 ms a layer instead of 18.

**Attention of a decode step in float32**: one query a sequence, over keys that no cache of the processor holds any
more. PyTorch's kernel reads keys and values at a third of the rate that memory gives, and takes them in blocks that
were made for many queries. As two batches of products, keys by queries and weights by values, the same takes about 0.8
of the time, from where it is more than a handful of calls. `B` sequences, `H` heads of queries, `H'` heads of keys,
`r = H / H'`, `K` keys, `d` head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmrl_ray.errors import ModelError
from mmrl_ray.policy.model import Acceleration, PlainLinear, Policy, SharedPrompts

_LARGE_PRODUCT = 1 << 20
"""Multiplications from which oneDNN is the faster."""
_LARGE_WEIGHT = 1 << 17
"""Elements from which a weight is read faster by oneDNN, however few the rows."""
_PACKED_FOR_ROWS = 256
"""oneDNN is told how many rows are to come; with this many it chooses an order that suits fewer as well."""
_MOST_PACKED_BYTES = 2 << 30
"""Packed weights lie in memory beside the others: of a model with more than this, none are."""
_NAME, _COMPLETIONS = "mmrl_decode_step", "mmrl_completions"
_MANY_KEYS = 1 << 18
"""Elements, B · H' · K · d, from which products are the faster: 1 MiB, what the cache of a core holds."""


def accelerate(model: nn.Module) -> Acceleration:
    """Has the linear layers of a model that was just loaded computed by oneDNN, and decode steps attend by `attend`."""
    use_onednn(model)
    return Acceleration(
        decode_step=decode_step_attention,
        pack_weights=pack_weights,
        completions=completions_attention,
        copy_weight=by_column,
        adapt=use_fused_adapters,
    )


def use_onednn(model: nn.Module) -> None:
    """Lets every plain `nn.Linear` of `model` compute by oneDNN where it can: float32 on the CPU.

    Weights, names and state dicts stay as they are. Layers of a class of their own, and quantised ones, are left alone.
    """
    if not is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and _is_plain(module.weight):
            module.__class__ = OneDnnLinear
            layer = cast(OneDnnLinear, module)
            small = layer.weight.numel() < _LARGE_WEIGHT
            layer._from = -(-_LARGE_PRODUCT // max(1, layer.weight.shape[0])) if small else 0


def pack_weights(model: nn.Module) -> None:
    """Packs the weights of `model`'s oneDNN layers for products without a gradient; they must not change any more.

    Takes as much memory again as those weights do, so nothing happens where they are more than 2 GiB. A layer that is
    given another weight computes with that one, unpacked.
    """
    layers = [m for m in model.modules() if isinstance(m, OneDnnLinear) and _fits(m.weight)]
    if sum(layer.weight.nbytes for layer in layers) <= _MOST_PACKED_BYTES:
        for layer in layers:
            layer.pack()


def by_column(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a weight [out, in] whose columns lie one behind the other, where oneDNN reads it whatever the rows."""
    read = is_available() and _fits(weight) and weight.ndim == 2 and weight.numel() >= _LARGE_WEIGHT
    return weight.detach().t().clone(memory_format=torch.contiguous_format).t() if read else weight.detach().clone()


def is_available() -> bool:
    """Whether this build of PyTorch has the operators."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


class OneDnnLinear(PlainLinear):
    """An `nn.Linear` that multiplies by oneDNN; the same numbers up to rounding."""

    _packed: tuple[int, torch.Tensor] | None = None
    """The address of the weight that was packed, and what it was packed into."""
    _from: int = 0
    """Elements of an input with fewer of which `takes` says no: a small model asks a thousand times a caption."""

    def pack(self) -> None:
        """Packs this layer's weight as it is now, for products without a gradient."""
        packed = torch.ops.mkldnn._reorder_linear_weight.default(self.weight.detach(), _PACKED_FOR_ROWS)
        self._packed = self.weight.data_ptr(), packed

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}  # nothing copies or sends it

    def takes(self, input: torch.Tensor) -> bool:
        """Whether oneDNN multiplies this one."""
        weight = self.weight
        large = weight.numel() >= _LARGE_WEIGHT or input.numel() * weight.shape[0] >= _LARGE_PRODUCT
        known = _fits(input) and _fits(weight) and not torch.is_autocast_enabled("cpu")
        return large and known and input.numel() > 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[.., in] → [.., out]."""
        if input.numel() < self._from or not self.takes(input):
            return linear(input, self.weight, self.bias)
        weight, bias = self.weight, self.bias
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


def use_fused_adapters(model: nn.Module) -> None:
    """Has LoRA layers on oneDNN's compute and learn in one step of autograd, where nothing but the adapter learns.

    Passes without a gradient, several adapters at a time and variants of LoRA stay with PEFT.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and isinstance(layer.get_base_layer(), OneDnnLinear):
            layer.forward = partial(_forward_adapted, layer, layer.forward)  # type: ignore[method-assign]


def _forward_adapted(
    layer: LoraLinear, own: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    if args or kwargs or layer.merged or layer.disable_adapters or not torch.is_grad_enabled():
        # Decode steps come here: PEFT's own way to an adapter that is off is as long as a small product.
        off = layer.disable_adapters and not (args or kwargs or layer.merged)
        return layer.base_layer(x) if off else own(x, *args, **kwargs)
    base, names = cast(OneDnnLinear, layer.get_base_layer()), layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or not base.takes(x):
        return own(x)
    (name,) = names
    down, up = cast(nn.Linear, layer.lora_A[name]), cast(nn.Linear, layer.lora_B[name])
    others = [parameter for parameter in (base.weight, base.bias, down.bias, up.bias) if parameter is not None]
    plain = name not in layer.lora_variant and isinstance(layer.lora_dropout[name], nn.Identity)
    if not plain or len(others) > 1 + (base.bias is not None) or any(p.requires_grad for p in others):
        return own(x)
    if not (_fits(down.weight) and _fits(up.weight)):
        return own(x)
    return _Adapted.apply(x, base.weight, base.bias, down.weight, up.weight, layer.scaling[name])


class _Adapted(torch.autograd.Function):
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ, with W and b as they are. x [.., in], W [out, in], A [r, in], B [out, r]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        inner = _multiply(x.reshape(-1, x.shape[-1]), down, None)  # [M, r]
        made = _multiply(x, weight, bias)
        made.view(-1, made.shape[-1]).addmm_(inner, up.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scaling = scaling
        return made

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, weight.shape[0])
        to_inner = _multiply(grad, up.t(), None).mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = _multiply(grad, weight.t(), None).addmm_(to_inner, down).view(x.shape)
        # (Gᵀ H)ᵀ: the other way round the product takes four times as long.
        to_up = ((inner * ctx.scaling).t() @ grad).t()
        return to_x, None, None, to_inner.t() @ rows, to_up, None


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether it is a tensor as any other: torchao keeps quantised numbers in one that says it is float32."""
    return type(weight) in (nn.Parameter, torch.Tensor)


def _fits(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return product


@contextmanager
def decode_step_attention(policy: Policy) -> Iterator[None]:
    """Within it, the language model's layers attend by `attend`, where that is the faster way: else nothing changes."""
    config = policy.hf_model.config.get_text_config()
    own = config._attn_implementation_internal
    if own != "sdpa" or policy.device.type != "cpu" or policy.dtype != torch.float32:
        yield
        return
    values = vars(config)  # a config looks through what it is made of at every attribute that is set
    values["_attn_implementation_internal"] = _NAME
    try:
        yield
    finally:
        values["_attn_implementation_internal"] = own


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, for one query a row; hands everything else on to "sdpa".

    Args:
        module: the attention layer.
        query: [B, H, 1, d].
        key: [B, H', K, d].
        value: [B, H', K, d].
        attention_mask: [B, 1, 1, K], bool or added to the scores, or None.
        scaling: of the scores, 1 / √d by default.
        kwargs: what "sdpa" takes beside these.

    Returns:
        [B, 1, H, d] and None.
    """
    (batch, heads, queries, width), groups = query.shape, key.shape[1]
    few = queries != 1 or key.numel() < _MANY_KEYS
    per_head = attention_mask is not None and attention_mask.shape[1] != 1
    if few or per_head or any(kwargs.get(name) is not None for name in ("softcap", "position_bias")):
        mask = _added(attention_mask, query.dtype)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    scaled = query.reshape(batch, groups, heads // groups, width) * (width**-0.5 if scaling is None else scaling)
    scores = torch.matmul(key, scaled.transpose(2, 3)).transpose(2, 3)  # [B, H', r, K]
    if attention_mask is not None:
        is_bool = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if is_bool else scores + attention_mask
    mixed = torch.matmul(torch.softmax(scores, dim=-1), value)  # [B, H', r, d]
    return mixed.reshape(batch, 1, heads, value.shape[-1]), None


@contextmanager
def completions_attention(policy: Policy) -> Iterator[bool]:
    """Within it, the language model's layers attend by `attend_completions`, where that can be."""
    config = policy.hf_model.config.get_text_config()
    own = config._attn_implementation_internal
    if own != "sdpa" or policy.device.type != "cpu" or policy.dtype != torch.float32:
        yield False
        return
    config._attn_implementation_internal = _COMPLETIONS
    try:
        yield True
    finally:
        config._attn_implementation_internal = own


def attend_completions(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, for completions that see the prompts of `key.prompts` and themselves.

    Args:
        module: the attention layer.
        query: [N, H, T, d], N = K · G.
        key: [N, H', T, d], with `SharedPrompts`; without them "sdpa" takes everything.
        value: [N, H', T, d].
        attention_mask: [N or 1, 1, T, P + T], bool or added to the scores; None where T = 1 and all is seen.
        scaling: of the scores, 1 / √d by default.
        kwargs: what "sdpa" takes beside these.

    Returns:
        [N, T, H, d] and None.

    Raises:
        ModelError: the model has made other keys of those that the cache gave it.
    """
    prompts: SharedPrompts | None = getattr(key, "prompts", None)
    if prompts is None:
        if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise ModelError(f"{type(module).__name__} computes with its cache's keys before it attends to them")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (_, heads, tokens, width), groups = query.shape, key.shape[1]
    other = any(kwargs.get(name) is not None for name in ("softcap", "position_bias")) or kwargs.get("dropout")
    one_mask = tokens == 1 if attention_mask is None else attention_mask.shape[1] == 1
    # What is kept for the backward pass: weights here, there a copy of the keys and values for each completion.
    if other or not one_mask or tokens * heads > 2 * width * groups:
        key, value = (
            torch.cat([shared.repeat_interleave(prompts.repeats, dim=0), own], dim=2)
            for shared, own in ((prompts.keys, key), (prompts.values, value))
        )
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    added = _added(attention_mask, query.dtype)
    scale = width**-0.5 if scaling is None else scaling
    return _Shared.apply(query, prompts.keys, prompts.values, key, value, added, scale), None


class _Shared(torch.autograd.Function):
    """Softmax over prompts [K, H', P, d] and completions' own [K·G, H', T, d]; query [K·G, H, T, d], r = H / H'."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        prompt_keys: torch.Tensor,
        prompt_values: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        added: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        (rows, heads, tokens, _), (prompts, groups, seen, _) = query.shape, prompt_keys.shape
        ctx.sizes = _Sizes(prompts, rows // prompts, groups, heads // groups, tokens)
        ctx.scale = scale
        folded = _by_prompt(query, ctx.sizes)  # [K, H', G, r·T, d]
        keys, values = _by_prompt(keys, ctx.sizes), _by_prompt(values, ctx.sizes)  # [K, H', G, T, d]
        weights = query.new_empty(*folded.shape[:-1], seen + tokens)
        weights.flatten(2, 3)[..., :seen] = torch.matmul(folded.flatten(2, 3), prompt_keys.transpose(2, 3))
        weights[..., seen:] = torch.matmul(folded, keys.transpose(3, 4))
        weights.mul_(scale)
        if added is not None:
            of_rows = added.expand(rows, -1, -1, -1).unflatten(0, (prompts, -1))  # [K, G, 1, T, P + T]
            weights.unflatten(3, (-1, tokens)).add_(of_rows[:, None])
        weights = torch.softmax(weights, dim=-1)
        ctx.save_for_backward(folded, prompt_keys, prompt_values, keys, values, weights)
        mixed = torch.matmul(weights[..., seen:], values)
        mixed.flatten(2, 3).add_(torch.matmul(weights.flatten(2, 3)[..., :seen], prompt_values))
        return _by_row(mixed, ctx.sizes).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        folded, prompt_keys, prompt_values, keys, values, weights = ctx.saved_tensors
        seen = prompt_keys.shape[2]
        grad = _by_prompt(grads[0].transpose(1, 2), ctx.sizes)
        to_weights = torch.empty_like(weights)
        to_weights.flatten(2, 3)[..., :seen] = torch.matmul(grad.flatten(2, 3), prompt_values.transpose(2, 3))
        to_weights[..., seen:] = torch.matmul(grad, values.transpose(3, 4))
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        of_prompts, own = to_scores.flatten(2, 3)[..., :seen], to_scores[..., seen:]
        to_query = torch.matmul(own, keys)
        to_query.flatten(2, 3).add_(torch.matmul(of_prompts, prompt_keys))
        return (
            _by_row(to_query, ctx.sizes),
            torch.matmul(of_prompts.transpose(2, 3), folded.flatten(2, 3)),
            torch.matmul(weights.flatten(2, 3)[..., :seen].transpose(2, 3), grad.flatten(2, 3)),
            _by_row(torch.matmul(own.transpose(3, 4), folded), ctx.sizes),
            _by_row(torch.matmul(weights[..., seen:].transpose(3, 4), grad), ctx.sizes),
            None,
            None,
        )


class _Sizes(NamedTuple):
    """K prompts with G completions of T tokens each; H' groups of r heads."""

    prompts: int
    repeats: int
    groups: int
    heads: int
    tokens: int


def _by_prompt(rows: torch.Tensor, sizes: _Sizes) -> torch.Tensor:
    """[K·G, H' or H' · r, T, d] → [K, H', G, T or r·T, d]."""
    split = rows.unflatten(0, (sizes.prompts, -1)).unflatten(2, (sizes.groups, -1))
    return split.transpose(1, 2).flatten(3, 4).contiguous()


def _by_row(folded: torch.Tensor, sizes: _Sizes) -> torch.Tensor:
    """Back again."""
    split = folded.unflatten(3, (-1, sizes.tokens)).transpose(1, 2)  # [K, G, H', r or 1, T, d]
    return split.flatten(2, 3).flatten(0, 1)


_last_mask: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None
"""The mask that `_added` saw last, how often it had been written to, and what was made of it."""


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as numbers of `dtype` that are added to the scores. PyTorch would make them of a bool in every layer, and
    all layers of a pass are given one tensor."""
    global _last_mask
    if mask is None or mask.dtype != torch.bool:
        return mask
    known = _last_mask
    if known is not None and known[0]() is mask and known[1] == mask._version and known[2].dtype == dtype:
        return known[2]
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    _last_mask = (weakref.ref(mask), mask._version, added)
    return added


AttentionInterface.register(_NAME, attend)
AttentionInterface.register(_COMPLETIONS, attend_completions)
AttentionMaskInterface.register(_NAME, sdpa_mask)
AttentionMaskInterface.register(_COMPLETIONS, sdpa_mask)
