"""What a look at a policy's sight says: gaps with their intervals, whether it is blind, and the line that keeps it.

A *gap* is the mean over samples of the difference between two figures of `analysis/sight.py`, own picture less another:

    gap_logprob, gap_logprob_grey    of the references: whether what is true of a picture is likelier with that picture
    gap_caption, gap_caption_grey    of the policy's own greedy captions: whether what it says comes from the picture
    gap_reward, gap_reward_grey      of the rewards of what it says of the pictures
    gap_places                       of the references, less the own picture upside down: whether it sees where
                                     things are

each with a percentile bootstrap interval of 95 %, paired: what is resampled are the samples' differences. Those of
log-probs are in nats a token.

**The rule.** A look finds a policy blind where the interval of `gap_logprob` or of `gap_caption` does not lie above
`min_gap`; where that of `gap_places` lies below −`min_gap`; or where what is left of the first look's `gap_logprob` or
`gap_places`, less `keep` of it, has its interval below 0 (of `gap_places` only if the first look's lay above `min_gap`:
references that do not say where things are have none). Of fewer than 8 samples it says nothing.

    features zeroed                  both gaps are exactly 0
    pictures swapped                 `gap_logprob` is about 0 or below it; `gap_caption` may be large: the policy says
                                     of the wrong picture what is true of that
    positions wrong                  `gap_places` falls to 0 or below, also where colours and things are seen yet
    the picture is ignored           both fall towards 0; one caption for all pictures: `gap_caption` alone is 0, since
                                     the sum over all samples is the same with own pictures and with others'

**False alarms.** Of a policy whose true gap is z standard errors above `min_gap`, the chance that a look finds it blind
is Φ(1.96 − z): 0.1 % at z = 5. The standard error is the samples' deviation ÷ √n, so 32 samples give z = 5 to gaps of
0.88 deviations; an alarm wants several looks running, which the noise of a few steps alone does not give. The samples
are the same in every look: their own noise is drawn once a run. One that keeps more than `keep` of its first gap has at
most 2.5 % a run for that part of the rule. Rewards are told, and are no part of it: some are of the words alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmrl_ray.analysis.sight import CAPTION, GREY, OTHER, OWN, REFERENCE, REWARD, TURNED
from mmrl_ray.evaluation.scores import interval_json
from mmrl_ray.metrics.statistics import RESAMPLES, Interval, bootstrap_difference, bootstrap_mean

GAPS: Mapping[str, tuple[str, str]] = {
    "gap_logprob": (REFERENCE, OTHER),
    "gap_logprob_grey": (REFERENCE, GREY),
    "gap_caption": (CAPTION, OTHER),
    "gap_caption_grey": (CAPTION, GREY),
    "gap_reward": (REWARD, OTHER),
    "gap_reward_grey": (REWARD, GREY),
    "gap_places": (REFERENCE, TURNED),
}
LABELS: Mapping[str, str] = {
    "gap_logprob": "references: own picture less another's",
    "gap_logprob_grey": "references: own picture less a grey one",
    "gap_caption": "own captions: own picture less another's",
    "gap_caption_grey": "own captions: own picture less a grey one",
    "gap_reward": "reward of captions: of the own picture less of another's",
    "gap_reward_grey": "reward of captions: of the own picture less of a grey one",
    "gap_places": "references: own picture less the same upside down",
}
_DECIDE = {"gap_logprob": "references are", "gap_caption": "its own greedy captions are"}
COMPARED: Mapping[str, str] = {
    "gap_logprob": "of what the own picture is worth to the references",
    "gap_places": "of what the places of things are worth to the references",
}
"""With the first look's."""
BLIND_LOOK = "blind"
"""Kind of the event."""
MIN_SAMPLES = 8
"""Fewer say nothing either way."""
_PREFIX = "blind/"


@dataclass(frozen=True)
class Sight:
    """One look at one policy."""

    rows: tuple[Mapping[str, float], ...]
    """Of each sample its figures, as `look` gives them; empty where it could not be looked at."""
    seed: int = 0
    """Of the bootstrap."""

    @property
    def samples(self) -> int:
        """That were looked at."""
        return sum(bool(row) for row in self.rows)

    @cached_property
    def gaps(self) -> dict[str, Interval]:
        """Every gap that a sample has."""
        found = {}
        for name in GAPS:
            present = [each for each in self.differences(name) if each is not None]
            if present:
                found[name] = bootstrap_difference([0.0] * len(present), present, seed=self.seed, resamples=RESAMPLES)
        return found

    def differences(self, name: str) -> list[float | None]:
        """Of one gap, each sample's; None where it has none."""
        what, shown = GAPS[name]
        keys = f"{what}/{OWN}", f"{what}/{shown}"
        return [row[keys[0]] - row[keys[1]] if row.keys() >= set(keys) else None for row in self.rows]

    def blind(
        self, min_gap: float, first: Mapping[str, Sequence[float | None]] | None = None, keep: float = 0.0
    ) -> list[str]:
        """Why the rule takes the policy for blind, in words; nothing where it sees, or where nothing is known.

        Args:
            first: `differences` of the first look at the same samples, by gap (`COMPARED`); None for none.
        """
        if self.samples < MIN_SAMPLES:
            return []
        reasons = [
            f"{whose} no likelier with their own picture than with another's: {told(gap)} nats a token"
            for name, whose in _DECIDE.items()
            if (gap := self.gaps.get(name)) is not None and gap.known and gap.low <= min_gap
        ]
        places = self.gaps.get("gap_places")
        if places is not None and places.known and places.high < -min_gap:
            reasons.append(
                f"references are likelier with their picture upside down: {told(places)} nats a token; it sees things "
                "at wrong places"
            )
        return reasons or list(self._faded(first or {}, min_gap, keep))

    def _faded(self, first: Mapping[str, Sequence[float | None]], min_gap: float, keep: float) -> Iterator[str]:
        for name, earlier in first.items() if keep > 0 else ():
            both = [
                (a, b) for a, b in zip(earlier, self.differences(name), strict=False) if a is not None and b is not None
            ]
            if len(both) < MIN_SAMPLES:
                continue
            before, after = zip(*both, strict=True)
            began = bootstrap_mean(before, seed=self.seed, resamples=RESAMPLES)
            left = bootstrap_difference([keep * a for a in before], after, seed=self.seed, resamples=RESAMPLES)
            if began.low > min_gap and left.high < 0:
                share = sum(after) / sum(before)
                yield f"{COMPARED[name]}, {share:.0%} of the first look's is left: {told(self.gaps[name])} nats a token"

    def to_json(self) -> dict[str, Any]:
        """For `mmrl evaluate` and what a warm start keeps."""
        return {"samples": self.samples, **{name: interval_json(gap) for name, gap in self.gaps.items()}}


def told(gap: Interval) -> str:
    """A gap with its interval."""
    return f"{gap.mean:+.3f} {gap.words('+.3f')}"


def look_line(
    step: int, sight: Sight, lines: Sequence[Mapping[str, Any]], *, min_gap: float, keep: float
) -> dict[str, Any]:
    """The line of `eval/blind.jsonl` of a look after `step` steps, `lines` being those before it, in order."""
    first = lines[0]["differences"] if lines else None
    reasons = sight.blind(min_gap, first, keep)
    return {
        "step": step,
        "samples": sight.samples,
        **{f"{_PREFIX}{name}": gap.mean for name, gap in sight.gaps.items()},
        "intervals": {name: interval_json(gap) for name, gap in sight.gaps.items()},
        "differences": {name: sight.differences(name) for name in COMPARED},
        "blind": reasons,
        "running": (int(lines[-1]["running"]) if lines else 0) + 1 if reasons else 0,
    }


def told_blind(what: str, reasons: Iterable[str], remedy: str) -> str:
    """For people; `what` names the look."""
    return f"the policy does not look at its pictures ({what}): {'; '.join(reasons)}. {remedy}"


NEVER_SAW = (
    "See that the data pairs pictures with their own captions and that processor and checkpoint fit together (image "
    "tokens, their positions), train the warm start longer, with its vision tower (sft.train_vision: true), or start "
    "from a model that captions such pictures"
)
STOPPED = (
    "Go back to an earlier checkpoint and lower learner.lr or raise learner.kl.weight, or have a reward that hangs on "
    "the picture; where it came at once, look for pictures or positions that got mixed up"
)
