"""Terms that hold a policy back: L2 of an adapted model (docs/equations.md 4 and 7), KL(π_θ || π_ref), and its
entropy.

The L2 terms are added once an optimiser step. Both work over the active adapters of a PEFT model, in float32 at least
and with autocast off: a sum of millions of squares has no place in bfloat16.

KL is estimated from sampled tokens (Schulman, "Approximating KL divergence", 2020). With d = log π_θ − log π_ref on
tokens drawn from π_θ:

| name | a token         | value      | gradient, as a loss term                                                     |
|------|-----------------|------------|------------------------------------------------------------------------------|
| `k1` | d               | unbiased   | mean 0: it would push nowhere, so it enters the reward and is refused here   |
| `k2` | d² ÷ 2          | biased     | unbiased for the gradient of KL(π_θ || π_ref)                                |
| `k3` | exp(−d) − 1 + d | unbiased   | biased: it is the gradient of the other direction, KL(π_ref || π_θ)          |

The expectation is over the tokens as sampled; no importance weight corrects it for stale groups. `B` completions, `T`
tokens a completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from mmrl_ray.errors import AdapterError
from mmrl_ray.losses.aggregation import check_tokens, masked_mean, masked_sum

_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract the adapter's start from the base weights: B·A is then not the distance to them."""


def l2_to_pretrained(model: nn.Module, pretrained: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """‖θ − θ_pretrained‖², a scalar: how far training has moved the weights.

    - An adapted matrix moved by s·B·A: s²·Σ((BᵀB)⊙(AAᵀ)), which never builds B·A; s is the module's own scaling
      (rank-stabilised or not). Several trained adapters on one matrix count as their sum; an adapter that is active
      but frozen while another one trains belongs to the starting point.
    - `modules_to_save`: ‖W − W₀‖² to the original module that PEFT keeps.
    - Anything else that trains (biases with `bias="all"`): ‖W − W₀‖² to `pretrained`, a `pretrained_snapshot` taken
      before training, for PEFT keeps no copy of those.

    Raises:
        AdapterError: DoRA or another LoRA variant, an initialisation that changes the base weights (PiSSA, OLoRA, …),
            an adapter that is not LoRA, or a parameter that trains without a snapshot.
    """
    _refuse_moved_base(model)
    terms: list[torch.Tensor] = []
    covered: set[int] = set()
    trained = _trained_adapters(model)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            adapters = [a for a in module.active_adapters if a in module.scaling and (a in trained or not trained)]
            terms.extend(_lora_distance(name, module, adapters, covered))
        elif isinstance(module, BaseTunerLayer):
            raise AdapterError(f"l2_to_pretrained knows LoRA only, and {name!r} is {type(module).__name__}")
        elif isinstance(module, ModulesToSaveWrapper):
            terms.extend(_saved_module_distance(module, covered))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            if pretrained is None or name not in pretrained:
                raise AdapterError(
                    f"l2_to_pretrained has no pretrained value of {name!r}, which trains outside the adapter; take "
                    "pretrained_snapshot(model) before training and pass it on"
                )
            terms.append(_squared(_exact(parameter) - pretrained[name].to(parameter)))
    return _total(model, terms)


def pretrained_snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train but are no part of an adapter (trained biases), by name.

    Take it before the first step, and keep it with the run: what a resumed run would copy has moved already.
    """
    adapter = {id(p) for p in _adapter_parameters(model, trainable_only=False)}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            adapter.update(id(p) for p in module.parameters())
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapter
    }


def adapter_l2(model: nn.Module) -> torch.Tensor:
    """‖φ‖², a scalar, over the trainable adapter parameters only.

    `modules_to_save` are not counted: they are copies of pretrained weights, which this would pull to 0.

    Raises:
        AdapterError: the model has no trainable adapter parameter.
    """
    parameters = list(_adapter_parameters(model, trainable_only=True))
    if not parameters:
        raise AdapterError("adapter_l2 found no trainable adapter parameter; add an adapter or set adapter_l2 to 0")
    return _total(model, [_squared(_exact(parameter)) for parameter in parameters])


def _adapter_parameters(model: nn.Module, *, trainable_only: bool) -> Iterator[nn.Parameter]:
    """Parameters of the tuner layers' adapters, each once; the active and trainable ones, or all."""
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for container in (getattr(module, name) for name in module.adapter_layer_names):
            for adapter, entry in container.items():
                for parameter in entry.parameters() if isinstance(entry, nn.Module) else (entry,):
                    wanted = not trainable_only or (parameter.requires_grad and adapter in module.active_adapters)
                    if wanted and id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield parameter


def _refuse_moved_base(model: nn.Module) -> None:
    for adapter, config in getattr(model, "peft_config", {}).items():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(_MOVES_THE_BASE):
            raise AdapterError(
                f"l2_to_pretrained is refused for adapter {adapter!r}: its initialisation {start!r} changed the base "
                "weights, so that B·A is not the distance to the pretrained ones; use the default initialisation"
            )


def _trained_adapters(model: nn.Module) -> set[str]:
    """Active LoRA adapters with gradient anywhere; empty for a model that is only looked at."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {
        adapter
        for layer in layers
        for adapter in layer.active_adapters
        if adapter in layer.scaling and any(p.requires_grad for p in _factors(layer, adapter) if p is not None)
    }


def _lora_distance(name: str, module: LoraLayer, adapters: list[str], covered: set[int]) -> Iterator[torch.Tensor]:
    """The squared norms of one layer's weight change and bias change by these adapters together."""
    if not adapters:
        return
    downs, ups, shifts = [], [], []
    for adapter in adapters:
        _refuse_variant(name, module, adapter)
        down, up, bias = _factors(module, adapter)
        covered.update(id(p) for p in (down, up, bias) if p is not None)
        downs.append(_exact(down).flatten(1))  # [r, in]; a convolution's kernel counts as inputs
        ups.append(module.scaling[adapter] * _exact(up).flatten(1))  # [out, r]
        if bias is not None:
            shifts.append(module.scaling[adapter] * _exact(bias))
    # The sum of several products is the product of the joined factors.
    a, b = torch.cat(downs), torch.cat(ups, dim=1)
    with _no_autocast(a):
        yield ((b.T @ b) * (a @ a.T)).sum()
    if shifts:
        yield _squared(torch.stack(shifts).sum(dim=0))


def _factors(module: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A, B and B's bias of one adapter, be the layer linear, convolutional or an embedding."""
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter], None
    down, up = dict(module.lora_A[adapter].named_parameters()), dict(module.lora_B[adapter].named_parameters())
    return down["weight"], up["weight"], up.get("bias")


def _refuse_variant(name: str, module: LoraLayer, adapter: str) -> None:
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if module.use_dora.get(adapter) or adapter in module.lora_magnitude_vector:
        kind = "DoRA"
    elif variant is not None:
        kind = type(variant).__name__
    elif getattr(module, "num_experts", 1) > 1 or getattr(module.get_base_layer(), "groups", 1) > 1:
        kind = "a layer of several experts or groups"
    else:
        return
    raise AdapterError(
        f"l2_to_pretrained is refused for {kind} ({name!r}, adapter {adapter!r}): its weight change is not "
        "scaling·B·A; use plain LoRA or set l2_to_pretrained to 0"
    )


def _saved_module_distance(module: ModulesToSaveWrapper, covered: set[int]) -> Iterator[torch.Tensor]:
    original = dict(module.original_module.named_parameters())
    for adapter in module.active_adapters:
        if adapter in module.modules_to_save:
            for name, parameter in module.modules_to_save[adapter].named_parameters():
                covered.add(id(parameter))
                yield _squared(_exact(parameter) - _exact(original[name]).detach())


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or wider where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _squared(tensor: torch.Tensor) -> torch.Tensor:
    with _no_autocast(tensor):
        return tensor.square().sum()


def _no_autocast(tensor: torch.Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _total(model: nn.Module, terms: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the terms, brought to the first one's device where a model is spread over several."""
    if not terms:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


@dataclass(frozen=True, slots=True)
class KlLoss:
    """One micro-batch's share of the step's KL term, before its weight."""

    loss: torch.Tensor
    """Scalar with gradient, already over the step's denominator."""
    value: torch.Tensor
    """Detached sum of k3 over valid tokens: the unbiased figure of low variance for the metrics line."""
    count: torch.Tensor
    """Valid tokens."""


def kl_per_token(estimator: str, logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """The estimator's value on every token, in the shape of `logprobs`; differentiable.

    Raises:
        ValueError: an unknown estimator, or the shapes differ.
    """
    if logprobs.shape != reference_logprobs.shape:
        raise ValueError(
            f"logprobs {list(logprobs.shape)} and reference log-probs {list(reference_logprobs.shape)} must match"
        )
    d = logprobs - reference_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1(-d) + d  # exp(-d) - 1 would lose small d to rounding
    raise ValueError(f"unknown KL estimator {estimator!r}; choose k1, k2 or k3")


def kl_loss(
    estimator: str,
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    scales: torch.Tensor,
    denominator: float | torch.Tensor,
) -> KlLoss:
    """Σ scale·KL(token) ÷ denominator over valid tokens, with the scales and denominator of the policy loss.

    Args:
        estimator: k2 or k3.
        logprobs: [B, T], with gradient.
        reference_logprobs: [B, T], detached here.
        mask: bool [B, T].
        scales: [B].
        denominator: of the whole step.

    Raises:
        ValueError: `k1` (see the module), an unknown name, shapes that do not fit, or a denominator not above 0.
    """
    if estimator == "k1":
        raise ValueError("KL estimator 'k1' has a gradient of mean 0 as a loss term; use kl_penalty inside the reward")
    check_tokens(logprobs, mask)
    if scales.shape != logprobs.shape[:1] or reference_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"logprobs {list(logprobs.shape)} need reference log-probs of that shape and scales [B], got "
            f"{list(reference_logprobs.shape)} and {list(scales.shape)}"
        )
    theta = torch.where(mask, logprobs, 0.0)
    reference = torch.where(mask, reference_logprobs.detach(), 0.0)
    loss = masked_mean(kl_per_token(estimator, theta, reference) * scales[:, None], mask, denominator=denominator)
    value = masked_sum(kl_per_token("k3", theta.detach(), reference), mask)
    return KlLoss(loss, value, mask.sum().to(value.dtype))


def kl_penalty(behaviour_logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> float:
    """k1 of one whole completion: Σ over its tokens [T] of log μ − log π_ref, in float64. The reward loses `kl.weight`
    times it.

    Raises:
        ValueError: the shapes differ.
    """
    return float(kl_per_token("k1", behaviour_logprobs.double(), reference_logprobs.double()).sum())


def entropy_mean(
    entropies: torch.Tensor, mask: torch.Tensor, *, scales: torch.Tensor, denominator: float | torch.Tensor
) -> torch.Tensor:
    """Σ scale·H(token) ÷ denominator over valid tokens, a scalar with the gradient that `entropies` have.

    H is the entropy S of PPO's equation 9 (arXiv:1707.06347), over the whole vocabulary and not estimated from a token
    that was drawn; the learner takes `entropy_bonus` times this off its loss.

    Args:
        entropies: [B, T], in nats.
        mask: bool [B, T].
        scales: [B], as of the policy loss.
        denominator: of the whole step.

    Raises:
        ValueError: the shapes do not fit, or the denominator is not above 0.
    """
    check_tokens(entropies, mask)
    if scales.shape != entropies.shape[:1]:
        raise ValueError(f"scales must be [B] for entropies {list(entropies.shape)}, got {list(scales.shape)}")
    return masked_mean(torch.where(mask, entropies, 0.0) * scales[:, None], mask, denominator=denominator)
