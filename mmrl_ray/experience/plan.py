"""`build_step_plan`: from a step's scored groups to what one optimiser step consumes.

Made by the controller, since baselines and denominators need the whole step, and without a processor or a tensor of
the groups themselves. `M` groups of `G` completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.reward import Normalization
from mmrl_ray.errors import LearnerError
from mmrl_ray.experience.breakdown import RewardBreakdown, RewardFailure
from mmrl_ray.experience.carriers import PlannedGroup, ScoredGroup, StepPlan
from mmrl_ray.experience.reward_figures import learning_rewards, masked_figures
from mmrl_ray.losses.weighing import StepRewards


class GroupSize(NamedTuple):
    """What a group costs in a forward pass."""

    prompt_tokens: int
    completions: int
    longest_completion: int


def build_step_plan(
    step: int,
    groups: Sequence[ScoredGroup],
    *,
    learner: LearnerSection,
    max_new_tokens: int,
    world_size: int,
    normalize: Normalization = "none",
) -> StepPlan:
    """Advantages, per-token weights, one denominator, and the split over ranks and micro-batches.

    Args:
        step: the step; also the policy version that consumes it.
        groups: the step's groups by place. Completions without a reward are left out of everything, and with them
            what has too little left: see `left_out`.
        learner: advantage, aggregation, KL and token budget.
        max_new_tokens: for the `constant` aggregation.
        world_size: learner ranks.
        normalize: whether parts of the reward are normalised by their group.

    Raises:
        LearnerError: no group of the step can be learned from.
    """
    why = {group.key: left_out(group, learner, normalize) for group in groups}
    live = [group for group in groups if why[group.key] is None]
    if not live:
        reasons = sorted({reason for reason in why.values() if reason}) or ["no sample of the step could be used"]
        raise LearnerError(f"step {step} has no group to learn from: {'; '.join(reasons)[:500]}")
    seen = learning_rewards(live, learner, normalize)  # [M, G]
    rewards, counts = seen.rewards, seen.counts
    greedy = None
    if learner.advantage == "greedy":
        greedy = torch.tensor([_greedy_reward(g) for g in live], dtype=torch.float64)
    lengths = torch.tensor([g.completion_tokens for g in live], dtype=torch.float64)  # [M, G]
    found = learner.family.weigh(StepRewards(rewards, counts, seen.magnitude, greedy, lengths, max_new_tokens))
    weights, scales, denominator = found.advantages, found.scales, found.denominator
    planned = tuple(
        PlannedGroup(
            key=group.key,
            sample_id=group.sample_id,
            staleness=step - group.policy_version,
            advantages=tuple(weights[i].tolist()),
            rewards=tuple(r if c else None for r, c in zip(rewards[i].tolist(), counts[i].tolist(), strict=True)),
            normalization=normalize,
            scales=tuple(scales[i].tolist()),
            completion_tokens=group.completion_tokens,
            prompt_tokens=group.prompt_tokens,
            payload=group.payload,
        )
        for i, group in enumerate(live)
    )
    sizes = [GroupSize(g.prompt_tokens, len(g.learned), max(g.learned_tokens)) for g in planned]
    return StepPlan(
        step=step,
        groups=planned,
        denominator=float(denominator),
        micro_batches=split_micro_batches(sizes, learner.micro_batch_tokens, world_size),
        metrics={**seen.metrics, **found.metrics, **masked_figures(groups, len(planned)), **_length_metrics(live)},
    )


def left_out(group: ScoredGroup, learner: LearnerSection, normalize: Normalization) -> str | None:
    """Why a group cannot be learned from; None for one that can.

    A baseline made of the group's other completions, and parts normalised by their group, need two rewards in it;
    every other baseline needs one, and `greedy` beside it that of the greedy completion.
    """
    if group.masked is not None:
        return group.masked
    scored, total = len(group.rewards) - len(group.failures), len(group.rewards)
    needed = 2 if learner.advantage in ("leave_one_out", "group") or normalize == "group" else 1
    if scored < min(needed, total):
        return f"{scored} of {total} completions with a reward are too few: {group.failures[0]}"
    if learner.advantage == "greedy" and isinstance(group.greedy_reward, RewardFailure):
        return f"its greedy completion has no reward: {group.greedy_reward.reason}"
    return None


def split_micro_batches(
    sizes: Sequence[GroupSize], token_budget: int, world_size: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """[rank][micro-batch][group index]: whole groups, ranks balanced by tokens, each micro-batch under the budget.

    A group goes to the rank with the fewest tokens so far, largest first. Within a rank, groups of like length share a
    micro-batch, whose cost counts the padding; a group that exceeds the budget by itself gets a micro-batch of its own.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-padded_tokens([sizes[i]]), i))
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for i in order:
        rank = load.index(min(load))
        ranks[rank].append(i)
        load[rank] += padded_tokens([sizes[i]])
    return tuple(_pack(rank, sizes, token_budget) for rank in ranks)


def padded_tokens(sizes: Sequence[GroupSize]) -> int:
    """Token positions of one forward pass over these groups: each prompt once, padding included."""
    prompts = len(sizes) * max(s.prompt_tokens for s in sizes)
    return prompts + sum(s.completions for s in sizes) * max(s.longest_completion for s in sizes)


def _pack(indices: Sequence[int], sizes: Sequence[GroupSize], token_budget: int) -> tuple[tuple[int, ...], ...]:
    batches: list[list[int]] = []
    for i in indices:
        if batches and padded_tokens([sizes[j] for j in (*batches[-1], i)]) <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return tuple(tuple(batch) for batch in batches)


def _greedy_reward(group: ScoredGroup) -> float:
    if not isinstance(group.greedy_reward, RewardBreakdown):
        raise LearnerError(f"group {group.key} has no greedy reward, which learner.advantage=greedy needs")
    return group.greedy_reward.adjusted


def _length_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    lengths = [t for g in groups for t in g.completion_tokens]
    return {"completion/length_mean": sum(lengths) / len(lengths), "completion/length_max": max(lengths)}
