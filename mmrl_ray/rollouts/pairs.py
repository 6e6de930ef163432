"""The engine of a run that learns from preferences: stored captions take the place of sampled ones.

    load version → encode prompts and captions → log-probs under the reference (and the policy, to measure) → labels

So pairs take the way that rollouts take, with their plans, buffer, log, checkpoints and resume. The reference is the
same for every version, and its log-probs are made here, beside the learner, image and prompt once for both captions.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmrl_ray.errors import DataError
from mmrl_ray.experience.breakdown import RewardBreakdown, Score
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.preferences.dataset import LabelledPair, pair_of
from mmrl_ray.rollouts.engine import RolloutEngine, Sampled
from mmrl_ray.rollouts.types import GroupRequest


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
        if not _are_pairs([request for request, _ in prompts]):
            return super()._decode(prompts, greedy=greedy)
        first = prompts[0][0]
        outputs = self._scorer.score_captions(
            [prompt for _, prompt in prompts],
            [_pair(request).captions for request, _ in prompts],
            first.sampling.temperature,
            under_policy=first.key.step < 0,  # an evaluation: what the policy makes of the captions is what is asked
        )
        return [Sampled(r, prompt, output) for (r, prompt), output in zip(prompts, outputs, strict=True)]

    def _score(self, sampled: Sequence[Sampled]) -> list[list[Score]]:
        if not _are_pairs([each.request for each in sampled]):
            return super()._score(sampled)
        return [
            [RewardBreakdown(p, {"preferred": p}, {"preferred": 1.0}) for p in _pair(each.request).preferred]
            for each in sampled
        ]


def _are_pairs(requests: Sequence[GroupRequest]) -> bool:
    """An assignment is of pairs throughout, or of none."""
    return bool(requests) and pair_of(requests[0].sample) is not None


def _pair(request: GroupRequest) -> LabelledPair:
    pair = pair_of(request.sample)
    assert pair is not None
    return pair
