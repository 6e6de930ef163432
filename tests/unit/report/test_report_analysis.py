"""The report's look inside: states in the run folder, their map, correlations, and captions in doubt."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmrl_ray.analysis.correlation import correlations
from mmrl_ray.analysis.pca import fit_pca
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RunError
from mmrl_ray.evaluation.records import (
    STATE_SCHEMA,
    States,
    doubtful,
    load_states,
    save_evaluation,
    save_states,
    states_json,
)
from mmrl_ray.evaluation.scores import CaptionScore, Evaluation
from mmrl_ray.experience.carriers import CaptionState, RewardBreakdown
from mmrl_ray.report.page import render_report
from mmrl_ray.report.panels import correlation_table, drift, state_map
from mmrl_ray.run_records.run_dir import RunDir
from tests.unit.report.test_report import BEFORE, SCENES, Page

WIDTH, COUNT = 6, 20


def states(seed: int, *, shift: float = 0.0, count: int = COUNT, rows: Sequence[Sample] = ()) -> States:
    """Captions that go with their picture, and one prompt for all."""
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn(count, WIDTH, generator=rng) * torch.tensor([3.0, 1, 1, 1, 1, 1])
    action = image.flip(1) + 0.1 * torch.randn(count, WIDTH, generator=rng)
    hidden = torch.randn(count, WIDTH, generator=rng) + shift
    return States.of(
        rows or [Sample(f"s{i}", (), "") for i in range(count)],
        [
            CaptionState(action[i], {"image": image[i], "text": torch.full((WIDTH,), 0.1)}, hidden[i])
            for i in range(count)
        ],
    )


def test_states_come_back_as_they_were_and_open_as_plain_parquet(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    assert load_states(run, "before") is None
    made = states(0)
    save_states(run, "before", made)
    again = load_states(run, "before")
    assert again is not None
    assert again.sample_ids == made.sample_ids
    for name in ("actions", "hidden"):
        assert torch.equal(getattr(again, name), getattr(made, name))
    assert torch.equal(again.modalities["image"], made.modalities["image"])
    assert pq.read_table(run.local_path("analysis/before.parquet")).schema == STATE_SCHEMA


def test_rows_of_one_id_are_told_apart_and_older_files_still_load(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    rows = [Sample("x", (), "", place=f"a.parquet row {i}") for i in range(COUNT + 1)]
    made, other = states(0, rows=rows[:-1]), states(1, rows=rows[1:])
    assert made.actions.shape[0] == COUNT, "no row hides another of its id"
    save_states(run, "before", made)
    again = load_states(run, "before")
    assert again is not None
    assert again.places == made.places == tuple(row.place for row in rows[:-1])
    assert drift({"before": again, "after": states(1, rows=rows[:-1])}) != ""
    assert drift({"before": again, "after": other}) == "", "the same ids, but other rows"
    file = run.local_path("analysis/before.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["sample_place"]), file)
    old = load_states(run, "before")
    assert old is not None
    assert old.places == ()
    assert drift({"before": old, "after": states(1, rows=rows[:-1])}) != ""


def test_files_that_hold_no_states_are_named(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    run.write_bytes("analysis/before.parquet", b"PAR1 nothing")
    with pytest.raises(RunError, match=r"analysis/before\.parquet holds no states"):
        load_states(run, "before")
    broken = states(0)
    broken.hidden[3, 2] = math.nan
    save_states(run, "after", broken)
    with pytest.raises(RunError, match=r"after\.parquet holds no states \(its vectors are not finite"):
        load_states(run, "after")
    page = Page(render_report(run))
    assert page.words.count("holds no states") == 2
    assert "No states of an evaluation were stored" in page.words


def test_the_map_shows_both_sides_on_one_fit_and_says_how_far_they_moved() -> None:
    sides = {"before": states(0), "after": states(1, shift=4.0)}
    chart = state_map(sides)
    assert chart is not None
    svg = base64.b64decode(chart.data_uri.split(",", 1)[1]).decode()
    ElementTree.fromstring(svg)
    fit = fit_pca(torch.cat([each.hidden for each in sides.values()]).double(), 2)
    assert f"first component, {float(fit.explained_variance_ratio[0]):.0%} of the variance" in svg
    assert "40 mean hidden states" in chart.alt
    spread = sides["before"].hidden.var(dim=0, correction=0).sum().sqrt()
    moved = (sides["after"].hidden.mean(dim=0) - sides["before"].hidden.mean(dim=0)).norm() / spread
    assert f"moved by {float(moved):.2f} of the spread" in chart.caption
    assert [part.count("<use ") for part in svg.split("PathCollection")[1:3]] == [COUNT, COUNT]


def test_a_map_that_cannot_be_drawn_is_left_out() -> None:
    assert state_map({}) is None
    assert state_map({"before": states(0, count=1)}) is None
    still = states(0)
    assert state_map({"before": replace(still, hidden=torch.ones(COUNT, WIDTH))}) is None
    narrow = replace(still, hidden=torch.randn(COUNT, WIDTH - 1))
    assert state_map({"before": still, "after": narrow}) is None
    assert state_map({"after": still}) is not None
    assert drift({"before": still, "after": states(1, count=COUNT - 1)}) == ""


def test_correlations_are_in_page_and_summary(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    sides = {"before": states(0), "after": states(1)}
    for name, each in sides.items():
        save_states(run, name, each)
    page = Page(render_report(run))
    expected = {name: correlations(each.actions, each.modalities) for name, each in sides.items()}
    for found in expected.values():
        assert found["image"].rho > 0.5
        assert f"{found['image'].rho:.3f} p < 0.001" in page.words
    assert page.words.count("– one side does not vary") == 2, "the prompt is always the same"
    assert "over 20 held-out samples" in page.words
    written = states_json({"before": sides["before"], "after": None})
    assert list(written) == ["before"]
    assert written["before"]["image"] == {"rho": expected["before"]["image"].rho, "p_value": pytest.approx(1 / 2001)}
    assert correlation_table({})["rows"] == []
    alone = states(0, count=1).correlations
    assert math.isnan(alone["image"].rho)


def doubted(sigmas: list[float | None], parts: list[dict[str, float]], weights: dict[str, float]) -> list[CaptionScore]:
    return [
        replace(BEFORE.captions[i], reward=RewardBreakdown(0.5, part, weights, sigma))
        for i, (sigma, part) in enumerate(zip(sigmas, parts, strict=True))
    ]


def test_captions_in_doubt_by_sigma_and_by_disagreement() -> None:
    parts = [{"a": 0.1 * i, "b": 10.0 * i} for i in range(6)]
    parts[2] = {"a": 0.5, "b": 0.0}  # a is at its best, b at its worst
    captions = doubted([0.1, None, 0.3, 0.2, None, 0.05], parts, {"a": 1.0, "b": 0.5})
    chosen = doubtful(captions, 3)
    ids = [c.sample_id for c in captions]
    assert [c.sample_id for c in chosen["sigma"]] == [ids[2], ids[3], ids[0]]
    assert chosen["disagreement"][0].sample_id == ids[2]
    scaled = doubted([None] * 6, [{"a": p["a"], "b": 1000 * p["b"]} for p in parts], {"a": 1.0, "b": 0.5})
    assert [c.sample_id for c in doubtful(scaled, 3)["disagreement"]] == [c.sample_id for c in chosen["disagreement"]]
    assert doubtful(scaled, 3)["sigma"] == []


def test_a_part_that_is_always_the_same_disagrees_with_none() -> None:
    """0.7 has a standard deviation of 1e-16 in floating point, and the next float32 is no other value."""
    near = float(np.nextafter(np.float32(0.7), np.float32(1)))
    for constant in ([0.7] * 6, [0.7, near] * 3):
        parts = [{"a": 0.1 * i, "b": value} for i, value in enumerate(constant)]
        assert doubtful(doubted([None] * 6, parts, {"a": 1.0, "b": 1.0}))["disagreement"] == []


def test_the_parts_of_a_lone_part_are_compared_and_its_penalty_is_not() -> None:
    parts = [{"cap": 0.5, "cap/bleu": 0.1 * i, "cap/detail": 0.1 * i, "cap/length": -5.0 * i} for i in range(6)]
    captions = doubted([None] * 6, parts, {"cap": 1.0})
    assert doubtful(captions)["disagreement"] == [], "bleu and detail agree"
    parts[3] = {**parts[3], "cap/bleu": 0.0}
    captions = doubted([None] * 6, parts, {"cap": 1.0})
    assert doubtful(captions)["disagreement"][0].sample_id == captions[3].sample_id
    only = doubted([None] * 6, [{"cap": 0.1 * i} for i in range(6)], {"cap": 1.0})
    assert doubtful(only) == {"sigma": [], "disagreement": []}


def test_the_page_shows_them_with_their_pictures(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    sigmas = [0.01 * (i % 7) for i in range(len(SCENES))]
    captions = [
        replace(c, reward=replace(c.reward, sigma=sigma)) for c, sigma in zip(BEFORE.captions, sigmas, strict=True)
    ]
    save_evaluation(run, "before", Evaluation(tuple(captions)), SCENES)
    page = Page(render_report(run))
    assert "Where the reward is least sure: the largest σ" in page.words
    assert "± 0.060" in page.words
    assert "picture not stored" not in page.words
