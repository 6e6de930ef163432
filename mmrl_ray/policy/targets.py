"""Which layers of a model an adapter sits on: names, suffixes or a pattern, checked against what the model has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from mmrl_ray.config.model import LoraSection
from mmrl_ray.errors import AdapterError

_SHOWN = 3


def resolve_targets(model: PreTrainedModel, lora: LoraSection) -> list[str]:
    """Full names of the linear layers that `lora` adapts, in the model's order.

    By default every linear layer under `model.get_decoder()`: the language model without its head. A list of targets
    is matched by suffix (`q_proj`, `layers.0.mlp.up_proj`), a string as one regular expression over full names; both
    as PEFT does it, and over linear layers only.

    Raises:
        AdapterError: a target matches nothing; one matches outside the language model without `adapt_vision`, or the
            head whose weight is the embedding's; or the model does not tell its language model apart.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if lora.targets is None:
        language = _language_prefix(model)
        return [name for name in names if name.startswith(language)]
    if isinstance(lora.targets, str):
        matched = {lora.targets: _match_pattern(lora.targets, names)}
    else:
        matched = {target: [n for n in names if n == target or n.endswith(f".{target}")] for target in lora.targets}
    if not matched:
        raise AdapterError("model.lora.targets is an empty list; name at least one layer, or leave it out")
    for target, found in matched.items():
        if not found:
            raise AdapterError(_nothing_matched(target, names))
        _refuse_tied_head(model, target, found)
        if not lora.adapt_vision:
            _refuse_outside(model, target, found)
    chosen = {name for found in matched.values() for name in found}
    return [name for name in names if name in chosen]


def _language_prefix(model: PreTrainedModel) -> str:
    """`"model.language_model."`: what the names of the language model's layers begin with."""
    decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    tower = model.get_encoder(modality="image")
    if not prefix or any(module is tower for module in decoder.modules()):
        raise AdapterError(
            f"{type(model).__name__} does not tell its language model apart (get_decoder() gave "
            f"{type(decoder).__name__}); name the layers in model.lora.targets as one regular expression, "
            "with adapt_vision: true"
        )
    return f"{prefix}."


def _match_pattern(pattern: str, names: list[str]) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise AdapterError(f"model.lora.targets {pattern!r} is not a regular expression: {error}") from error


def _refuse_tied_head(model: PreTrainedModel, target: str, found: list[str]) -> None:
    head = _head_name(model)
    if head in found and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise AdapterError(
            f"LoRA target {target!r} matches {head}, whose weight is also the embedding's: "
            "merging the adapter would change both; leave the head out"
        )


def _refuse_outside(model: PreTrainedModel, target: str, found: list[str]) -> None:
    language, head = _language_prefix(model), _head_name(model)
    outside = [name for name in found if not name.startswith(language) and name != head]
    if outside:
        raise AdapterError(
            f"LoRA target {target!r} matches {len(outside)} layers outside the language model{examples(outside)}; "
            f"write a regular expression that begins with {re.escape(language)!r}, "
            "or set model.lora.adapt_vision: true"
        )


def _head_name(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def _nothing_matched(target: str, names: list[str]) -> str:
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(target, leaves, n=_SHOWN, cutoff=0.4)
    near += difflib.get_close_matches(target, names, n=_SHOWN - len(near), cutoff=0.4) if len(near) < _SHOWN else []
    hint = f"nearest: {', '.join(near)}" if near else f"the model has {', '.join(leaves)}"
    return f"LoRA target {target!r} matches no linear layer of the model; {hint}"


def examples(names: Sequence[str]) -> str:
    """The first few of `names` in brackets, for a message; nothing for none."""
    if not names:
        return ""
    return f" ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
