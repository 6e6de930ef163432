"""The start-up check on the real model: does "prompt once, G completions" give what the model itself gives?

The judge is the naive path fed with pixels, where transformers does everything by itself but the positions. Compared
are log-probs of one prompt's random completions of unequal length and, when something trains, the gradient of their
sum. Nothing falls back silently: the choice carries its reason, the caller logs it and shows it in every step's
metrics.

The tolerance is on |Δ log-prob| ÷ max(1, |log-prob|); the gradient's relative distance may be four times that. The
two paths round differently (other matrix shapes, other attention kernels). In float32 that makes 1e-6 at a few layers
and some 1e-5 at dozens. In bfloat16, whose steps are 2⁻⁸, it makes 0.004 (gradient 0.01) on tiny models, where a
position shifted by one makes 0.2 (gradient 0.4) or more; a check in bfloat16 finds such mistakes, not subtle ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.checkpointing import is_checkpointing
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.packed import unpackable
from mmrl_ray.policy.prefix import ScorePath, encode_prefix, score_completions
from mmrl_ray.policy.vision import vision_features

TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
GRADIENT_SLACK = 4
_LENGTHS = (5, 3, 8)
_NAMES: dict[ScorePath, str] = {"shared_prefix": "shared prefix", "packed": "packed row"}
# What another library's forward may raise when it is called in a way that it was not made for.
_FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class PathChoice:
    """Which way completions are scored in this run, and why."""

    path: ScorePath
    reason: str
    max_difference: float
    """Largest |Δ log-prob| ÷ max(1, |log-prob|) to the model's own numbers; nan when nothing was compared."""
    gradient_difference: float | None = None
    """‖Δ gradient‖ ÷ ‖gradient‖, when something trains."""
    inject_vision: bool = True
    """Whether ready-made vision features stand in for the tower."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    logprobs: torch.Tensor
    gradient: torch.Tensor | None


def choose_path(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    *,
    temperature: float = 1.0,
    tolerance: float | None = None,
    wanted: ScorePath = "shared_prefix",
) -> PathChoice:
    """Compares the wanted path and the naive one on `prompts` (one or two are enough) and picks what the run may use.

    Sets `policy.inject_vision` to the finding. Prompts need their pixels.

    Args:
        policy: the model as it will be used, its adapter added.
        prompts: real ones; different lengths also check the padding.
        temperature: the rollout temperature.
        tolerance: by default `TOLERANCES` of the model's dtype.
        wanted: "packed" where there can be no cache (checkpointed or sharded layers).
    """
    limit = TOLERANCES[policy.dtype] if tolerance is None else tolerance
    name = _NAMES[wanted]
    completions = _random_completions(policy, len(prompts))
    policy.inject_vision = True
    truth = _score(policy, prompts, None, completions, temperature, "naive")
    injected = _vision_agrees(policy, prompts, completions, temperature, truth, limit)
    policy.inject_vision = injected is None
    note = "" if injected is None else f"; vision features are made in every forward ({injected})"
    blocked = unpackable(policy) if wanted == "packed" else _unsharable(policy, prompts)
    if blocked is not None:
        return PathChoice("naive", blocked + note, float("nan"), None, policy.inject_vision)
    try:
        found = _score(policy, prompts, _features(policy, prompts), completions, temperature, wanted)
    except _FORWARD_ERRORS as error:
        reason = f"the {name.replace(' ', '-')} forward failed: {_brief(error)}"
        return PathChoice("naive", reason + note, float("nan"), None, policy.inject_vision)
    difference, gradient = _differences(found, truth)
    if difference <= limit and (gradient is None or gradient <= GRADIENT_SLACK * limit):
        reason = f"{name} agrees with the model's own forward within {limit:g}"
        return PathChoice(wanted, reason + note, difference, gradient, policy.inject_vision)
    reason = f"{name} differs from the model's own forward by {difference:.3g}"
    reason += "" if gradient is None else f" (gradient {gradient:.3g})"
    return PathChoice("naive", f"{reason}, above {limit:g}{note}", difference, gradient, policy.inject_vision)


def unsharable_layer(cache: Cache) -> str | None:
    """The first cache layer that does not hold plain keys and values per token (a recurrent state, …), or None."""
    for i, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"layer {i} keeps a {type(layer).__name__}"
    return None


def _unsharable(policy: Policy, prompts: Sequence[EncodedPrompt]) -> str | None:
    """Why a shared prefix is out of the question, before any number is compared."""
    if is_checkpointing(policy):
        return "gradient checkpointing drops the prefix cache"
    try:
        with torch.no_grad():
            cache = encode_prefix(policy, prompts[:1], _features(policy, prompts[:1])).cache
    except _FORWARD_ERRORS as error:
        return f"the prompt's forward with a cache failed: {_brief(error)}"
    if cache is None:
        return "the model returned no cache"
    layer = unsharable_layer(cache)
    return None if layer is None else f"{layer}, which cannot be repeated for several completions"


def _features(policy: Policy, prompts: Sequence[EncodedPrompt]) -> list[VisionFeatures] | None:
    return vision_features(policy, prompts) if policy.inject_vision else None


def _vision_agrees(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    completions: list[list[torch.Tensor]],
    temperature: float,
    truth: _Outcome,
    limit: float,
) -> str | None:
    """None when ready-made features change nothing, else what is wrong with them."""
    try:
        outcome = _score(policy, prompts, _features(policy, prompts), completions, temperature, "naive")
    except (*_FORWARD_ERRORS, ModelError) as error:
        return _brief(error)
    difference, _ = _differences(outcome, truth)
    return None if difference <= limit else f"they change log-probs by {difference:.3g}"


def _score(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: list[VisionFeatures] | None,
    completions: list[list[torch.Tensor]],
    temperature: float,
    path: ScorePath,
) -> _Outcome:
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    with torch.set_grad_enabled(bool(trained)):
        logprobs = score_completions(policy, prompts, features, completions, temperature, path=path).logprobs
    if not trained:
        return _Outcome(logprobs, None)
    gradients = torch.autograd.grad(logprobs.sum(), trained, allow_unused=True)
    flat = torch.cat([g.float().flatten() for g in gradients if g is not None])
    return _Outcome(logprobs.detach(), flat)


def _differences(outcome: _Outcome, truth: _Outcome) -> tuple[float, float | None]:
    scale = truth.logprobs.abs().clamp_min(1.0)
    difference = float(((outcome.logprobs - truth.logprobs).abs() / scale).max())
    if outcome.gradient is None or truth.gradient is None:
        return difference, None
    if outcome.gradient.shape != truth.gradient.shape:
        return difference, float("inf")
    return difference, float((outcome.gradient - truth.gradient).norm() / truth.gradient.norm().clamp_min(1e-12))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _random_completions(policy: Policy, groups: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(policy.vocab_size)
    allowed = ids[~torch.isin(ids, torch.tensor(policy.image_token_ids, dtype=torch.int64))]
    return [
        [allowed[torch.randint(len(allowed), (length,), generator=generator)] for length in _LENGTHS]
        for _ in range(groups)
    ]
