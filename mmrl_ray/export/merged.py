"""An adapter merged into its base for others (`policy/model_folder.py` writes it).

The weights are W + s·BA, or what a variant of LoRA makes of them, in float32, rounded once.

A checkpoint that is quantised itself is not merged: its weights are no numbers to add to. Where the run quantised its
base (`model.quantization`), the adapter is added to the base as it was before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from mmrl_ray.errors import AdapterError, ExportError
from mmrl_ray.policy.lora.adapter import forget_adapters
from mmrl_ray.policy.lora.variants import back_to_the_base_dtype, merged_weight
from mmrl_ray.policy.model import Policy

Dtypes = Mapping[str, torch.dtype]
"""Of each parameter and buffer of a model, by name."""


def dtypes_of(policy: Policy) -> dict[str, torch.dtype]:
    """What a model was loaded in, its adapter aside: some families keep a few weights in float32, whatever is asked."""
    found = {}
    for name, tensor in (*policy.hf_model.named_parameters(), *policy.hf_model.named_buffers()):
        if ".lora_" not in name and ".modules_to_save." not in name:
            found[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor.dtype
    return found


@torch.no_grad()
def merge_rounding_once(policy: Policy, dtypes: Dtypes) -> float:
    """Adds the adapter to the base's weights in float32 and rounds the sums to `dtypes`; an ordinary model again.

    Returns:
        the share of the adapter's update that is in the rounded weights: ⟨Δ as rounded, Δ⟩ ÷ ‖Δ‖² over all layers.
        Where a base lies on the grid of 16 bits, what moves a weight by less than half a step of it is gone. 1 of an
        adapter without effect.

    Raises:
        AdapterError: there is no adapter, or a merged weight is not finite.
    """
    peft = policy.model
    if not isinstance(peft, PeftModel):
        raise AdapterError(f"{policy.path} has no adapter to merge; put one on it first")
    adapter = str(peft.active_adapter)
    kept = total = 0.0
    for name, layer in peft.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight: nn.Parameter = layer.get_base_layer().weight  # type: ignore[assignment]
        dtype = dtypes[f"{name}.weight"]
        before, after = weight.data.float(), merged_weight(layer, adapter)
        if not bool(torch.isfinite(after).all()):
            raise AdapterError(f"the adapter cannot be merged into {name}: the sum holds NaN or infinity")
        weight.data = after.to(dtype)
        update = after - before
        kept += float(((weight.data.float() - before.to(dtype).float()) * update).sum(dtype=torch.float64))
        total += float(update.square().sum(dtype=torch.float64))
    back_to_the_base_dtype(peft)
    model: PreTrainedModel = forget_adapters(peft.unload())
    policy.model = model
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = tensor.data.to(dtypes[name])
    return kept / total if total else 1.0


def refuse_quantised(policy: Policy) -> None:
    """Raises ExportError where the base's weights are no numbers that an adapter can be added to."""
    if getattr(policy.hf_model.config, "quantization_config", None) is not None:
        raise ExportError(
            f"{policy.path} is quantised, and an adapter cannot be merged into such weights: export the adapter alone "
            "(without --merged), or train on the checkpoint that it was made from"
        )
