"""Bases whose linear layers are kept quantised: which ones, what makes them, what multiplies by them, what they hold.

    config ──▶ which linear layers ──▶ transformers' quantiser, as weights are read ──▶ `use_one_product`

A policy has to say the same of the same tokens in every process and every pass, or the ratio between sampler and
learner is not 1. So a product here is always the same one: the weight as it is kept, made into numbers of the input's
dtype, times the input, forward and backward (`_Product`; the numbers are made again in the backward pass instead of
being kept). bitsandbytes by itself does other things, which is why it is not asked:

- 8 bits: in train mode it multiplies weights, in eval mode quantised inputs too, and a large number in one row changes
  how all rows of the batch are rounded.
- 4 bits on a CPU with AVX-512 and bfloat16: a layer in eval mode repacks its weights at the first pass without a
  gradient, which changes the numbers and fails where a row is no multiple of a block.
- 4 bits on a CPU: its kernel reads scales row by row, and gives wrong numbers where a row is no multiple of a block.

On a GPU its own kernels for 4 bits are kept. torchao's int8 weights are made into numbers by torchao in the same way,
on every device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig, PreTrainedModel

from mmrl_ray.config.policy import PARTS, QuantizationSection
from mmrl_ray.errors import ConfigError

_BLOCK, _SUPERBLOCK = 64, 256
"""Weights that share a scale, and scales that share one, of bitsandbytes' 4 bits."""
_FLOAT32 = 4
_OFFSET, _VALUES, _SCALES = 4, 16 * _FLOAT32, 256 * _FLOAT32
"""Bytes that a layer has once: an offset of the scales, and the tables of what 4 and 8 bits stand for."""


def require(section: QuantizationSection, path: str, device: torch.device) -> None:
    """Refuses what this machine cannot do.

    Raises:
        ConfigError: the library is not installed, or the device is neither a CPU nor a CUDA GPU.
    """
    missing = [name for name in (section.library, "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"model.quantization.kind={section.kind} needs {' and '.join(missing)}, which is not installed: "
            f"pip install 'mmrl_ray[{section.library}]'"
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"model.quantization.kind={section.kind}: {path} was to be quantised on {device}, and that works on CPUs "
            "and CUDA GPUs: take model.quantization away"
        )


def refuse_quantized_twice(section: QuantizationSection, config: Any, path: str) -> None:
    """Raises ConfigError where the checkpoint itself is quantised."""
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise ConfigError(
            f"model {path!r} is quantised already ({method}), and model.quantization.kind={section.kind} quantises "
            "weights of 16 or 32 bits: take model.quantization away, or name the checkpoint that it was made from"
        )


def quantized_layers(model: PreTrainedModel, section: QuantizationSection) -> list[str]:
    """Full names of the linear layers that are kept quantised, in the model's order; the model may be without weights.

    Raises:
        ConfigError: a name in `unquantized` fits no layer, there is nothing left to quantise, or a head that shares the
            embedding's weight is to be quantised.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    part = _parts(model, names)
    for wanted in section.unquantized:
        if wanted not in PARTS and not any(_is_suffix(wanted, name) for name in names):
            raise ConfigError(
                f"model.quantization.unquantized: {wanted!r} is neither {', '.join(PARTS)} nor the end of a linear "
                f"layer's name; the model has {', '.join(sorted({name.rsplit('.', 1)[-1] for name in names}))}"
            )
    found = [
        name
        for name in names
        if part[name] not in section.unquantized and not any(_is_suffix(each, name) for each in section.unquantized)
    ]
    if not found:
        raise ConfigError(
            f"model.quantization.unquantized={section.unquantized} leaves nothing to quantise: take some away, or "
            "model.quantization"
        )
    head = model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight
    if tied and any(part[name] == "head" for name in found):
        raise ConfigError(
            "model.quantization.unquantized: the model's head has the embedding's weight, which is looked up and not "
            "multiplied by: write head among them"
        )
    return found


def loading_arguments(section: QuantizationSection, model: PreTrainedModel) -> dict[str, Any]:
    """Keywords of `from_pretrained`, for a model of that structure.

    Raises:
        ConfigError: of `quantized_layers`.
    """
    chosen = set(quantized_layers(model, section))
    left = list(_subtrees(model, chosen))
    if section.library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        found: Any = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=left)
    elif section.bits == 4:
        found = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=section.quant_type or "nf4",
            bnb_4bit_use_double_quant=section.double_quant is not False,
            llm_int8_skip_modules=left,
        )
    else:
        found = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=left)
    return {"quantization_config": found}


def use_one_product(model: nn.Module, dtype: torch.dtype) -> None:
    """Has bitsandbytes' layers of a model that was just loaded multiply by `_Product`; see the file's head.

    On a GPU those of 4 bits keep their own, in `dtype`.
    """
    if "bitsandbytes" not in sys.modules:
        return
    import bitsandbytes as bnb

    module: Any
    for module in model.modules():
        if type(module) is bnb.nn.Linear8bitLt:
            module.__class__ = _plain_8bit()
        elif type(module) is bnb.nn.Linear4bit:
            module.compute_dtype, module.compute_type_is_set = dtype, True
            if module.weight.device.type == "cpu":
                module.__class__ = _plain_4bit()


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is kept quantised, by any of the kinds."""
    weight = getattr(layer, "weight", None)
    return weight is not None and (type(weight).__name__ in ("Params4bit", "Int8Params") or _is_torchao(weight))


def has_quantized(model: nn.Module) -> bool:
    """Whether any layer of it is."""
    return any(is_quantized(module) for module in model.modules())


def numel(parameter: torch.Tensor) -> int:
    """Weights that a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def held_bytes(model: nn.Module) -> int:
    """Bytes that the parameters really take, with scales and tables."""
    return sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in _tensors(model)}.values())


def bytes_of(section: QuantizationSection, weights: int, rows: int) -> int:
    """Bytes of a quantised layer of so many weights in so many rows; its bias comes on top."""
    if section.bits == 8:
        return weights + rows * _FLOAT32
    scales = -(-weights // _BLOCK)
    if section.double_quant is False:
        return -(-weights // 2) + scales * _FLOAT32 + _VALUES
    return -(-weights // 2) + scales + -(-scales // _SUPERBLOCK) * _FLOAT32 + _VALUES + _SCALES + _OFFSET


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if _is_torchao(parameter):
                inner = (getattr(parameter, name, None) for name in ("qdata", "scale", "zero_point"))
                yield from (tensor for tensor in inner if isinstance(tensor, torch.Tensor))
                continue
            yield parameter.data
            state = getattr(parameter, "quant_state", None)
            while state is not None:
                tensors = (state.absmax, state.code, state.offset)
                yield from (tensor for tensor in tensors if isinstance(tensor, torch.Tensor))
                state = state.state2
        scale = _scale(module)
        if scale is not None:
            yield scale


def _scale(module: Any) -> torch.Tensor | None:
    """The largest number of each row, of bitsandbytes' 8 bits: on the weight until its own forward is first called."""
    if type(getattr(module, "weight", None)).__name__ != "Int8Params":
        return None
    return cast("torch.Tensor | None", module.weight.SCB if module.state.SCB is None else module.state.SCB)


class _Product(torch.autograd.Function):
    """x Wᵀ + b, by a layer whose `numbers` are W: x [.., in], W [out, in]. W and b take no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return linear(x, layer.numbers(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        return torch.matmul(grad, ctx.layer.numbers(grad.dtype)).to(ctx.dtype), None, None


def _multiply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    bias = layer.bias
    product: torch.Tensor = _Product.apply(x, layer, bias if bias is None else bias.to(x.dtype))
    return product


@cache
def _plain_8bit() -> Any:
    import bitsandbytes as bnb

    class Plain8bit(bnb.nn.Linear8bitLt):
        """Multiplies by its weights as numbers."""

        def numbers(self, dtype: torch.dtype) -> torch.Tensor:
            scale = _scale(self)
            assert scale is not None
            return cast(torch.Tensor, self.weight.data.to(dtype) * (scale / 127).to(dtype)[:, None])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _multiply(self, x)

    return Plain8bit


@cache
def _plain_4bit() -> Any:
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_blockwise

    class Plain4bit(bnb.nn.Linear4bit):
        """Multiplies by its weights as numbers."""

        def numbers(self, dtype: torch.dtype) -> torch.Tensor:
            state, packed = self.weight.quant_state, self.weight.data
            absmax = state.absmax
            if state.nested:
                absmax = dequantize_blockwise(absmax, state.state2) + state.offset
            count = torch.Size(state.shape).numel()
            if count % state.blocksize:
                pairs = packed.flatten()
                table = state.code.to(dtype)
                values = table[torch.stack([pairs >> 4, pairs & 15], dim=1).long()].flatten()[:count]
                scales = absmax.to(dtype).repeat_interleave(state.blocksize)[:count]
                return (values * scales).view(state.shape)
            # A block a row: scales lie as the kernel reads them.
            rows = (count // state.blocksize, state.blocksize)
            made = torch.ops.bitsandbytes.dequantize_4bit.default(
                packed, absmax.float(), state.blocksize, state.quant_type, rows, dtype
            )
            return cast(torch.Tensor, made.view(state.shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _multiply(self, x)

    return Plain4bit


def _is_torchao(tensor: Any) -> bool:
    return type(tensor).__module__.startswith("torchao.")


def _is_suffix(wanted: str, name: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _parts(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Of each linear layer, which of `PARTS` it belongs to; "" of the language model."""
    language = {id(module) for module in model.get_decoder().modules()}
    tower = {id(module) for module in cast(nn.Module, model.get_encoder(modality="image")).modules()}
    head = model.get_output_embeddings()
    found = {}
    for name in names:
        module = model.get_submodule(name)
        if module is head:
            found[name] = "head"
        elif id(module) in tower:
            found[name] = "tower"
        else:
            found[name] = "" if id(module) in language else "connector"
    return found


def _subtrees(module: nn.Module, chosen: set[str], prefix: str = "") -> Iterator[str]:
    """Names of the largest modules with linear layers of which none is chosen."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        inner = [full] if type(child) is nn.Linear else []
        inner += [f"{full}.{each}" for each, module in child.named_modules() if each and type(module) is nn.Linear]
        if not inner:
            continue
        if not chosen & set(inner):
            yield full
        elif type(child) is not nn.Linear:
            yield from _subtrees(child, chosen, f"{full}.")
