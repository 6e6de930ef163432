"""The start-up comparison on the real model: sampler, learner and transformers' own `generate` must say the same.

    sampler        log-probs that the run's generation engine records of tokens that it draws; the local decode loop's
                   where there is no engine (learner, warm start, serving)
    learner        each way of scoring completions: naive, shared prefix, packed rows (`policy/scoring/prefix.py`)
    transformers   `generate`, made to take the same tokens (`trial.py`): the judge, with no forward of ours

Compared are log-probs of a few completions of unequal length a prompt, some drawn by the sampler and some random, and
when something trains the gradient of their sum. A causality probe changes later tokens of a completion: no earlier one
may move. A path that differs gives way to the naive one, and the choice carries its reason: nothing falls back
silently. What the naive path does not mend is a `ModelError`: sampler and learner would have different policies. Of an
engine that says it is not exact (`Capabilities.exact_logprobs`) the difference is told; `learner.max_sampler_gap` holds
it at every step.

The bound is in nats: `TOLERANCES` times the mean |log-prob| of random tokens (1 at least), which grows as rounding
does, with the spread of the logits. Two ways round differently (other shapes, other kernels). In float32 that makes
1e-6 of that mean at 28 layers, in bfloat16, whose steps are 2⁻⁸, up to 0.013 (0.4 nats where the logits' standard
deviation is 6.6); a position shifted by one makes 0.2 or more. A comparison in bfloat16 finds such mistakes, not
subtle ones. The gradient's relative distance may be four times the tolerance.

Beside the scores of each path with their gradient it costs two naive passes, and a prompt's pass and seven decode steps
each of the sampler and, for each of four completions a prompt, of `generate`.

`K` prompts, `R` completions of each (the first two drawn by the sampler, the last two random), `T` tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from mmrl_ray.errors import ModelError, first_line
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams, VisionFeatures
from mmrl_ray.policy.generation.base import DecodeRequest, GenerationEngine
from mmrl_ray.policy.generation.decode import decode_endlessly
from mmrl_ray.policy.memory import trim_heap
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.packed import is_checkpointing, unpackable
from mmrl_ray.policy.scoring.prefix import ScorePath, encode_prefix, score_completions
from mmrl_ray.policy.trial import generated_logprobs
from mmrl_ray.policy.vision import vision_features

TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
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
_FINITE = torch.finfo(torch.float64).max
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


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the start-up comparison found: how completions are scored in a run, and why."""

    path: ScorePath
    reason: str
    wanted: ScorePath
    """The path that was asked for."""
    inject_vision: bool
    """Whether ready-made vision features stand in for the tower."""
    bound: float
    """Nats that any two may differ by."""
    sampler: float
    """Largest |Δ log-prob| of the sampler to transformers' own `generate`, in nats."""
    gaps: tuple[PathGap, ...]
    """Of each path that was looked at, the naive one first."""
    troubles: tuple[str, ...]
    """What no other path mends; empty for a model that may be used."""

    @property
    def largest_gap(self) -> float:
        """Largest gap of what a run uses (sampler, chosen path, the naive path it falls back to) to transformers' own,
        and to each other, causality included, in nats: one figure for a table of models. nan when something could not
        be run."""
        used = [gap for gap in self.gaps if gap.path in ("naive", self.path)]
        found = [self.sampler, *(x for gap in used for x in (gap.to_model, gap.to_sampler, gap.causality))]
        return NAN if any(x != x for x in found) else max(found)

    @property
    def wanted_gap(self) -> PathGap:
        """Of the path that was asked for."""
        return next(gap for gap in self.gaps if gap.path == self.wanted)


def choose_path(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    *,
    temperature: float = 1.0,
    wanted: ScorePath = "shared_prefix",
    engine: GenerationEngine | None = None,
) -> Comparison:
    """`compare`, for whoever goes on with the model: completions are to be scored by the `path` of the answer.

    Raises:
        ModelError: sampler, learner and transformers' own forward do not agree, and no other path mends it.
    """
    comparison = compare(policy, prompts, temperature=temperature, wanted=wanted, engine=engine)
    if policy.device.type == "cpu":  # 0.9 GB at 140 M parameters, which a process would have from here on
        trim_heap()
    if (error := disagreement(policy, comparison)) is not None:
        raise error
    return comparison


def disagreement(policy: Policy, comparison: Comparison) -> ModelError | None:
    """What to raise for a comparison with troubles: it names the model, the figures and the remedy."""
    if not comparison.troubles:
        return None
    precise = "" if policy.dtype == torch.float32 else ", or try model.dtype: float32"
    return ModelError(
        f"model {policy.path!r} ({policy.hf_model.config.model_type}) does not pass the start-up comparison: "
        f"{'; '.join(comparison.troubles)}; choose another checkpoint{precise}; `mmrl check {policy.path}` shows every "
        "figure"
    )


def compare(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    *,
    temperature: float = 1.0,
    tolerance: float | None = None,
    wanted: ScorePath = "shared_prefix",
    others: Sequence[ScorePath] = (),
    engine: GenerationEngine | None = None,
) -> Comparison:
    """Holds sampler and learner against transformers' own forward on `prompts` (one or two are enough).

    Sets `policy.inject_vision` to the finding. Prompts need their pixels. No generator of torch's own is drawn from.

    Args:
        policy: the model as it will be used, its adapter added.
        prompts: real ones; different lengths also check the padding.
        temperature: the rollout temperature.
        tolerance: by default `TOLERANCES` of the model's dtype.
        wanted: "packed" where there can be no cache (checkpointed or sharded layers).
        others: paths to look at beside the naive and the wanted one.
        engine: what samples in the run, loaded with the weights that the policy has; the local decode loop by default.
    """
    limit = TOLERANCES[policy.dtype] if tolerance is None else tolerance
    judge = Judge(policy, prompts, temperature, limit, engine)
    injected = judge.try_features()
    note = "" if injected is None else f"; vision features are made in every forward ({injected})"
    troubles = [trouble for trouble in (judge.draw(), judge.ask_model()) if trouble is not None]
    # The naive one first: the others' gradients are held against its.
    gaps = tuple(judge.look(path) for path in dict.fromkeys(("naive", *others, wanted)))
    naive, chosen = gaps[0], next(gap for gap in gaps if gap.path == wanted)
    sampler = judge.sampler_gap()
    is_exact = engine is None or engine.capabilities.exact_logprobs
    if engine is not None and not is_exact:
        note += f"; log-probs of the {engine.name} engine differ from it by up to {sampler:.2g} nats"
    if sampler > (judge.bound if is_exact else _FINITE):
        remedy = "" if engine is None else engine.remedy
        troubles.append(judge.above("the sampler differs from the model's own forward by", sampler) + remedy)
    if naive.trouble is not None:
        troubles.append(naive.trouble)
    used = naive if chosen.trouble is not None else chosen
    if is_exact and not troubles and used.to_sampler > judge.bound:
        troubles.append(judge.above("the sampler differs from the learner by", used.to_sampler))
    reason = chosen.trouble or f"{NAMES[wanted]} agrees with the model's own forward within {judge.bound:.2g} nats"
    return Comparison(
        path=used.path,
        reason=reason + note,
        wanted=wanted,
        inject_vision=policy.inject_vision,
        bound=judge.bound,
        sampler=sampler,
        gaps=gaps,
        troubles=tuple(troubles),
    )


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

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[EncodedPrompt],
        temperature: float,
        limit: float,
        engine: GenerationEngine | None = None,
    ) -> None:
        self._policy, self._prompts, self._temperature, self._limit = policy, prompts, temperature, limit
        self._engine = engine
        room = policy.context_length - max(prompt.input_ids.numel() for prompt in prompts)
        self._rows = _random_completions(policy, len(prompts), max(1, min(_TOKENS, room)))
        """int64 [K, R, T]."""
        self._recorded: torch.Tensor | None = None
        """float32 [K, 2, T], what the sampler recorded, as far as it drew."""
        self._drawn: torch.Tensor | None = None
        """bool [K, 2, T], which tokens it drew: its completions may end before T."""
        self._truth: torch.Tensor | None = None
        """float32 [K, R, T], what transformers says."""
        self._gradient: torch.Tensor | None = None
        """Of the naive path."""
        self._spread = 1.0

    @property
    def bound(self) -> float:
        """Nats that any two log-probs may differ by."""
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
            found = first_line(error)
        else:
            self._note_spread(pixels)
            difference = _largest(injected, pixels)
            found = None if difference <= self.bound else f"they change log-probs by {difference:.3g}"
        self._policy.inject_vision = found is None
        return found

    def draw(self) -> str | None:
        """Lets the sampler draw its part of the completions; what went wrong, or None."""
        rows, tokens = len(_DRAWN), self._rows.shape[2]
        sampling = SamplingParams(temperature=self._temperature, max_new_tokens=tokens)
        requests = [DecodeRequest(prompt, rows, sampling) for prompt in self._prompts]
        try:
            with _without_checkpointing(self._policy):
                outputs = (
                    decode_endlessly(self._policy, requests)
                    if self._engine is None
                    else self._engine.sample_for_comparison(requests)
                )
        except _FORWARD_ERRORS as error:
            return f"the sampler failed: {first_line(error)}"
        drawn = [completion for output in outputs for completion in output.completions]
        lengths = torch.tensor([c.token_ids.numel() for c in drawn])
        was_drawn = (torch.arange(tokens) < lengths[:, None]).unflatten(0, (-1, rows))
        self._rows[:, :rows][was_drawn] = torch.cat([c.token_ids for c in drawn])
        recorded = torch.zeros(was_drawn.shape)
        recorded[was_drawn] = torch.cat([c.logprobs for c in drawn])
        self._recorded, self._drawn = recorded.to(self._policy.device), was_drawn.to(self._policy.device)
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
            return f"transformers' own generate failed: {first_line(error)}"
        self._truth = torch.stack(found)
        self._note_spread(self._truth[:, len(_DRAWN) :])
        return None

    def sampler_gap(self) -> float:
        """Largest |Δ log-prob| of what the sampler recorded to what transformers says."""
        return _largest(self._recorded, self._truth, self._drawn)

    def look(self, path: ScorePath) -> PathGap:
        """Scores the completions by one path; its gaps to the others."""
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
            return PathGap(path, trouble=f"the {NAMES[path].replace(' ', '-')} forward failed: {first_line(error)}")
        logprobs = logprobs.detach()
        one, other = (logprobs[:, i, :_KEPT] for i in (-2, -1))
        gap = PathGap(
            path,
            _largest(logprobs, self._truth, mask),
            _largest(logprobs, self._recorded, mask if self._drawn is None else mask[:, : len(_DRAWN)] & self._drawn),
            _largest(one, other),
            None if path == "naive" else _distance(gradient, self._gradient),
        )
        self._gradient = gradient if path == "naive" else self._gradient
        return replace(gap, trouble=self._trouble(gap))

    def above(self, what: str, gap: float) -> str:
        """A sentence about a gap above the bound."""
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
        return f"the prompt's forward with a cache failed: {first_line(error)}"
    if cache is None:
        return "the model returned no cache"
    layer = unsharable_layer(cache)
    return None if layer is None else f"{layer}, which cannot be repeated for several completions"


def _features(policy: Policy, prompts: Sequence[EncodedPrompt]) -> list[VisionFeatures] | None:
    return vision_features(policy, prompts) if policy.inject_vision else None


def _random_completions(policy: Policy, groups: int, length: int) -> torch.Tensor:
    """int64 [K, R, T]; the last two of a group begin alike."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(policy.vocab_size)
    allowed = ids[~torch.isin(ids, torch.tensor(policy.image_token_ids, dtype=torch.int64))]
    rows = allowed[torch.randint(len(allowed), (groups, len(_DRAWN) + 2, length), generator=generator)]
    rows[:, -1, :_KEPT] = rows[:, -2, :_KEPT]
    return rows
