"""The same few completions by the sampler, by transformers and by any path of the learner, and how far apart they are.

`parity.py` says what they are for and draws the conclusions. `K` prompts, `R` completions of each (the
first two drawn by the sampler, the last two random), `T` tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams, VisionFeatures
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.packed import is_checkpointing, unpackable
from mmrl_ray.policy.scoring.prefix import ScorePath, encode_prefix, score_completions
from mmrl_ray.policy.trial import generated_logprobs
from mmrl_ray.policy.vision import vision_features

GRADIENT_SLACK = 4
"""The gradient's relative distance may be so many times the tolerance."""
_TOKENS = 8
"""Of each completion."""
_DRAWN = (5, 3)
"""So many tokens of each that the sampler draws are scored by the paths, so that there is padding."""
_KEPT = 4
"""Tokens that the two random completions of a prompt begin with, the same in both: the causality probe."""
NAMES: dict[ScorePath, str] = {"naive": "naive path", "shared_prefix": "shared prefix", "packed": "packed row"}
NAN = float("nan")
# What another library's forward may raise when it is called in a way that it was not made for, and ours about features.
_FORWARD_ERRORS = (
    *(RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError, ModelError),
)


@dataclass(frozen=True, slots=True)
class PathGap:
    """One way of scoring completions against the others: largest |Δ log-prob| in nats; nan where there is none."""

    path: ScorePath
    to_model: float = NAN
    """To transformers' own `generate`."""
    to_sampler: float = NAN
    """To what the sampler recorded."""
    causality: float = NAN
    """How far later tokens of a completion move earlier ones."""
    gradient: float | None = None
    """‖Δ gradient‖ ÷ ‖gradient of the naive path‖, where something trains."""
    trouble: str | None = None
    """Why completions are not to be scored so, or None."""


def unsharable_layer(cache: Cache) -> str | None:
    """The first cache layer that does not hold plain keys and values per token (a recurrent state, …), or None."""
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "is_initialized", False) and getattr(layer, "keys", layer) is None:
            continue  # it reads the keys of another layer (Gemma 4)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"layer {i} keeps a {type(layer).__name__}"
    return None


class Judge:
    """The same completions by the sampler, by transformers and by any path, and how far apart they are."""

    def __init__(self, policy: Policy, prompts: Sequence[EncodedPrompt], temperature: float, limit: float) -> None:
        self._policy, self._prompts, self._temperature, self._limit = policy, prompts, temperature, limit
        room = policy.context_length - max(prompt.input_ids.numel() for prompt in prompts)
        self._rows = _random_completions(policy, len(prompts), max(1, min(_TOKENS, room)))
        """int64 [K, R, T]."""
        self._recorded: torch.Tensor | None = None
        """float32 [K, 2, T], what the sampler recorded."""
        self._truth: torch.Tensor | None = None
        """float32 [K, R, T], what transformers says."""
        self._gradient: torch.Tensor | None = None
        """Of the naive path."""
        self._spread = 1.0

    @property
    def bound(self) -> float:
        """In nats."""
        return self._limit * self._spread

    def try_features(self) -> str | None:
        """None when ready-made vision features change nothing, else what is wrong; sets `policy.inject_vision`."""
        self._policy.inject_vision = True
        found: str | None = None
        try:
            with torch.no_grad():
                pixels, _ = self._score(None, self._rows[:, -1:], "naive")
                injected, _ = self._score(_features(self._policy, self._prompts), self._rows[:, -1:], "naive")
        except _FORWARD_ERRORS as error:
            found = _brief(error)
        else:
            self._note_spread(pixels)
            difference = _largest(injected, pixels)
            found = None if difference <= self.bound else f"they change log-probs by {difference:.3g}"
        self._policy.inject_vision = found is None
        return found

    def draw(self) -> str | None:
        """Lets the sampler draw its part of the completions; what went wrong, or None."""
        rows = len(_DRAWN)
        # Without an end, so that there is a token everywhere; π itself is the same.
        endless = replace(self._policy, eos_token_ids=())
        sampling = SamplingParams(temperature=self._temperature, max_new_tokens=self._rows.shape[2])
        try:
            with _without_checkpointing(self._policy):
                outputs = decode_groups(
                    Decoder(endless, max_rows=rows * len(self._prompts)),
                    [DecodeRequest(prompt, rows, sampling) for prompt in self._prompts],
                )
        except _FORWARD_ERRORS as error:
            return f"the sampler failed: {_brief(error)}"
        drawn = [completion for output in outputs for completion in output.completions]
        self._rows[:, :rows] = torch.stack([c.token_ids for c in drawn]).unflatten(0, (-1, rows))
        self._recorded = torch.stack([c.logprobs for c in drawn]).unflatten(0, (-1, rows)).to(self._policy.device)
        return None

    def ask_model(self) -> str | None:
        """Lets transformers score the completions; what went wrong, or None."""
        try:
            with _without_checkpointing(self._policy):
                found = [
                    generated_logprobs(self._policy, prompt, rows, self._temperature)
                    for prompt, rows in zip(self._prompts, self._rows, strict=True)
                ]
        except _FORWARD_ERRORS as error:
            return f"transformers' own generate failed: {_brief(error)}"
        self._truth = torch.stack(found)
        self._note_spread(self._truth[:, len(_DRAWN) :])
        return None

    def sampler_gap(self) -> float:
        """Of what the sampler recorded to what transformers says."""
        return _largest(self._recorded, self._truth)

    def look(self, path: ScorePath) -> PathGap:
        """One path's gaps."""
        policy = self._policy
        blocked = unpackable(policy) if path == "packed" else None
        if path == "shared_prefix":
            blocked = _unsharable(policy, self._prompts)
        if blocked is not None:
            return PathGap(path, trouble=blocked)
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        try:
            with torch.set_grad_enabled(bool(trained)):
                logprobs, mask = self._score(_features(policy, self._prompts), self._rows, path)
            gradient = _gradient(logprobs, trained) if trained else None
        except _FORWARD_ERRORS as error:
            return PathGap(path, trouble=f"the {NAMES[path].replace(' ', '-')} forward failed: {_brief(error)}")
        logprobs = logprobs.detach()
        one, other = (logprobs[:, i, :_KEPT] for i in (-2, -1))
        gap = PathGap(
            path,
            _largest(logprobs, self._truth, mask),
            _largest(logprobs, self._recorded, mask),
            _largest(one, other),
            None if path == "naive" else _distance(gradient, self._gradient),
        )
        self._gradient = gradient if path == "naive" else self._gradient
        return replace(gap, trouble=self._trouble(gap))

    def above(self, what: str, gap: float) -> str:
        """With the bound."""
        return f"{what} {gap:.3g} nats, above {self.bound:.2g}"

    def _trouble(self, gap: PathGap) -> str | None:
        found = []
        if gap.to_model > self.bound:
            found.append(self.above("differs from the model's own forward by", gap.to_model))
        if gap.causality > self.bound:
            found.append(self.above("lets a later token of a completion move an earlier one by", gap.causality))
        if gap.gradient is not None and not gap.gradient <= GRADIENT_SLACK * self._limit:
            found.append(f"differs in its gradient by {gap.gradient:.3g}, above {GRADIENT_SLACK * self._limit:g}")
        return f"{NAMES[gap.path]} {', and '.join(found)}" if found else None

    def _score(
        self, features: Sequence[VisionFeatures] | None, rows: torch.Tensor, path: ScorePath
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs float32 [K, R, T] and which of them there are."""
        lengths = _DRAWN if rows.shape[1] > len(_DRAWN) else ()
        completions = [
            [row[: lengths[i]] if i < len(lengths) else row for i, row in enumerate(group)] for group in rows
        ]
        scores = score_completions(self._policy, self._prompts, features, completions, self._temperature, path=path)
        shape = rows.shape[:2]
        return scores.logprobs.unflatten(0, shape), scores.mask.unflatten(0, shape)

    def _note_spread(self, logprobs: torch.Tensor) -> None:
        """Of random tokens."""
        mean = float(logprobs.abs().mean())
        self._spread = max(1.0, mean) if mean < float("inf") else 1.0


def _largest(one: torch.Tensor | None, other: torch.Tensor | None, mask: torch.Tensor | None = None) -> float:
    """Largest |Δ| of the rows [K, R, T] that both have: infinite where one is NaN; nan with nothing to compare."""
    if one is None or other is None:
        return NAN
    rows = min(one.shape[1], other.shape[1])
    difference = torch.nan_to_num((one[:, :rows] - other[:, :rows]).abs(), nan=float("inf"))
    return float((difference if mask is None else difference[mask[:, :rows]]).max())


def _gradient(logprobs: torch.Tensor, trained: Sequence[torch.Tensor]) -> torch.Tensor:
    gradients = torch.autograd.grad(logprobs.sum(), list(trained), allow_unused=True)
    return torch.cat([g.float().flatten() for g in gradients if g is not None])


def _distance(one: torch.Tensor | None, other: torch.Tensor | None) -> float | None:
    """‖Δ‖ ÷ ‖other‖."""
    if one is None or other is None:
        return None
    return float((one - other).norm() / other.norm().clamp_min(1e-12)) if one.shape == other.shape else float("inf")


@contextmanager
def _without_checkpointing(policy: Policy) -> Iterator[None]:
    """Within it layers take a cache, whatever the backward pass wants of them."""
    layers = [m for m in policy.hf_model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


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


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _random_completions(policy: Policy, groups: int, length: int) -> torch.Tensor:
    """int64 [K, R, T]; the last two of a group begin alike."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(policy.vocab_size)
    allowed = ids[~torch.isin(ids, torch.tensor(policy.image_token_ids, dtype=torch.int64))]
    rows = allowed[torch.randint(len(allowed), (groups, len(_DRAWN) + 2, length), generator=generator)]
    rows[:, -1, :_KEPT] = rows[:, -2, :_KEPT]
    return rows
