"""An export held against its run: what the run's policy says of some samples, and whether the export says the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ExportError
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.lora.adapter import reference_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.model_folder import same_inputs
from mmrl_ray.policy.parity import TOLERANCES
from mmrl_ray.policy.prompts import encode_caption, encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions

_TOGETHER = 4
"""Prompts that are scored in one pass."""
_RANDOM = 16
"""Random tokens a prompt."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two policies are apart that need not be one."""

    base: str
    """How the run's base was kept, in words."""
    largest: float
    mean: float
    same_captions: int

    def told(self, samples: int) -> str:
        """In one sentence."""
        return (
            f"the run learnt on {self.base}: on the base as it was before, the same adapter's log-probs differ from "
            f"the run's own by {self.mean:.2g} nats in the mean and {self.largest:.2g} at most, and "
            f"{self.same_captions} of {samples} greedy captions are the same"
        )


@dataclass(frozen=True, slots=True)
class Check:
    """How the export compares with the run's policy. Log-probs in nats."""

    dtype: str
    samples: int
    tokens: int
    """Whose log-probs were compared."""
    bound: float
    largest: float
    mean: float
    effect: float
    """Mean |Δ log-prob| that the adapter makes to its base on the same tokens."""
    same_captions: int
    """Greedy captions that are the same, token by token."""
    kept: float | None = None
    """Of merged weights: the share of the adapter's update in them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the processor, which the export does not hold: its users have to give them."""
    unquantized: Distance | None = None
    """From the run's policy, whose base is quantised, to the same adapter on the base as it was before."""

    def told(self) -> str:
        """In one sentence."""
        kept = "" if self.kept is None else f"; {self.kept:.1%} of the adapter's update is in the weights"
        return (
            f"loaded anew in {self.dtype}, log-probs of {self.tokens} tokens differ from the run's by at most "
            f"{self.largest:.2g} nats (allowed: {self.bound:.2g}) and in the mean by {self.mean:.2g}, where the "
            f"adapter moves them by {self.effect:.2g}; {self.same_captions} of {self.samples} greedy captions are the "
            f"same{kept}{'' if self.unquantized is None else f'; {self.unquantized.told(self.samples)}'}"
        )


Rows = list[list[torch.Tensor]]
"""Of each sample some completions, or their log-probs: [T] each."""


@dataclass(frozen=True, slots=True)
class Said:
    """What the run's policy says of the samples."""

    prompts: Sequence[EncodedPrompt]
    longest: int
    """Tokens of a greedy caption."""
    rows: Rows
    """A greedy caption, one by people where there are any, random tokens."""
    logprobs: Rows
    effect: float
    bound: float

    @classmethod
    def of(cls, policy: Policy, samples: Sequence[Sample], longest: int) -> Said:
        """Of a policy with its adapter."""
        prompts = encode_prompts(policy, samples)
        rows = [
            [caption, *(encode_caption(policy, text) for text in sample.references[:1]), _random(policy, i)]
            for i, (caption, sample) in enumerate(zip(_greedy(policy, prompts, longest), samples, strict=True))
        ]
        logprobs = _score(policy, prompts, rows)
        with reference_policy(policy.model):
            moved = torch.cat(_gaps(_score(policy, prompts, rows), logprobs))
        spread = float(torch.cat([group[-1] for group in logprobs]).abs().mean())
        bound = TOLERANCES[policy.dtype] * max(1.0, spread if math.isfinite(spread) else 1.0)
        return cls(prompts, longest, rows, logprobs, float(moved.mean()), bound)

    def has_inputs(self, policy: Policy, samples: Sequence[Sample]) -> bool:
        """Whether `policy` makes the same prompts of the samples."""
        return all(map(same_inputs, self.prompts, encode_prompts(policy, samples)))

    def distance(self, other: Policy, base: str) -> Distance:
        """To another policy, which makes the same prompts."""
        gaps = torch.cat(_gaps(_score(other, self.prompts, self.rows), self.logprobs))
        captions = _greedy(other, self.prompts, self.longest)
        same = sum(torch.equal(group[0], own) for group, own in zip(self.rows, captions, strict=True))
        return Distance(base, float(gaps.max()), float(gaps.mean()), same)

    def compare(
        self, again: Policy, samples: Sequence[Sample], *, kept: float | None = None, settings: dict[str, Any]
    ) -> Check:
        """Of the export, loaded anew.

        Raises:
            ExportError: it is another policy.
        """
        if not self.has_inputs(again, samples):
            raise ExportError(
                "the export's processor makes other inputs of the same pictures and prompts than the run's"
            )
        captions = _greedy(again, self.prompts, self.longest)
        logprobs = _score(again, self.prompts, [[*group, own] for group, own in zip(self.rows, captions, strict=True)])
        gaps = torch.cat(_gaps([group[:-1] for group in logprobs], self.logprobs))
        largest = float(gaps.max())
        if not largest <= self.bound:
            raise ExportError(
                f"the export is not the run's policy: log-probs in {dtype_name(again.dtype)} differ by {largest:.3g} "
                f"nats, above {self.bound:.2g}; nothing was written: export with --dtype float32, or the adapter alone"
            )
        for sample, (was, *_), own, (of_was, *_, of_own) in zip(samples, self.rows, captions, logprobs, strict=True):
            at = _parted(was, own)
            if at is not None and not float(of_own[at] - of_was[at]) <= 2 * self.bound:
                raise ExportError(
                    f"the export is not the run's policy: of sample {sample.id!r} its greedy caption goes another way "
                    f"at token {at}, by {float(of_own[at] - of_was[at]):.3g} nats; nothing was written"
                )
        same = sum(torch.equal(group[0], own) for group, own in zip(self.rows, captions, strict=True))
        return Check(
            dtype=dtype_name(again.dtype),
            samples=len(captions),
            tokens=gaps.numel(),
            bound=self.bound,
            largest=largest,
            mean=float(gaps.mean()),
            effect=self.effect,
            same_captions=same,
            kept=kept,
            settings=settings,
        )


def _greedy(policy: Policy, prompts: Sequence[EncodedPrompt], longest: int) -> list[torch.Tensor]:
    sampling = SamplingParams(greedy=True, max_new_tokens=longest, min_new_tokens=None)
    outputs = decode_groups(Decoder(policy), [DecodeRequest(prompt, 1, sampling) for prompt in prompts])
    return [output.completions[0].token_ids.cpu() for output in outputs]


@torch.no_grad()
def _score(policy: Policy, prompts: Sequence[EncodedPrompt], rows: Rows) -> Rows:
    found: Rows = []
    for start in range(0, len(prompts), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        scores = score_completions(policy, prompts[some], None, rows[some], 1.0, path="naive")
        lines = iter(scores.logprobs.cpu())
        found += [[next(lines)[: row.numel()] for row in group] for group in rows[some]]
    return found


def _gaps(one: Rows, other: Rows) -> list[torch.Tensor]:
    return [(a - b).abs() for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]


def _random(policy: Policy, seed: int) -> torch.Tensor:
    """Tokens that any policy finds unlikely: their log-probs show the most."""
    ids = torch.arange(policy.vocab_size)
    allowed = ids[~torch.isin(ids, torch.tensor(policy.image_token_ids, dtype=torch.int64))]
    return allowed[torch.randint(len(allowed), (_RANDOM,), generator=torch.Generator().manual_seed(seed))]


def _parted(one: torch.Tensor, other: torch.Tensor) -> int | None:
    """The first place where two captions differ; None where one goes on as the other."""
    shared = min(one.numel(), other.numel())
    differ = (one[:shared] != other[:shared]).nonzero()
    return int(differ[0]) if differ.numel() else None


def dtype_name(dtype: Any) -> str:
    """`bfloat16`, as configs have it."""
    return str(dtype).removeprefix("torch.")
