"""What a run's rollout log must hold, worked out from its config and its data alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from mmrl_ray.config import Config
from mmrl_ray.data.samples import SampleStream
from mmrl_ray.experience.carriers import group_seed
from mmrl_ray.run_records.run_dir import RunDir

Place = tuple[int, int]
"""Step, and place in it."""
GAP = 1e-3
"""Nats, in float32: what one version's weights make of a token and what the next one's do is a hundred times that."""


@dataclass(frozen=True)
class Verdict:
    """Groups by what is wrong with them; places that a quarantined sample left empty are not."""

    steps: int
    groups: int
    lost: list[Place]
    duplicated: list[Place]
    wrong: list[Place]
    """Of another sample, or with another seed, than stream and seeds say."""
    stale: list[Place]
    """Sampled by another version than the step's, by their label or by the learner's own log-probs."""
    gap: float
    """Nats: the largest difference between a log-prob of the learner's and the one that the token was drawn with."""
    quarantined: list[Place]
    masked: list[Place]


def judge(folder: Path, cfg: Config) -> Verdict:
    """Of a strictly on-policy run: each (sample, step, attempt) of its finished steps once, with every completion."""
    run = RunDir.at(folder)
    metrics = run.read_lines("metrics.jsonl")
    steps = len(metrics)
    columns = ["step", "index", "attempt", "completion", "sample_id", "masked", "sampling", "policy_version"]
    rows = [
        row
        for file in sorted(folder.glob("rollouts/*.parquet"))
        for row in pq.read_table(file, columns=columns).to_pylist()
    ]
    by_place: defaultdict[Place, list[dict]] = defaultdict(list)  # type: ignore[type-arg]
    for row in rows:
        if row["step"] < steps:  # a step whose groups are written and whose end was not is made again by a resume
            by_place[row["step"], row["index"]].append(row)
    expected, empty = _expected(cfg, steps, {r["sample_id"] for r in run.read_lines("quarantine.jsonl")}, set(by_place))
    completions = set(range(cfg.rollout.group_size))
    gaps = [line.get("sampler_gap/max", 0.0) for line in metrics]
    lost, duplicated, wrong, stale = [], [], [], []
    for place, (sample, seed) in expected.items():
        found = by_place.pop(place, [])
        counts = Counter(row["completion"] for row in found)
        if set(counts) != completions:
            lost.append(place)
        if any(count > 1 for count in counts.values()) or len({row["attempt"] for row in found}) > 1:
            duplicated.append(place)
        if any(row["sample_id"] != sample or row["sampling"]["seed"] != seed for row in found):
            wrong.append(place)
        if gaps[place[0]] > GAP or any(row["policy_version"] != place[0] for row in found):
            stale.append(place)
    masked = sorted({(row["step"], row["index"]) for row in rows if row["masked"] is not None and row["step"] < steps})
    duplicated += sorted(by_place)  # of no step's plan
    return Verdict(steps, len(expected), lost, duplicated, wrong, stale, max(gaps, default=0.0), empty, masked)


def _expected(
    cfg: Config, steps: int, quarantined: set[str], found: set[Place]
) -> tuple[dict[Place, tuple[str, int]], list[Place]]:
    """(sample, seed) of each place that must be in the log, and the places whose samples were quarantined there.

    A sample is quarantined once its step has been composed, so it is in no step after that.
    """
    source = SampleStream(
        cfg.data.train, prompt=cfg.data.prompt, seed=cfg.run.seed, max_quarantined=cfg.data.max_quarantined
    )
    expected: dict[Place, tuple[str, int]] = {}
    empty: list[Place] = []
    for step in range(steps):
        for index, sample in enumerate(source.take(cfg.learner.groups_per_step)):
            place = (step, index)
            if place not in found and sample.id in quarantined:
                empty.append(place)
                source.quarantine.add(sample.id, "as in the run")
            else:
                expected[place] = (sample.id, group_seed(cfg.run.seed, step, index))
    return expected, empty
