"""The engines of runs that sample nothing themselves: stored captions take the place of sampled ones.

    StoredEngine   load version → encode prompts → the completions of another run's rollout log → their stored rewards
    PairEngine     load version → encode prompts and a pair's two captions
                       → log-probs under the reference (and the policy, to measure) → the pair's labels

Both take the way that rollouts take, with their plans, buffer, log, checkpoints and resume; evaluations are sampled as
ever. A group of a rollout log is an example of an ordinary data set, its completions in the metadata (`sample_of`), so
that the one reader of data sets, with its seeded order, its quarantine and its exact resume, reads them, too. The
reference log-probs of pairs are the same for every version, and are made here, beside the learner, image and prompt
once for both captions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import DataError
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, RewardBreakdown, RewardFailure, Score
from mmrl_ray.policy.generation.base import GroupOutput
from mmrl_ray.preferences.dataset import pair_of
from mmrl_ray.rollouts.engine import RolloutEngine, Sampled
from mmrl_ray.rollouts.types import GroupRequest

COLUMNS = (
    *("sample_id", "image_hash", "prompt", "caption", "token_ids", "behaviour_logprobs", "finish_reason"),
    *("reward_parts", "reward_sigma", "reward_risk", "masked"),
)
"""Of the rollout log, what `sample_of` needs beside a row's place and reward."""
_KEY = "mmrl_rollouts"
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """Completions of one sample, and what each earned."""

    completions: tuple[Completion, ...]
    rewards: tuple[Score, ...]


def sample_of(rows: Sequence[Mapping[str, Any]], images: tuple[bytes, ...]) -> Sample:
    """A group of the rollout log, given as its rows, as a row of a data set."""
    first = rows[0]
    id = f"{first['step']}.{first['index']}.{first['attempt']}/{first['sample_id']}"
    kept = [{"reward": row["reward"], **{name: row[name] for name in COLUMNS[3:]}} for row in rows]
    return Sample(id, images, first["prompt"], metadata={_KEY: kept})


def stored_group(sample: Sample) -> StoredGroup | None:
    """The group in a row; None where it is an ordinary sample.

    Raises:
        DataError: it is no group that `sample_of` wrote.
    """
    if _KEY not in sample.metadata:
        return None
    try:
        rows: Any = sample.metadata[_KEY]
        return StoredGroup(tuple(_completion(row) for row in rows), tuple(_reward(row) for row in rows))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"sample {sample.id!r} has no completions under {_KEY!r}: {type(error).__name__}: {error}"
        ) from error


class StoredEngine(RolloutEngine):
    """A `RolloutEngine` for which a sample that is a stored group brings its completions and rewards along."""

    def _check(self, request: GroupRequest) -> None:
        group = stored_group(request.sample)
        if group is None:
            return
        if len(group.completions) != request.completions:
            raise DataError(
                f"group {request.sample.id!r} has {len(group.completions)} completions, and "
                f"rollout.group_size={request.completions}"
            )
        for completion in group.completions:
            tokens, limit = completion.token_ids.numel(), request.sampling.max_new_tokens
            if not 1 <= tokens <= limit:
                raise DataError(
                    f"caption {completion.text!r:.60} has {tokens} tokens, and rollout.max_new_tokens={limit}: set it "
                    "to that of the run that sampled"
                )
            if (text := self._scorer.text_of(completion.token_ids)) != completion.text:
                raise DataError(
                    f"the tokens of caption {completion.text!r:.60} say {text!r:.60} to this model: they are another "
                    "tokenizer's; name the model of the run that sampled"
                )

    def _decode(self, prompts: Sequence[tuple[GroupRequest, EncodedPrompt]], *, greedy: bool) -> list[Sampled]:
        groups = _brought(stored_group, [request for request, _ in prompts])
        if not groups:
            return super()._decode(prompts, greedy=greedy)
        features = self._scorer.features([prompt for _, prompt in prompts])
        return [
            Sampled(request, prompt, GroupOutput(group.completions, None, None if features is None else features[i]))
            for i, ((request, prompt), group) in enumerate(zip(prompts, groups, strict=True))
        ]

    def _score(self, sampled: Sequence[Sampled]) -> list[list[Score]]:
        groups = _brought(stored_group, [each.request for each in sampled])
        return [[*group.rewards] for group in groups] or super()._score(sampled)


def _completion(row: Mapping[str, Any]) -> Completion:
    tokens = torch.tensor(row["token_ids"], dtype=torch.int64)
    logprobs = torch.tensor(row["behaviour_logprobs"], dtype=torch.float32)
    if tokens.ndim != 1 or tokens.shape != logprobs.shape:
        raise ValueError(f"{tokens.numel()} tokens and {logprobs.numel()} log-probs")
    return Completion(tokens, logprobs, row["caption"], row["finish_reason"])


def _reward(row: Mapping[str, Any]) -> Score:
    if row["reward"] is None:
        return RewardFailure(row["masked"] or "the run that sampled it has no reward for it")
    parts = {part["name"]: part["value"] for part in row["reward_parts"]}
    weights = {part["name"]: part["weight"] for part in row["reward_parts"] if part["weight"] is not None}
    return RewardBreakdown(float(row["reward"]), parts, weights, row["reward_sigma"], row["reward_risk"] or 0.0)


def _brought(find: Callable[[Sample], Found | None], requests: Sequence[GroupRequest]) -> list[Found]:
    """What the samples of an assignment bring along: all of them do, or none does."""
    return [found for request in requests if (found := find(request.sample)) is not None]


class PairEngine(RolloutEngine):
    """A `RolloutEngine` for which a sample that is a pair brings its captions along; others are sampled as ever."""

    def _check(self, request: GroupRequest) -> None:
        pair = pair_of(request.sample)
        for caption in pair.captions if pair is not None else ():
            # Its end does not count: a caption of a rollout that was cut off got one only here.
            tokens, limit = self._scorer.caption_tokens(caption).numel() - 1, request.sampling.max_new_tokens
            if tokens > limit:
                raise DataError(
                    f"caption {caption!r:.60} has {tokens} tokens, above rollout.max_new_tokens={limit}: raise it, or "
                    "leave the pair out"
                )

    def _decode(self, prompts: Sequence[tuple[GroupRequest, EncodedPrompt]], *, greedy: bool) -> list[Sampled]:
        pairs = _brought(pair_of, [request for request, _ in prompts])
        if not pairs:
            return super()._decode(prompts, greedy=greedy)
        first = prompts[0][0]
        outputs = self._scorer.score_captions(
            [prompt for _, prompt in prompts],
            [pair.captions for pair in pairs],
            first.sampling.temperature,
            under_policy=first.key.step < 0,  # an evaluation: what the policy makes of the captions is what is asked
        )
        return [Sampled(r, prompt, output) for (r, prompt), output in zip(prompts, outputs, strict=True)]

    def _score(self, sampled: Sequence[Sampled]) -> list[list[Score]]:
        pairs = _brought(pair_of, [each.request for each in sampled])
        return [
            [RewardBreakdown(p, {"preferred": p}, {"preferred": 1.0}) for p in pair.preferred] for pair in pairs
        ] or super()._score(sampled)
