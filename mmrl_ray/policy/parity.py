"""The start-up comparison on the real model: sampler, learner and transformers' own `generate` must say the same.

    sampler        what the decode loop records of tokens that it draws
    learner        each way of scoring completions: naive, shared prefix, packed rows (`policy/scoring/prefix.py`)
    transformers   `generate`, made to take the same tokens (`trial.py`): the judge, with no forward of ours

Compared are log-probs of a few completions of unequal length a prompt, some drawn by the sampler and some random, and
when something trains the gradient of their sum. A causality probe changes later tokens of a completion: no earlier one
may move. A path that differs gives way to the naive one, and the choice carries its reason: nothing falls back
silently. What the naive path does not mend is a `ModelError`: sampler and learner would have different policies.

The bound is in nats: `TOLERANCES` times the mean |log-prob| of random tokens (1 at least), which grows as rounding
does, with the spread of the logits. Two ways round differently (other shapes, other kernels). In float32 that makes
1e-6 of that mean at 28 layers, in bfloat16, whose steps are 2⁻⁸, up to 0.013 (0.4 nats where the logits' standard
deviation is 6.6); a position shifted by one makes 0.2 or more. A comparison in bfloat16 finds such mistakes, not
subtle ones. The gradient's relative distance may be four times the tolerance.

Beside the scores of each path with their gradient it costs two naive passes, and a prompt's pass and seven decode steps
each of the sampler and, for each of four completions a prompt, of `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.judge import NAMES, NAN, Judge, PathGap
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.prefix import ScorePath

TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


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
    def max_difference(self) -> float:
        """Largest |Δ log-prob| of the wanted path to transformers' own, in nats; nan when it was not run."""
        return self._wanted.to_model

    @property
    def gradient_difference(self) -> float | None:
        """Of the wanted path to the naive one."""
        return self._wanted.gradient

    @property
    def largest_gap(self) -> float:
        """Of what a run uses (sampler, chosen path, the naive path it falls back to) to transformers' own and to each
        other, causality included, in nats: one figure for a table of models. nan when something could not be run."""
        used = [gap for gap in self.gaps if gap.path in ("naive", self.path)]
        found = [self.sampler, *(x for gap in used for x in (gap.to_model, gap.to_sampler, gap.causality))]
        return NAN if any(x != x for x in found) else max(found)

    @property
    def _wanted(self) -> PathGap:
        return next(gap for gap in self.gaps if gap.path == self.wanted)


def choose_path(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    *,
    temperature: float = 1.0,
    tolerance: float | None = None,
    wanted: ScorePath = "shared_prefix",
) -> Comparison:
    """`compare`, for whoever goes on with the model: completions are to be scored by the `path` of the answer.

    Raises:
        ModelError: sampler, learner and transformers' own forward do not agree, and no other path mends it.
    """
    comparison = compare(policy, prompts, temperature=temperature, tolerance=tolerance, wanted=wanted)
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
    """
    limit = TOLERANCES[policy.dtype] if tolerance is None else tolerance
    judge = Judge(policy, prompts, temperature, limit)
    injected = judge.try_features()
    note = "" if injected is None else f"; vision features are made in every forward ({injected})"
    troubles = [trouble for trouble in (judge.draw(), judge.ask_model()) if trouble is not None]
    # The naive one first: the others' gradients are held against its.
    gaps = tuple(judge.look(path) for path in dict.fromkeys(("naive", *others, wanted)))
    naive, chosen = gaps[0], next(gap for gap in gaps if gap.path == wanted)
    sampler = judge.sampler_gap()
    if sampler > judge.bound:
        troubles.append(judge.above("the sampler differs from the model's own forward by", sampler))
    if naive.trouble is not None:
        troubles.append(naive.trouble)
    used = naive if chosen.trouble is not None else chosen
    if not troubles and used.to_sampler > judge.bound:
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
