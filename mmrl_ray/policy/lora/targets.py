"""Which layers of a model an adapter sits on: names, suffixes or a pattern, checked against what the model has."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import regex
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mmrl_ray.config.policy import LoraSection, first_match
from mmrl_ray.errors import AdapterError
from mmrl_ray.policy.checkpoint import examples
from mmrl_ray.policy.model import PlainLinear
from mmrl_ray.policy.quantized import is_quantized, numel

_SHOWN = 3
_PATTERN_S = 2.0
"""How long a pattern from outside may take over all names of a model's layers."""
_PLAIN = re.compile(r"[\w.]+")
# The kinds of layers that PEFT puts LoRA on, beside linear ones.
_OTHER_LAYERS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D)


def resolve_targets(model: PreTrainedModel, lora: LoraSection) -> list[str]:
    """Full names of the linear layers that `lora` adapts, in the model's order.

    By default every linear layer under `model.get_decoder()`: the language model without its head, and without what
    only looks like a linear layer (a router that also gives its choice); with `adapt_vision`, those of tower and
    connector as well. Not those of modules that train whole. A list of targets is matched by suffix
    (`q_proj`, `layers.0.mlp.up_proj`), a string as one regular expression over full names; both as PEFT does it, and
    over linear layers only. What is left out is `left_out`'s to say.

    Raises:
        AdapterError: a target matches nothing; one matches outside the language model without `adapt_vision`, or the
            head whose weight is the embedding's; the model does not tell its language model apart; a pattern of ranks
            fits no layer; or as `saved_modules`.
    """
    names = [name for name, module in model.named_modules() if _is_adaptable(module)]
    if lora.targets is None:
        language, head = _language_prefix(model), head_name(model)
        # Inside such attention a layer's weight is read, and the layer never called.
        fused = {f"{n}." for n, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
        others = {n for n in names if lora.adapt_vision and n != head and not n.startswith(tuple(fused))}
        chosen = [n for n in names if n.startswith(language) or n in others]
        return _without_saved(chosen, model, lora)
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
            prefix = re.escape(_language_prefix(model))
            remedy = f"write a regular expression that begins with {prefix!r}, or "
            _refuse_outside(model, f"LoRA target {target!r} matches", found, remedy)
    every = {name for found in matched.values() for name in found}
    return _without_saved([name for name in names if name in every], model, lora)


def saved_modules(model: PreTrainedModel, lora: LoraSection) -> list[str]:
    """Full names of the modules that train whole beside the adapter (`modules_to_save`), in the model's order.

    Raises:
        AdapterError: one matches nothing, or a module that cannot train whole: outside the language model without
            `adapt_vision`, quantised, a list of modules, inside another one, or one whose weight another has too.
    """
    if not lora.modules_to_save:
        return []
    modules = dict(model.named_modules())
    found: dict[str, list[str]] = {
        wanted: [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        for wanted in lora.modules_to_save
    }
    for wanted, names in found.items():
        what = f"model.lora.modules_to_save {wanted!r}"
        if not names:
            near = difflib.get_close_matches(wanted, sorted({_leaf(name) for name in modules if name}), n=_SHOWN)
            hint = f"nearest: {', '.join(near)}" if near else "see `mmrl check`"
            raise AdapterError(f"{what} matches no module of the model; {hint}")
        if not lora.adapt_vision:
            _refuse_outside(model, f"{what} matches", names, "")
        for name in names:
            if reason := _not_whole(model, modules[name]):
                raise AdapterError(f"{what} matches {name}, {reason}")
    chosen = [name for name in modules if any(name in names for names in found.values())]
    inside = [(a, b) for a in chosen for b in chosen if b.startswith(f"{a}.")]
    if inside:
        raise AdapterError(f"model.lora.modules_to_save: {inside[0][1]} is inside {inside[0][0]}: name one of the two")
    return chosen


def _not_whole(model: PreTrainedModel, module: nn.Module) -> str | None:
    """Why a module cannot train whole, or None."""
    own = {id(p) for p in module.parameters()}
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or not own:
        return f"a {type(module).__name__} without a forward or without weights: name modules inside it"
    if any(is_quantized(each) for each in module.modules()):
        return "whose weights are quantised: write it in model.quantization.unquantized, too"
    if any(each is model.get_decoder() for each in module.modules()):
        return "which holds the language model: train it with sft.mode: full"
    inside = {id(each) for each in module.modules()}
    elsewhere = {id(p) for each in model.modules() if id(each) not in inside for p in each.parameters(recurse=False)}
    if own & elsewhere:
        return "whose weight is also another module's (the head's and the embedding's are one): leave it out"
    return None


def _without_saved(names: list[str], model: PreTrainedModel, lora: LoraSection) -> list[str]:
    """The layers that are adapted: those that train whole are not. Refuses patterns that fit none of them."""
    saved = saved_modules(model, lora)
    chosen = [name for name in names if not any(name == each or name.startswith(f"{each}.") for each in saved)]
    if not chosen:
        raise AdapterError(
            "model.lora.modules_to_save takes all layers that model.lora.targets names: leave some to the adapter"
        )
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            if not any(first_match({pattern: True}, name, False) for name in chosen):
                raise AdapterError(
                    f"model.lora.{key}: {pattern!r} fits none of the adapted layers, such as {chosen[0]}; write the "
                    "end of a name, such as q_proj"
                )
    return chosen


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Weights of the language model that the adapter does not sit on, those of one kind of layer together."""

    kind: str
    """The layers' class, and for linear ones their name: "Qwen3VLMoeTextExperts", "Linear gate_proj"."""
    layers: int
    tensors: tuple[str, ...]
    parameters: int


def left_out(model: PreTrainedModel, targets: Collection[str]) -> list[LeftOut]:
    """Every matrix of the language model under no adapter, the most weights first; embeddings are not counted.

    Mixtures of experts keep the experts of a layer in one tensor, which LoRA as it is used here cannot adapt.
    """
    chosen = {model.get_submodule(name) for name in targets}
    found: dict[str, LeftOut] = {}
    for name, module in model.get_decoder().named_modules():
        own = {key: numel(p) for key, p in module.named_parameters(recurse=False) if p.ndim > 1}
        if not own or module in chosen or isinstance(module, nn.Embedding):
            continue
        plain = isinstance(module, nn.Linear)
        kind = f"{'Linear' if _is_plain(module) else type(module).__name__}{f' {_leaf(name)}' if plain else ''}"
        before = found.get(kind, LeftOut(kind, 0, (), 0))
        tensors = tuple(dict.fromkeys((*before.tensors, *own)))
        found[kind] = LeftOut(kind, before.layers + 1, tensors, before.parameters + sum(own.values()))
    return sorted(found.values(), key=lambda each: -each.parameters)


def left_out_line(model: PreTrainedModel, targets: Collection[str]) -> str | None:
    """`left_out` in words; None where nothing is."""
    found = left_out(model, targets)
    if not found:
        return None
    total = sum(numel(p) for p in model.get_decoder().parameters())
    parts = [
        f"{each.layers} × {each.kind} ({', '.join(each.tensors)}; {each.parameters / total:.1%})"
        for each in found[:_SHOWN]
    ]
    more = f" and {len(found) - _SHOWN} other kinds" if len(found) > _SHOWN else ""
    share = sum(each.parameters for each in found) / total
    return f"LoRA leaves out {share:.1%} of the language model's weights: {', '.join(parts)}{more}"


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, PlainLinear) or is_quantized(module)


def _is_adaptable(module: nn.Module) -> bool:
    """Whether a branch can be added to what the layer gives: one tensor [.., out], for which a layer with a forward of
    its own is asked."""
    if not isinstance(module, nn.Linear) or _is_plain(module):
        return isinstance(module, nn.Linear)
    weight = module.weight
    try:
        with torch.no_grad():
            given: Any = module(torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
    except Exception:  # noqa: BLE001 - at the boundary: another library's forward raises what it likes
        return False
    return isinstance(given, torch.Tensor) and given.shape == (1, module.out_features)


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def adaptable_layers(model: PreTrainedModel) -> dict[str, tuple[int, int] | None]:
    """Every layer of a bare model that PEFT could put LoRA on: (inputs, outputs) of linear ones, None for others."""
    found: dict[str, tuple[int, int] | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, _OTHER_LAYERS):
            found[name] = None
    return found


def layers_of_config(config: LoraConfig, layers: Mapping[str, tuple[int, int] | None], head: str | None) -> list[str]:
    """Which of `layers` PEFT adapts by a config from outside.

    Its patterns have a deadline: whoever wrote them may not be trusted.

    Args:
        config: as it was saved.
        layers: from `adaptable_layers`.
        head: the output head's name, which "all-linear" leaves out.

    Raises:
        AdapterError: it names no layers, or a pattern of it is none, or takes too long.
    """
    targets = config.target_modules
    if targets is None:
        raise AdapterError("its config names no target_modules, so which layers it adapts is unknown")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = [name for name, size in layers.items() if size is not None and name != head]
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    if unclear := [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]:
        raise AdapterError(f"its layers_pattern {unclear[0]!r} is no plain name of layers")
    left_out = config.exclude_modules
    plain = LoraConfig(
        target_modules=matching(targets, layers) if isinstance(targets, str) else targets,
        exclude_modules=matching(left_out, layers) if isinstance(left_out, str) else left_out,
    )
    plain.layers_to_transform, plain.layers_pattern = config.layers_to_transform, config.layers_pattern
    return [name for name in layers if check_target_module_exists(plain, name)]


def check_tensor_names(expected: AbstractSet[str], given: AbstractSet[str]) -> None:
    """Refuses an adapter whose tensors are not exactly those that its targets make on this model.

    Raises:
        AdapterError: with how many are missing and how many nobody knows, and the first of each.
    """
    missing, unknown = sorted(expected - given), sorted(given - expected)
    if missing or unknown:
        raise AdapterError(
            f"the adapter's weights do not fit: {len(missing)} missing{examples(missing)}, "
            f"{len(unknown)} unknown{examples(unknown)}; it was made for another model or other targets"
        )


def head_name(model: PreTrainedModel) -> str | None:
    """The name of the output head's module."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that a pattern from outside fits whole, within a deadline.

    Raises:
        AdapterError: it is no regular expression, or takes too long.
    """
    ends = time.monotonic() + _PATTERN_S
    try:
        compiled = regex.compile(pattern)
        return [
            name
            for name in names
            if compiled.fullmatch(name, timeout=max(0.0, ends - time.monotonic()), concurrent=True)
        ]
    except regex.error as error:
        raise AdapterError(f"its pattern of layers {pattern!r} is not a regular expression: {error}") from error
    except TimeoutError as error:
        raise AdapterError(
            f"its pattern of layers {pattern!r} takes more than {_PATTERN_S:g} s; name the layers instead"
        ) from error


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
    head = head_name(model)
    if head in found and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise AdapterError(
            f"LoRA target {target!r} matches {head}, whose weight is also the embedding's: "
            "merging the adapter would change both; leave the head out"
        )


def _refuse_outside(model: PreTrainedModel, what: str, found: list[str], remedy: str) -> None:
    language, head = _language_prefix(model), head_name(model)
    outside = [name for name in found if not name.startswith(language) and name != head]
    if outside:
        raise AdapterError(
            f"{what} {len(outside)} layers outside the language model{examples(outside)}; "
            f"{remedy}set model.lora.adapt_vision: true"
        )


def _nothing_matched(target: str, names: list[str]) -> str:
    leaves = sorted({_leaf(name) for name in names})
    near = difflib.get_close_matches(target, leaves, n=_SHOWN, cutoff=0.4)
    near += difflib.get_close_matches(target, names, n=_SHOWN - len(near), cutoff=0.4) if len(near) < _SHOWN else []
    hint = f"nearest: {', '.join(near)}" if near else f"the model has {', '.join(leaves)}"
    return f"LoRA target {target!r} matches no linear layer of the model; {hint}"
