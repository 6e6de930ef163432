"""An evaluation of a run or a model on a split: captions, scores, notes; and how `mmrl evaluate` shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mmrl_ray.analysis.correlation import Correlation
from mmrl_ray.data.held_out import overlap_with_data, same_place
from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import Quarantine, Sample, dataset_fingerprint, iter_references, read_split, told
from mmrl_ray.errors import ConfigError, DataError, ModelError
from mmrl_ray.evaluation.captioning import target_captions, write_out
from mmrl_ray.evaluation.looking import policy_sight
from mmrl_ray.evaluation.model_source import ModelSource, open_target
from mmrl_ray.evaluation.records import States, correlation_lines, correlations_json
from mmrl_ray.evaluation.scores import Evaluation, evaluation_blindness, score_captions
from mmrl_ray.evaluation.sight import LABELS, NEVER_SAW, Sight, told_blind
from mmrl_ray.experience.carriers import CaptionState
from mmrl_ray.metrics.statistics import Interval
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.base import RewardFn
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.run_dir import to_json
from mmrl_ray.telemetry.terminal import PlainTable, RunProgress, say

if TYPE_CHECKING:
    from pandas import DataFrame

    from mmrl_ray.evaluation.frames import Captions


@dataclass(frozen=True, repr=False)
class TargetEvaluation:
    """What a run or a model is worth on one split, with all that a reader of it should know."""

    name: str
    """Of the run or model."""
    target: str
    data: str
    evaluation: Evaluation
    """Every caption with its scores, and every measure."""
    correlations: Mapping[str, Correlation]
    """Of the captions with what they were made of, by modality; empty where the model's states cannot be told."""
    states: int
    """Captions that the correlations are of."""
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    """Where captions do not depend on the picture, or the policy does not look at it."""
    sight: Sight | None
    """What the own picture is worth beside another's and a grey one; None where that cannot be told."""
    images: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded pictures of the first `MOST_PICTURES` samples, by their hash."""

    @property
    def measures(self) -> Mapping[str, Interval]:
        """Every measure with its 95 % bootstrap interval over samples."""
        return self.evaluation.measures

    @property
    def table(self) -> DataFrame:
        """A row a measure: `value`, and `low` and `high` of its 95 % interval."""
        from mmrl_ray.evaluation.frames import measures_frame

        return measures_frame(self.evaluation)

    def captions(self) -> Captions:
        """A row a caption: sample, caption, references, reward and its parts, scores, picture."""
        from mmrl_ray.evaluation.frames import Picture, evaluation_captions

        return evaluation_captions(self.evaluation, lambda digest: Picture(digest, self.images.get))

    def document(self) -> dict[str, Any]:
        """All of it as JSON, as `mmrl evaluate --out` writes it."""
        notes = [*self.notes, *self.warnings]
        found: dict[str, Any] = to_json(
            _document(self.target, self.data, self.evaluation, self.correlations, self.sight, notes)
        )
        return found

    def __repr__(self) -> str:
        return f"TargetEvaluation of {self.name} on {len(self.evaluation.captions)} samples\n{self.table.to_string()}"

    def _repr_html_(self) -> str:
        from mmrl_ray.evaluation.frames import html_notes

        told = [*self.notes, *(f"WARNING: {warning}" for warning in self.warnings)]
        return (
            f"<b>{escape(self.name)}</b>: {len(self.evaluation.captions)} samples of {escape(self.data)}"
            f"{self.table.to_html(float_format='{:.4f}'.format)}{html_notes(told)}"
        )


MOST_PICTURES = 200


def evaluate_target(
    target: str,
    *,
    data: str | None = None,
    limit: int | None = None,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    beta: float | None = None,
    checkpoint: str | None = None,
) -> TargetEvaluation:
    """Captions `data` greedily and scores it; prints nothing but its progress.

    CIDEr-D and the reward use the document frequencies stored with the run. A bare model has none: they are then
    taken from the references of `data` itself, which the notes say.

    Args:
        target: a run folder, a model folder or a hub id.
        data: Parquet shards with references; by default the run's own held-out split.
        limit: only the first so many rows.
        prompt: for rows that bring none; by default the run's.
        max_new_tokens: by default the run's.
        beta: of decoding with value heads; by default the run's.
        checkpoint: of a run: `best`, `last` or a step.

    Broken rows are left out and told, up to the run's `data.max_quarantined`; so are pictures that it was trained on.

    Raises:
        ConfigError: no data is given and the run has none, or a `beta` above 0, and there are no value heads.
        DataError, ModelError, RunError: what is read cannot be used.
    """
    states: list[CaptionState] = []
    with RunProgress() as shown:  # nothing is printed within: on a terminal it would go to standard error
        with shown.busy("loading the model"):
            opened = open_target(target, checkpoint=checkpoint, shown=shown)
        beta = opened.beta(beta)
        data = data or opened.eval_data
        if data is None:
            raise ConfigError(f"{target} names no held-out split: give one with --data")
        with shown.busy("reading the data"):
            quarantine = Quarantine(opened.max_quarantined, source=data)
            samples = read_split(data, prompt=prompt or opened.prompt, limit=limit, quarantine=quarantine)
            statistics, source = _statistics(opened, data)
        captions = target_captions(
            opened,
            samples,
            max_new_tokens=max_new_tokens,
            beta=beta,
            states=states,
            progress=shown.phase("caption"),
        )
        reward = build_reward(opened.reward, statistics)
        evaluation = score_captions(
            samples,
            captions,
            reward,
            statistics,
            progress=shown.phase("score"),
            timeout_s=opened.reward.timeout_s,
            retries=opened.reward.retries,
        )
        with shown.busy("looking whether the policy looks at its pictures"):
            sight, left_out = _sight(opened, samples, reward, max_new_tokens)
        with shown.busy("looking for these pictures in what was trained on"):
            seen = _trained_on(opened, samples, data)
    found_blind = evaluation_blindness(evaluation)
    unseeing = [] if found_blind is None else [found_blind.told("this evaluation")]
    if sight is not None and (reasons := sight.blind(opened.min_gap)):
        unseeing.append(told_blind("this evaluation", reasons, NEVER_SAW))
    notes = [*opened.notes, *([f"decoded with log π + {beta:g}·(Q − V)"] if opened.policy.value_heads else []), source]
    notes += [told(quarantine.records)] if len(quarantine) else []
    notes += [evaluation.told_unrewarded()] if evaluation.unrewarded else []
    notes += [f"sight: {left_out}"] if left_out else []
    notes += seen
    return TargetEvaluation(
        name=opened.name,
        target=target,
        data=data,
        evaluation=evaluation,
        correlations=States.of(samples[: len(states)], states).correlations if states else {},
        states=len(states),
        notes=tuple(notes),
        warnings=tuple(unseeing),
        sight=sight,
        images={image_hash([image]): image for sample in samples[:MOST_PICTURES] for image in sample.images},
    )


def present(found: TargetEvaluation, *, out: Path | None = None, as_json: bool = False) -> None:
    """Prints tables or JSON, and writes JSON where `out` says.

    Args:
        out: a file, or a folder that gets `evaluation-NAME.json`.
        as_json: prints what `out` would get, in place of the tables.

    Raises:
        RunError: `out` cannot be written.
    """
    document = json.dumps(found.document(), indent=2, ensure_ascii=False, allow_nan=False)
    if as_json:
        print(document)
    else:
        Console().print(measures_table(found.name, found.evaluation))
        if found.correlations:
            Console().print(correlation_table(found.correlations, found.states))
        if found.sight is not None and found.sight.gaps:
            Console().print(sight_table(found.sight))
        for note in found.notes:
            say(Console(), note)
        for warning in found.warnings:
            say(Console(), f"WARNING: {warning}", "bold red")
    if out is not None:
        file = out / f"evaluation-{found.name}.json" if out.is_dir() else out
        write_out(file, f"{document}\n".encode())
        say(Console(stderr=as_json), f"written to {file}")


def measures_table(title: str, evaluation: Evaluation) -> PlainTable:
    """Every measure with its 95 % interval, for a terminal or plain."""
    table = _table(f"{title}: {len(evaluation.captions)} samples", "measure", "value", "95 % interval")
    for name, interval in evaluation.measures.items():
        table.add_row(name, f"{interval.mean:.4f}", interval.words(".4f", " … ", ""))
    return table


def correlation_table(found: Mapping[str, Correlation], samples: int) -> PlainTable:
    """|ρ| of the captions with what they were made of, for a terminal or plain."""
    table = _table(f"captions and their modalities: {samples} samples", "modality", "|ρ|", "by permutation")
    for row in correlation_lines(found):
        table.add_row(*row)
    return table


def sight_table(sight: Sight) -> PlainTable:
    """What the own picture is worth beside another's and a grey one, for a terminal or plain."""
    table = _table(f"what the own picture is worth: {sight.samples} samples", "gap", "value", "95 % interval")
    for name, gap in sight.gaps.items():
        table.add_row(LABELS[name], f"{gap.mean:+.4f}", gap.words("+.4f", " … ", ""))
    return table


def _sight(
    opened: ModelSource, samples: list[Sample], reward: RewardFn, max_new_tokens: int | None
) -> tuple[Sight | None, str]:
    """A look at the policy, and what was left out or why there is none; of an agent, which has no log-probs, none."""
    if opened.agent is not None:
        return None, ""
    try:
        sight, arranged = policy_sight(
            opened.policy,
            samples,
            max_new_tokens=max_new_tokens or opened.max_new_tokens,
            temperature=opened.temperature,
            reward=reward,
            timeout_s=opened.reward.timeout_s,
            retries=opened.reward.retries,
        )
    except (DataError, ModelError) as error:  # the figures of the captions stand
        return None, f"the policy was not looked at: {error}"
    if not sight.samples:
        return None, arranged.told or "there is nothing to look at"
    return sight, arranged.told


def _table(title: str, name: str, *figures: str) -> PlainTable:
    return PlainTable(name, *figures, right=figures, title=title, title_justify="left")


def _trained_on(opened: ModelSource, samples: list[Sample], data: str) -> list[str]:
    """Which of the samples show pictures that the run was trained on, in words; of a model nobody knows."""
    lines = []
    for location in opened.trained_on:
        try:
            if same_place(location, data):
                lines.append(f"{data} is what the run was trained on: figures on it do not show what was learned")
            else:
                lines.append(str(overlap_with_data(samples, location)))
        except DataError as error:
            lines.append(f"whether these pictures were trained on is not known: {error}")
    return lines


def _statistics(opened: ModelSource, data: str) -> tuple[CorpusStatistics, str]:
    if opened.statistics is not None:
        known = opened.statistics
        old = "" if known.ends is not None else "; words are lower-cased \\w+, as when the run began"
        return known, f"document frequencies: of the run's training references{old}"
    own = CorpusStatistics.from_references(iter_references(data), language_order=opened.reward.language_order)
    return own, f"document frequencies: of the references of {data} itself, not comparable with those of a run"


def _document(
    target: str,
    data: str,
    evaluation: Evaluation,
    found: Mapping[str, Correlation],
    sight: Sight | None,
    notes: list[str],
) -> dict[str, Any]:
    return {
        "target": target,
        "data": data,
        "data_fingerprint": dataset_fingerprint(data),
        "notes": notes,
        **evaluation.to_json(),
        "correlations": correlations_json(found),
        **({"sight": sight.to_json()} if sight is not None else {}),
        "captions": [
            {
                "sample_id": score.sample_id,
                "sample_place": score.place,
                "caption": score.caption,
                "references": list(score.references),
                "reward": None if score.reward is None else score.reward.total,
                "reward_parts": {} if score.reward is None else dict(score.reward.parts),
                **({"no_reward": score.no_reward} if score.no_reward else {}),
                "scores": dict(score.scores),
            }
            for score in evaluation.captions
        ],
    }
