"""The before/after table of a report: values, intervals, paired differences, and a plain verdict for each."""

from __future__ import annotations

from typing import Any

from mmrl_ray.errors import DataError
from mmrl_ray.evaluation.scores import Difference, Evaluation, compare, in_common
from mmrl_ray.metrics.bootstrap import Interval

_LABELS = {
    "reward": ("Total reward", ""),
    "reward/sigma": ("Standard deviation of the reward", "as its model foresees it"),
    "cider_d": ("CIDEr-D", "document frequencies of the training split"),
    "bleu_1": ("BLEU-1", ""),
    "bleu_2": ("BLEU-2", ""),
    "bleu_3": ("BLEU-3", ""),
    "bleu_4": ("BLEU-4", "of the corpus"),
    "rouge_l": ("ROUGE-L", ""),
    "attributes/precision": ("Attribute precision", "of what was said, how much is there"),
    "attributes/recall": ("Attribute recall", "of what is there, how much was said"),
    "attributes/f1": ("Attribute F1", ""),
    "caption/words": ("Caption length", "words"),
    "caption/distinct": ("Distinct captions", "share of all"),
}
_STRONG = ("reward", "cider_d")
_NEUTRAL = ("caption/words", "caption/distinct")
"""Neither more nor less of it is better by itself."""
_WIDTH = 120
_MARGIN = 6


def measure_table(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """What the template draws; without rows when there is no evaluation."""
    differences: dict[str, Difference] = {}
    note = ""
    if before is not None and after is not None:
        both = in_common(before, after)
        try:
            differences = compare(*both) if both is not None else {}
        except DataError as error:
            note = f" {error}"
        shared = len(both[0].captions) if both is not None else 0
        if shared < max(len(before.captions), len(after.captions)):
            note = f" They are of the {shared} samples that both sides have."
    sides = [e.measures for e in (before, after) if e is not None]
    names = dict.fromkeys(name for measures in sides for name in measures)
    alone = _only_part(before or after)
    rows = [
        _row(name, _of(before, name), _of(after, name), differences.get(name))
        for name in names
        if name != f"reward/{alone}"
    ]
    return {
        "rows": rows,
        "before": before is not None,
        "after": after is not None,
        "paired": bool(differences),
        "explanation": _explanation(before, after),
        "footnote": f"Brackets: 95 % bootstrap intervals over samples; differences are paired by sample.{note}",
    }


def _only_part(evaluation: Evaluation | None) -> str | None:
    """The reward's one part where it has one alone, of weight 1: its row would repeat the total's."""
    rewards = [] if evaluation is None else [c.reward for c in evaluation.captions if c.reward is not None]
    weights = rewards[0].weights if rewards else {}
    ((name, weight),) = weights.items() if len(weights) == 1 else ((None, 0.0),)
    return name if weight == 1.0 else None


def _of(evaluation: Evaluation | None, name: str) -> Interval | None:
    return None if evaluation is None else evaluation.measures.get(name)


def _explanation(before: Evaluation | None, after: Evaluation | None) -> str:
    one = before or after
    samples = "" if one is None else f"Greedy captions of {len(one.captions)} held-out samples."
    if before is None or after is None:
        return samples
    return (
        f"{samples} “Apart” means that the two intervals have no point in common; where they overlap, the interval of "
        "the paired difference still tells whether the change is more than chance."
    )


def _row(name: str, before: Interval | None, after: Interval | None, difference: Difference | None) -> dict[str, Any]:
    label, note = _LABELS.get(name, (_part_label(name), "reward part" if name.startswith("reward/") else ""))
    row = {
        "name": name,
        "label": label,
        "note": note,
        "strong": name in _STRONG,
        "before": _value(before),
        "before_interval": _range(before),
        "after": _value(after),
        "after_interval": _range(after),
        "difference": "",
        "difference_interval": "",
        "verdict": "",
        "verdict_kind": "flat",
        "sentence": "",
        "bars": _bars(before, after),
    }
    if difference is not None:
        row |= _verdict(name, difference)
    return row


def _part_label(name: str) -> str:
    return name.removeprefix("reward/")


def _verdict(name: str, difference: Difference) -> dict[str, str]:
    interval = difference.difference
    moved = interval.low > 0 or interval.high < 0
    up = interval.mean > 0
    if not interval.known:
        word, kind, sentence = "n/a", "flat", "one sample has no interval"
    elif not moved:
        word, kind, sentence = "no clear change", "flat", "a change that chance alone could make"
    else:
        direction = "higher" if up else "lower"
        word = f"{direction}, apart" if difference.apart else f"{direction}, overlap"
        kind = "flat" if name in _NEUTRAL or _is_penalty(name) else ("good" if up else "bad")
        sentence = (
            "the 95 % intervals do not overlap"
            if difference.apart
            else "the 95 % intervals overlap, the paired difference excludes 0"
        )
    return {
        "difference": f"{interval.mean:+.3f}",
        "difference_interval": interval.words("+.3f"),
        "verdict": word,
        "verdict_kind": kind,
        "sentence": sentence,
    }


def _is_penalty(name: str) -> bool:
    """R_cap's length and repetition count against the total, and doubt is no merit: more of these is not better."""
    return name.startswith("reward/") and name.endswith(("/length", "/repeated", "/sigma"))


def _value(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.mean:.3f}"


def _range(interval: Interval | None) -> str:
    return "" if interval is None else interval.words(".3f")


def _bars(before: Interval | None, after: Interval | None) -> list[dict[str, Any]]:
    """The intervals side by side, each row on its own scale."""
    drawn = [("before", 6, before), ("after", 14, after)]
    known = [interval for _, _, interval in drawn if interval is not None and interval.known]
    low, high = min((i.low for i in known), default=0.0), max((i.high for i in known), default=0.0)
    scale = (_WIDTH - 2 * _MARGIN) / (high - low) if high > low else 0.0

    def place(value: float) -> float:
        return round(_MARGIN + (value - low) * scale, 1) if scale else _WIDTH / 2

    return [
        {"kind": kind, "y": y, "low": place(i.low), "high": place(i.high), "mean": place(i.mean)}
        for kind, y, i in drawn
        if i is not None and i.known
    ]
