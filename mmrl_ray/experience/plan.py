"""`build_step_plan`: from a step's scored groups to what one optimiser step consumes.

Made by the controller, since baselines and denominators need the whole step, and without a processor or a tensor of
the groups themselves. `M` groups of `G` completions.

**Rewards** (`learning_rewards`): those that learning uses, and their figures in the metrics line. `K` parts have a
weight. In the order in which learning comes to its rewards:

    total of the parts ─ risk: less κσ ─ normalize: parts by their group instead
                       ─ overlong: less what the length costs ─ k1: less the KL penalty ─▶ baseline

    reward/mean, reward/std           of the totals as they were given, of the completions that have one
    reward/group_std                  mean over groups of the standard deviation of the totals within one
    reward/zero_variance_groups       groups in which all completions earn the same after risk and normalisation
    reward/NAME, reward_weight/NAME   mean of a part, and its weight; parts of parts without one
    reward/masked                     share of the step's completions without a reward
    masked, masked_captions           groups left out of learning; completions without a reward
    reward_missing/NAME               completions that a part of weight 0 could not score, where there are any
    reward/sigma                      mean standard deviation of the totals, where they have one
    reward/risk, reward/adjusted      κ where it is not 0, and the mean of total - κσ
    reward/normalized                 1 where parts were normalised by their group
    reward_group_std/NAME             then also: by what each was divided, the mean over groups
    reward/with_kl                    where KL is part of the reward: the mean that the baseline saw
    overlong/penalty, overlong/share  mean penalty of the completions, and the share of them that have one
    truncated/masked                  with mask_truncated: share of the completions that nothing is learnt from

**Dynamic sampling** (`Selection`): which groups a step keeps of those that were drawn for it.

    sampled/groups         drawn for the step; sampled/with_spread of them have completions of different rewards
    sampled/surplus        with spread, and not kept: groups are drawn several at a time
    sampled/reward_mean    over all that were drawn: `reward/mean` is of those that were kept
    sampled/at_bound       1 where the step was filled up with groups without spread
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.reward import Normalization
from mmrl_ray.errors import LearnerError, MMRLError, first_line, raised_at
from mmrl_ray.experience.carriers import PlannedGroup, RewardBreakdown, RewardFailure, ScoredGroup, StepPlan
from mmrl_ray.losses.advantages import decoupled_rewards, overlong_penalty, spreads
from mmrl_ray.losses.aggregation import StepRewards, StepWeights


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

    A step all of whose groups were cut off at the limit of tokens, with `mask_truncated`, has no micro-batches.

    Args:
        step: the step; also the policy version that consumes it.
        groups: the step's groups by place. Completions without a reward are left out of everything, and with them
            what has too little left: see `left_out`.
        learner: advantage, aggregation, KL, lengths and token budget.
        max_new_tokens: for the `constant` aggregation.
        world_size: learner ranks.
        normalize: whether parts of the reward are normalised by their group.

    Raises:
        LearnerError: no group of the step can be learned from, or the algorithm cannot weigh them.
    """
    why = {group.key: left_out(group, learner, normalize) for group in groups}
    live = [group for group in groups if why[group.key] is None]
    silent = not live
    if silent and learner.mask_truncated:
        live = [group for group in groups if left_out(group, learner, normalize, masking=False) is None]
    if not live:
        reasons = sorted({reason for reason in why.values() if reason}) or ["no sample of the step could be used"]
        raise LearnerError(f"step {step} has no group to learn from: {'; '.join(reasons)[:500]}")
    seen = learning_rewards(live, learner, normalize, max_new_tokens)  # [M, G]
    masked = torch.tensor([_cut(g) for g in live]) if learner.mask_truncated and not silent else None
    rewards, counts = seen.rewards, seen.counts
    greedy = None
    if learner.advantage == "greedy":
        greedy = torch.tensor([_greedy_reward(g) for g in live], dtype=torch.float64)
    lengths = torch.tensor([g.completion_tokens for g in live], dtype=torch.float64)  # [M, G]
    found = _weighed(learner, StepRewards(rewards, counts, seen.magnitude, greedy, lengths, max_new_tokens, masked))
    weights, scales, denominator = found.advantages, found.scales, found.denominator
    if masked is not None or silent:
        weights = torch.where((scales > 0) & ~torch.tensor(silent), weights, 0.0)
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
        micro_batches=((),) * world_size if silent else split_micro_batches(sizes, learner.token_budget, world_size),
        metrics={
            **seen.metrics,
            **found.metrics,
            **masked_figures(groups, 0 if silent else len(planned)),
            **_length_metrics(groups if learner.mask_truncated else live, learner.mask_truncated),
        },
    )


def _weighed(learner: LearnerSection, step: StepRewards) -> StepWeights:
    """What the algorithm makes of the rewards, which may be a user's own."""
    what = f"weigh of the algorithm {learner.loss}"
    try:
        found = learner.family.weigh(step)
    except MMRLError:
        raise
    except Exception as error:
        raise LearnerError(f"{what} raised {first_line(error)}{raised_at(error)}") from error
    if not isinstance(found, StepWeights):
        raise LearnerError(f"{what} returned {type(found).__name__}: return StepWeights")
    for name, given in (("advantages", found.advantages), ("scales", found.scales)):
        if given.shape != step.rewards.shape or not bool(given.isfinite().all()):
            raise LearnerError(
                f"{what} gave {name} {list(given.shape)}, {int(given.isfinite().sum())} of them finite numbers: give "
                f"one to each completion, {list(step.rewards.shape)}"
            )
    if not (found.scales > 0).any(dim=1).all():
        raise LearnerError(f"{what} gave scales of 0 to a whole group: to learn nothing from it, make its advantages 0")
    if not 0 < found.denominator < math.inf:
        raise LearnerError(f"{what} gave the denominator {found.denominator}: it must be above 0")
    return found


def left_out(
    group: ScoredGroup, learner: LearnerSection, normalize: Normalization, *, masking: bool = True
) -> str | None:
    """Why a group cannot be learned from; None for one that can.

    A baseline made of the group's other completions, and parts normalised by their group, need two rewards in it;
    every other baseline needs one, and `greedy` beside it that of the greedy completion. With `masking` off, its tokens
    are not asked for, which `learner.mask_truncated` may have left none of.
    """
    if group.masked is not None:
        return group.masked
    scored, total = len(group.rewards) - len(group.failures), len(group.rewards)
    needed = 2 if learner.advantage in ("leave_one_out", "group") or normalize == "group" else 1
    if scored < min(needed, total):
        return f"{scored} of {total} completions with a reward are too few: {group.failures[0]}"
    if learner.advantage == "greedy" and isinstance(group.greedy_reward, RewardFailure):
        return f"its greedy completion has no reward: {group.greedy_reward.reason}"
    whole = (isinstance(s, RewardBreakdown) and not cut for s, cut in zip(group.rewards, _cut(group), strict=True))
    if masking and learner.mask_truncated and not any(whole):
        return "its completions ran into rollout.max_new_tokens, which learner.mask_truncated takes out"
    return None


class Selection:
    """Draws groups for one step until enough of them have spread: completions that earn differently.

    That is judged by the rewards before length and KL cost anything: as DAPO's equation 11 (arXiv:2503.14476), for
    rewards that are not 0 and 1. What is drawn next follows from what came of all groups before it, in the order of
    their places, and from nothing else.

    Example:
        >>> selection = Selection(learner, "none")
        >>> selection.judge([group_0, group_1, None, group_3])  # 4 wanted, 2 of these have spread, one failed
        4
    """

    def __init__(self, learner: LearnerSection, normalize: Normalization) -> None:
        self._learner, self._normalize = learner, normalize
        self._wanted = learner.groups_per_step
        self._most = max(self._wanted, math.floor(self._wanted * learner.max_oversampling))
        self._ranks: list[int] = []
        """Of each place: 0 with spread, 1 without, 2 not to be learnt from, 3 none."""
        self._rewards: list[float] = []

    def judge(self, groups: Sequence[ScoredGroup | None]) -> int:
        """Takes in what came of the next places, None of those that failed; how many to draw after them, 0 for none."""
        self._ranks += map(self._rank, groups)
        self._rewards += [score.total for g in groups if g for score in g.rewards if isinstance(score, RewardBreakdown)]
        drawn, found = len(self._ranks), self._ranks.count(0)
        if found >= self._wanted or drawn >= self._most:
            return 0
        # As many as are needed if they are like those before, and no more than a step's at a time.
        guess = math.ceil((self._wanted - found) * drawn / max(found, 1))
        return min(guess, self._wanted, self._most - drawn)

    @property
    def drawn(self) -> int:
        """Places so far."""
        return len(self._ranks)

    @property
    def kept(self) -> list[int]:
        """Places that make the step, or may yet: the first with spread, then the first without."""
        best = sorted(range(self.drawn), key=lambda place: (self._ranks[place], place))
        return sorted(place for place in best[: self._wanted] if self._ranks[place] < 3)

    @property
    def figures(self) -> dict[str, float]:
        """For the step's metrics line."""
        found = self._ranks.count(0)
        mean = {"sampled/reward_mean": fmean(self._rewards)} if self._rewards else {}
        return {
            "sampled/groups": self.drawn,
            "sampled/with_spread": found,
            "sampled/surplus": max(0, found - self._wanted),
            "sampled/at_bound": int(found < self._wanted),
            **mean,
        }

    def _rank(self, group: ScoredGroup | None) -> int:
        if group is None:
            return 3
        if left_out(group, self._learner, self._normalize) is not None:
            return 2
        rewards, counts, magnitude = _compared([group], self._normalize)
        return 0 if bool(spreads(rewards, counts, torch.maximum(rewards.abs(), magnitude))) else 1


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


def _cut(group: ScoredGroup) -> tuple[bool, ...]:
    """Whether each completion ran into the limit of tokens, as far as that is known."""
    return group.truncated or (False,) * len(group.completion_tokens)


def _length_metrics(groups: Sequence[ScoredGroup], masking: bool) -> dict[str, float]:
    """Of whole completions, whatever is learnt of them."""
    lengths = [t for g in groups for t in g.completion_tokens]
    cut = {"truncated/masked": sum(sum(g.truncated) for g in groups) / len(lengths)} if masking else {}
    return {"completion/length_mean": sum(lengths) / len(lengths), "completion/length_max": max(lengths), **cut}


@dataclass(frozen=True, slots=True)
class LearningRewards:
    """What the baseline and the advantages are made from; all [M, G]."""

    rewards: torch.Tensor
    """float64; 0 where `counts` is False."""
    counts: torch.Tensor
    """bool, whether a completion has a reward."""
    magnitude: torch.Tensor
    """float64, of the numbers that each reward is the sum of."""
    metrics: dict[str, float]


def learning_rewards(
    groups: Sequence[ScoredGroup], learner: LearnerSection, normalize: Normalization, max_new_tokens: int
) -> LearningRewards:
    """From groups of one size, in each of which at least one completion has a reward."""
    rewards, counts, magnitude = _compared(groups, normalize)
    metrics = _figures(groups, counts)
    if normalize == "group":
        parts, _ = _weighted_parts(groups)
        metrics["reward/normalized"] = 1.0
        spread = _deviations(parts, counts, correction=1).mean(dim=1).tolist()
        metrics.update({f"reward_group_std/{n}": s for n, s in zip(_weighted(groups), spread, strict=True)})
    differ = spreads(rewards, counts, torch.maximum(rewards.abs(), magnitude))
    metrics["reward/zero_variance_groups"] = int((~differ).sum())
    if learner.overlong.penalty:
        lengths = torch.tensor([g.completion_tokens for g in groups])
        costs = overlong_penalty(lengths, max_new_tokens, learner.overlong.buffer, learner.overlong.penalty)
        rewards, magnitude = torch.where(counts, rewards - costs, 0.0), magnitude + costs
        metrics["overlong/penalty"] = costs[counts].mean().item()
        metrics["overlong/share"] = (costs[counts] > 0).double().mean().item()
    if learner.kl.weight and learner.kl.estimator == "k1":
        penalty = learner.kl.weight * torch.tensor([g.kl1 for g in groups], dtype=torch.float64)
        rewards, magnitude = torch.where(counts, rewards - penalty, 0.0), magnitude + penalty.abs()
        metrics["reward/with_kl"] = rewards[counts].mean().item()
    return LearningRewards(rewards, counts, magnitude, metrics)


def _compared(
    groups: Sequence[ScoredGroup], normalize: Normalization
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards after risk and normalisation, which of them count, and their magnitudes; all [M, G]."""
    counts = torch.tensor([[isinstance(row, RewardBreakdown) for row in g.rewards] for g in groups])
    if normalize == "group":
        rewards = decoupled_rewards(*_weighted_parts(groups), counts)
        return rewards, counts, rewards.abs()
    return _matrix(groups, lambda row: row.adjusted), counts, _matrix(groups, lambda row: row.magnitude)


def masked_figures(groups: Sequence[ScoredGroup], learned: int) -> dict[str, float]:
    """What a step lost to rewards that failed, `learned` of its groups being left."""
    masked, completions = sum(len(g.failures) for g in groups), sum(len(g.completion_tokens) for g in groups)
    missing = Counter(
        name for g in groups for row in g.rewards if isinstance(row, RewardBreakdown) for name in row.missing
    )
    return {
        "masked": len(groups) - learned,
        "masked_captions": masked,
        "reward/masked": masked / completions,
        **{f"reward_missing/{name}": count for name, count in sorted(missing.items())},
    }


def _rows(groups: Sequence[ScoredGroup]) -> list[RewardBreakdown]:
    return [row for g in groups for row in g.rewards if isinstance(row, RewardBreakdown)]


def _matrix(groups: Sequence[ScoredGroup], figure: Callable[[RewardBreakdown], float]) -> torch.Tensor:
    """0 where there is no reward."""
    return torch.tensor(
        [[figure(row) if isinstance(row, RewardBreakdown) else 0.0 for row in g.rewards] for g in groups],
        dtype=torch.float64,
    )


def _weighted(groups: Sequence[ScoredGroup]) -> list[str]:
    """Names of the parts that count."""
    return [name for name, weight in _rows(groups)[0].weights.items() if weight]


def _weighted_parts(groups: Sequence[ScoredGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """[K, M, G] and [K]."""
    names, weights = _weighted(groups), _rows(groups)[0].weights
    parts = [_matrix(groups, partial(_adjusted_part, name=name)) for name in names]
    return torch.stack(parts), torch.tensor([weights[name] for name in names], dtype=torch.float64)


def _adjusted_part(row: RewardBreakdown, name: str) -> float:
    """A part less risk times its own standard deviation, where it has one."""
    return row.parts[name] - row.risk * row.parts.get(f"{name}/sigma", 0.0)


def _deviations(values: torch.Tensor, counts: torch.Tensor, *, correction: int) -> torch.Tensor:
    """Standard deviation over the last dimension of what counts; NaN where no more than `correction` do."""
    number = counts.sum(dim=-1)
    mean = torch.where(counts, values, 0.0).sum(dim=-1) / number
    squares = torch.where(counts, values - mean[..., None], 0.0).square().sum(dim=-1)
    return (squares / (number - correction)).sqrt()


def _figures(groups: Sequence[ScoredGroup], counts: torch.Tensor) -> dict[str, float]:
    """Figures of the rewards as they were given."""
    rows = _rows(groups)
    totals = _matrix(groups, lambda row: row.total)
    figures = {
        "reward/mean": totals[counts].mean().item(),
        "reward/std": totals[counts].std(correction=0).item(),
        "reward/group_std": _deviations(totals, counts, correction=0).mean().item(),
    }
    for name in dict.fromkeys(name for row in rows for name in row.parts):
        figures[f"reward/{name}"] = fmean([row.parts[name] for row in rows if name in row.parts])
    for name, weight in rows[0].weights.items():
        figures[f"reward_weight/{name}"] = weight
    sigmas = [row.sigma for row in rows if row.sigma is not None]
    if sigmas:
        figures["reward/sigma"] = fmean(sigmas)
    if rows[0].risk:
        figures["reward/risk"] = rows[0].risk
        figures["reward/adjusted"] = fmean([row.adjusted for row in rows])
    return figures
