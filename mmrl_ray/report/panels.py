"""Panels of a report: the table of measures, captions, the map of states, correlations.

measure_table        before and after: values, intervals, paired differences, and a plain verdict for each
caption_groups       pictures with captions: best gains, middle, worst losses, and where the reward is in doubt
state_map, drift     the policy's states before and after, on one plane
correlation_table    between captions and each modality
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from mmrl_ray.analysis.correlation import Correlation
from mmrl_ray.analysis.pca import PCAResult, fit_pca
from mmrl_ray.data.images import decode_image
from mmrl_ray.errors import DataError, ImageError
from mmrl_ray.evaluation.records import IMAGES, SHOWN, States, correlation_lines, doubtful, find_image, highlights
from mmrl_ray.evaluation.scores import CaptionScore, Difference, Evaluation, compare, in_common, paired
from mmrl_ray.metrics.statistics import Interval
from mmrl_ray.metrics.text import pieces, words
from mmrl_ray.report.charts import INK, Chart, colour, quiet_axes, svg_data_uri
from mmrl_ray.run_records.run_dir import RunDir

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
_TITLES = {
    "best": "Where the reward rose most",
    "middle": "In the middle",
    "worst": "Where the reward rose least or fell",
    "sigma": "Where the reward is least sure: the largest σ",
    "disagreement": "Where the parts of the reward disagree most",
}
_THUMBNAIL = 320
"""Pixels of the longer side at most."""
_COARSE = 128
"""Below it a picture is enlarged with its pixels showing."""
_COMPONENTS = 2
_COLOURS = {"before": 1, "after": 0}
_MARKS = {"before": "o", "after": "^"}
_LINKS = 150
"""Samples up to which a line joins a sample's two states."""

Sides = Mapping[str, States]
"""Under "before" and "after", those that there are."""


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
    label, note = _LABELS.get(name, (name.removeprefix("reward/"), "reward part" if name.startswith("reward/") else ""))
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


def caption_groups(run: RunDir, before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """Titled groups of cards: what changed, or of one evaluation alone its first captions; then what is in doubt."""
    names = run.list(IMAGES)
    newest = after or before
    if newest is None:
        return []
    earlier: dict[int, CaptionScore] = {}
    if before is not None and after is not None:
        # By the caption itself, not its sample's id, which others may share.
        earlier = {id(new): old for old, new in paired(before.captions, after.captions)}

    def group(title: str, captions: Sequence[CaptionScore]) -> dict[str, Any]:
        pairs = [(earlier.get(id(c)), c) if after is not None else (c, None) for c in captions]
        return {"title": title, "cards": [_card(run, names, old, new) for old, new in pairs]}

    if before is not None and after is not None:
        chosen = highlights(before.captions, after.captions)
        groups = [group(_TITLES[key], [second for _, second in pairs]) for key, pairs in chosen.items()]
    else:
        groups = [group(f"The first captions, {'after' if after else 'before'} training", newest.captions[:SHOWN])]
    groups += [group(_TITLES[key], captions) for key, captions in doubtful(newest.captions).items()]
    return [each for each in groups if each["cards"]]


def _card(run: RunDir, names: Sequence[str], before: CaptionScore | None, after: CaptionScore | None) -> dict[str, Any]:
    one = after or before
    assert one is not None
    sides = [("before", "Before", before), ("after", "After", after)]
    card: dict[str, Any] = {
        "sample_id": one.sample_id,
        "references": list(one.references),
        "sides": [_side(kind, title, score) for kind, title, score in sides if score is not None],
        "gain": "",
        "gain_kind": "flat",
        "alt": f"Picture of sample {one.sample_id}: {one.references[0] if one.references else one.caption}",
        **_picture(run, names, one),
    }
    if before is not None and after is not None and before.reward is not None and after.reward is not None:
        gain = after.reward.total - before.reward.total
        card["gain"] = f"{gain:+.3f}"
        card["gain_kind"] = "good" if gain > 0 else "bad" if gain < 0 else "flat"
    return card


def _side(kind: str, title: str, score: CaptionScore) -> dict[str, Any]:
    known = {word for reference in score.references for word in words(reference)}
    parts = [{"name": name, "value": f"{value:.2f}"} for name, value in _shown_parts(score)]
    reward = score.reward
    return {
        "kind": kind,
        "title": title,
        "reward": "no reward"
        if reward is None
        else f"{reward.total:.3f}" + ("" if reward.sigma is None else f" ± {reward.sigma:.3f}"),
        "pieces": list(_pieces(score.caption, known)),
        "parts": parts,
    }


def _shown_parts(score: CaptionScore) -> list[tuple[str, float]]:
    """Reward parts by their innermost name, and CIDEr-D; a lone part that equals the total would say nothing new."""
    if score.reward is None:
        return [("CIDEr-D", score.scores.get("cider_d", 0.0))]
    parts = dict(score.reward.parts)
    if len(score.reward.weights) == 1:
        (only,) = score.reward.weights
        if any(name.startswith(f"{only}/") for name in parts):
            parts = {name.removeprefix(f"{only}/"): value for name, value in parts.items() if name != only}
    parts.setdefault("CIDEr-D", score.scores.get("cider_d", 0.0))
    return list(parts.items())


def _pieces(caption: str, known: set[str]) -> list[dict[str, str]]:
    """The caption in words and what stands between; a word is a `hit` if some reference has it."""
    shown = []
    for text in pieces(caption):
        own = words(text)
        shown.append({"text": text, "kind": "" if not own else "hit" if known.issuperset(own) else "miss"})
    return shown


def _picture(run: RunDir, names: Sequence[str], score: CaptionScore) -> dict[str, Any]:
    """The first picture as a data URI; empty when it is not stored or broken."""
    data = find_image(run, score.image_hashes[0], names) if score.image_hashes else None
    if data is None:
        return {"image": "", "width": 0, "height": 0, "pixelated": False}
    try:
        image = decode_image(data)
    except ImageError:
        return {"image": "", "width": 0, "height": 0, "pixelated": False}
    coarse = max(image.size) <= _COARSE
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "png" if coarse else "jpeg"
    image.save(buffer, format=kind, **({} if coarse else {"quality": 85}))
    return {
        "image": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "width": image.width,
        "height": image.height,
        "pixelated": coarse,
    }


def state_map(sides: Sides) -> Chart | None:
    """Hidden states of held-out captions on two principal components, one fit for both sides (docs/equations.md 11)."""
    fit = _fit(sides)
    if fit is None:
        return None
    points = {name: fit.transform(states.hidden.double()) for name, states in sides.items()}
    ratios = [float(ratio) for ratio in fit.explained_variance_ratio]
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    if len(points) == 2 and sides["before"].same_rows(sides["after"]):
        pairs = torch.stack([points["before"], points["after"]], dim=1)[:_LINKS]
        for pair in pairs.tolist():
            x, y = zip(*pair, strict=True)
            axes.plot(x, y, color=colour(INK), linewidth=0.4, alpha=0.25)
    for name, z in points.items():
        x, y = z.T.tolist()
        mark, shade = _MARKS[name], colour(_COLOURS[name])
        axes.scatter(x, y, s=10, alpha=0.75, linewidths=0, marker=mark, color=shade, label=name)
    axes.set_xlabel(f"first component, {ratios[0]:.0%} of the variance", color=colour(INK), fontsize=8)
    axes.set_ylabel(f"second component, {ratios[1]:.0%} of the variance", color=colour(INK), fontsize=8)
    quiet_axes(axes, legend=True)
    count = sum(len(states.sample_ids) for states in sides.values())
    caption = drift(sides)
    alt = (
        f"Scatter plot: {count} mean hidden states of held-out captions, {' and '.join(points)}, on two principal "
        f"components with {ratios[0]:.0%} and {ratios[1]:.0%} of the variance. {caption}"
    )
    return Chart("States of the policy, one fit of principal components", svg_data_uri(figure), alt, caption, wide=True)


def drift(sides: Sides) -> str:
    """How far the states moved, in units of their spread before: the mean of all, and a sample on average."""
    if len(sides) < 2 or not sides["before"].same_rows(sides["after"]):
        return ""
    before, after = (sides[name].hidden.double() for name in ("before", "after"))
    spread = float((before - before.mean(dim=0)).square().sum(dim=1).mean().sqrt())
    if spread == 0.0 or before.shape != after.shape:
        return ""
    together = float((after.mean(dim=0) - before.mean(dim=0)).norm()) / spread
    each = float((after - before).norm(dim=1).mean()) / spread
    return f"The mean state moved by {together:.2f} of the spread that they had before, a sample's by {each:.2f}."


def correlation_table(sides: Sides) -> dict[str, Any]:
    """|ρ| of what is said with each modality's state (docs/equations.md 17), for the template; may be empty."""
    found = {name: states.correlations for name, states in sides.items()}
    names = dict.fromkeys(name for each in found.values() for name in each)
    return {
        "sides": list(found),
        "rows": [{"modality": name, "cells": [_cell(each, name) for each in found.values()]} for name in names],
        "samples": max((len(states.sample_ids) for states in sides.values()), default=0),
    }


def _fit(sides: Sides) -> PCAResult | None:
    """Of all states together; None where two components cannot be had."""
    widths = {states.hidden.shape[1] for states in sides.values()}
    if len(widths) != 1:
        return None
    both = torch.cat([states.hidden.double() for states in sides.values()])
    if min(both.shape) < _COMPONENTS:
        return None
    fit = fit_pca(both, _COMPONENTS)
    return None if math.isnan(float(fit.explained_variance_ratio[0])) else fit


def _cell(found: Mapping[str, Correlation], name: str) -> dict[str, str]:
    ((_, rho, p_value),) = correlation_lines({name: found[name]}) if name in found else ((name, "–", ""),)
    return {"rho": rho, "p_value": p_value}
