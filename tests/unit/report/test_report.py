"""`report.html` from made-up run folders: self-contained, escaped, complete, and honest about what is missing."""

from __future__ import annotations

import base64
import io
import itertools
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mmrl_ray.analysis.correlation import Correlation
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.errors import RunError
from mmrl_ray.evaluation.evaluate import correlation_table, measures_table
from mmrl_ray.evaluation.records import EVAL_SCHEMA, doubtful, highlights, load_evaluation, save_evaluation
from mmrl_ray.evaluation.scores import Evaluation, score_captions
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.report.charts import MAX_POINTS, charts, constants
from mmrl_ray.report.facts import duration, event_rows, happened, replacements, reward_rows
from mmrl_ray.report.page import write_report
from mmrl_ray.report.panels import caption_groups
from mmrl_ray.reward_model.run import print_report
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import StepLog
from mmrl_ray.telemetry.terminal import RunProgress, visible

_, SCENES = generate_scenes(ScenesSection(train=1, eval=30, image_size=32))
STATISTICS = CorpusStatistics.from_references(sample.references for sample in SCENES)
REWARD = build_reward(RewardSection(), STATISTICS)
EVIL = '<script>alert("x")</script> & <img src=http://evil.example/x.png onerror=y>'
VOID = {"meta", "link", "img", "br", "hr", "input", "line", "circle"}


def scored(captions: list[str]) -> Evaluation:
    return score_captions(SCENES, captions, REWARD, STATISTICS)


BEFORE = scored([sample.metadata["terse"][0] for sample in SCENES])
AFTER = scored([EVIL, *(sample.references[1] for sample in SCENES[1:])])


class Page(HTMLParser):
    """Tags, attributes and visible text; complains about tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.stack: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def line(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "policy_version": step + 1,
        "reward/mean": 0.3 + 0.01 * step,
        "reward/std": 0.1,
        "reward/caption": 0.3 + 0.01 * step,
        "reward/caption/bleu": 0.2 + 0.02 * step,
        "importance/image": 0.5 - 0.1 * step,
        "importance/text": 0.5 + 0.1 * step,
        "loss": -0.01 * step,
        "loss/policy": -0.02 * step,
        "loss/kl": 0.01,
        "kl": 0.02 * step,
        "entropy": 1.0 - 0.1 * step,
        "grad_norm": 0.5 + 0.1 * (step % 2),
        "lr": 1e-3 / (1 + step),
        "staleness/mean": 0.0,
        "completion/length_mean": 7.5 + step,
        "samples_per_second": 100.0 + step,
        "seconds/sample": 1.0 + 0.1 * step,
        "seconds/reward": 0.001,
        "seconds/forward_backward": 2.0,
        "seconds/step": 3.5,
        "shared_prefix": True,
        "masked": 1,
        "dropped": 2,
        "vision/hits": 14,
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Page, str]:
    run = RunDir.create(tmp_path_factory.mktemp("runs"), "done")
    run.write_text("config.yaml", "run: {name: done}  # <b>\n")
    save_evaluation(run, "before", BEFORE, SCENES)
    save_evaluation(run, "after", AFTER, SCENES)
    for step in range(5):
        run.append_line("metrics.jsonl", line(step))
    run.append_line("events.jsonl", {"time": 0, "kind": "learner_path", "reason": "agrees within 1e-4 <ok>"})
    run.append_line("events.jsonl", {"kind": "worker_unheard_of", "step": 3, "worker": "w-1"})
    run.append_line("quarantine.jsonl", {"sample_id": "train-7", "reason": "broken PNG", "where": "row 7"})
    summary = {
        "seconds": {"warm_start": 61.0, "total": 3725.0},
        "peak_memory_bytes": 3 * 2**30,
        "versions": {"ray": "2"},
    }
    run.write_json("summary.json", summary)
    run.write_text("adapter/adapter_config.json", "{}")
    html = Path(write_report(run)).read_text(encoding="utf-8")
    return run, Page(html), html


def test_nothing_points_outside_the_page(finished: tuple[RunDir, Page, str]) -> None:
    _, page, html = finished
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes)
    assert not page.all("script")
    assert "@import" not in html
    assert "url(" not in html
    images = [image["src"] for image in page.all("img")]
    pictures = [i for i in images if i.startswith("data:image/svg+xml")]
    for picture in pictures:
        svg = base64.b64decode(picture.split(",", 1)[1]).decode()
        ElementTree.fromstring(svg)
        assert not re.search(r'(?:href|src)="(?!#)', svg)
        assert "<image" not in svg
    assert len(pictures) == 11


def test_captions_are_escaped_and_shown(finished: tuple[RunDir, Page, str]) -> None:
    _, page, html = finished
    assert EVIL in page.words
    assert "<script" not in html
    assert "onerror" in html  # as text
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "run: {name: done} # <b>" in page.words
    assert "agrees within 1e-4 <ok>" in page.words


def test_every_section_is_there(finished: tuple[RunDir, Page, str]) -> None:
    _, page, _ = finished
    sections = [attributes["id"] for attributes in page.all("section") if "id" in attributes]
    assert sections == ["summary", "captions", "curves", "inside", "facts", "events", "config"]
    targets = {link["href"] for link in page.all("a")}
    assert targets == {f"#{name}" for name in sections}
    for words in (
        "Total reward",
        "CIDEr-D",
        "BLEU-4",
        "ROUGE-L",
        "Attribute recall",
        "intervals do not overlap",
        "Reward, mean ± standard deviation",
        "Reward parts",
        "Loss and its terms",
        "KL to the reference policy, or to the teacher",
        "Entropy",
        "Gradient norm",
        "Learning rate",
        "Completion length",
        "Constant over the run, so not drawn: staleness/mean 0",
        "Throughput",
        "Seconds by phase",
        "Where the reward rose most",
        "Where the reward rose least or fell",
        "Where the parts of the reward disagree most",
        "Importance of each modality, share",
        "No states of an evaluation were stored",
        "1 min 01 s",
        "1 h 02 min",
        "3.00 GiB",
        "groups masked",
        "train-7",
        "row 7 – broken PNG",
        "worker unheard of",
    ):
        assert words in page.words, words
    assert "What is missing" not in page.words


def test_pictures_have_words_for_them(finished: tuple[RunDir, Page, str]) -> None:
    _, page, _ = finished
    alts = [image.get("alt", "") for image in page.all("img")]
    assert all(len(alt) > 20 for alt in alts)
    assert any("reward/mean from 0.3 to 0.34" in alt for alt in alts)
    assert len(page.all("article")) == 12 + 4
    assert "picture not stored" not in page.words
    assert page.all("html")[0]["lang"] == "en"


def test_the_table_tells_the_figures_of_the_evaluations(finished: tuple[RunDir, Page, str]) -> None:
    _, page, _ = finished
    for evaluation in (BEFORE, AFTER):
        reward = evaluation.measures["reward"]
        assert f"{reward.mean:.3f} [{reward.low:.3f}, {reward.high:.3f}]" in page.words


def test_on_a_narrow_screen_each_figure_has_its_name_and_the_verdict_its_place(
    finished: tuple[RunDir, Page, str],
) -> None:
    """There the head of the table is hidden, and a row is a block: nothing lies beyond the edge."""
    _, page, html = finished
    cells = page.all("td")
    figures = [cell.get("data-label") for cell in cells if cell.get("class") == "num" and "data-label" in cell]
    verdicts = [cell for cell in cells if cell.get("class") == "judged"]
    assert verdicts
    assert figures[: 3 * len(verdicts)] == ["before", "after", "difference"] * len(verdicts)
    narrow = html[html.index("@media screen and (max-width: 42rem)") : html.index("@page")]
    assert ".measures td.num::before { content: attr(data-label);" in narrow
    assert ".measures td.judged { grid-area: 1 / 3;" in narrow


def test_one_held_out_sample_has_figures_and_no_interval(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "one")
    for name, evaluation in (("before", BEFORE), ("after", AFTER)):
        save_evaluation(run, name, Evaluation(evaluation.captions[:1]), SCENES[:1])
    pair = {"pairs": 1, "accuracy": {"value": 1.0, "low": None, "high": None}}
    run.write_json("summary.json", {"status": "finished", "preferences": {"after": pair}})
    page = Page(Path(write_report(run)).read_text())
    assert f"{BEFORE.captions[0].reward.total:.3f} n/a" in page.words
    assert "1.000 (no interval: one pair)" in page.words
    assert "nan" not in page.words.lower()
    assert "apart" not in page.words.replace("“Apart” means", "")


def test_rows_of_one_id_keep_their_own_pictures_and_captions(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "same")
    rows = [replace(each, id="x", place=f"a.parquet row {i}") for i, each in enumerate(SCENES)]
    for name, evaluation in (("before", BEFORE), ("after", AFTER)):
        own = [replace(c, sample_id="x", place=row.place) for c, row in zip(evaluation.captions, rows, strict=True)]
        save_evaluation(run, name, Evaluation(tuple(own)), rows)
    groups = caption_groups(run, load_evaluation(run, "before"), load_evaluation(run, "after"))
    expected = highlights(BEFORE.captions, AFTER.captions)
    for group, pairs in zip(groups, expected.values(), strict=False):
        said = [["".join(p["text"] for p in side["pieces"]) for side in card["sides"]] for card in group["cards"]]
        assert said == [[old.caption, new.caption] for old, new in pairs]
        assert len({card["image"] for card in group["cards"]}) == len(pairs)


def test_a_half_finished_run_says_what_is_missing(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "half")
    run.write_text("config.yaml", "run: {name: half}\n")
    save_evaluation(run, "before", BEFORE, SCENES)
    run.append_line("metrics.jsonl", line(0))
    run.append_line("metrics.jsonl", {"step": 1, "reward/mean": None, "loss": 0.5})
    with (run.local_path() / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # torn by a crash
    page = Page(Path(write_report(run)).read_text())
    for words in (
        "What is missing",
        "eval/after.parquet",
        "summary.json",
        "there is no final adapter",
        "not finished",
        "The first captions, before training",
        "2 steps",
    ):
        assert words in page.words, words
    assert len(page.all("article")) == 12 + 4


def test_an_empty_and_a_damaged_run_still_give_a_page(tmp_path: Path) -> None:
    empty = RunDir.create(tmp_path, "empty")
    page = Page(Path(write_report(empty)).read_text())
    assert "not started" in page.words
    assert "No evaluation was stored" in page.words
    damaged = RunDir.create(tmp_path, "damaged")
    damaged.write_text("summary.json", "{")
    damaged.write_text("eval/before.parquet", "no parquet")
    page = Page(Path(write_report(damaged)).read_text())
    assert "summary.json is not JSON" in page.words
    assert "before.parquet is not an evaluation" in page.words
    with pytest.raises(RunError, match="no run folder"):
        write_report(tmp_path / "nowhere")


def test_a_failed_run_shows_its_state(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "failed")
    run.write_json("summary.json", {"status": "failed: loss is nan at step 3"})
    page = Page(Path(write_report(run)).read_text())
    assert {"class": "state bad"} in page.all("li")
    assert "loss is nan at step 3" in page.words


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    save_evaluation(run, "before", BEFORE, SCENES)
    assert load_evaluation(run, "before") == BEFORE
    save_evaluation(run, "seeded", replace(BEFORE, seed=5), SCENES)
    assert load_evaluation(run, "seeded") == replace(BEFORE, seed=5)
    assert load_evaluation(run, "after") is None
    table = pq.read_table(run.local_path("eval/before.parquet"))
    assert table.schema == EVAL_SCHEMA
    doubted = {c.sample_id for c in doubtful(BEFORE.captions)["disagreement"]}
    assert len(run.list("images")) == len(doubted | {c.sample_id for c in BEFORE.captions[:12]})
    save_evaluation(run, "after", AFTER, SCENES)
    shown = highlights(BEFORE.captions, AFTER.captions)
    hashes = {name.split(".")[0] for name in run.list("images")}
    assert {after.image_hashes[0] for pairs in shown.values() for _, after in pairs} <= hashes


def test_highlights_are_the_best_the_middle_and_the_worst() -> None:
    chosen = highlights(BEFORE.captions, AFTER.captions)
    gain = {a.sample_id: a.reward.total - b.reward.total for b, a in zip(BEFORE.captions, AFTER.captions, strict=True)}
    ranked = sorted(gain, key=lambda name: gain[name])
    told = {key: [after.sample_id for _, after in pairs] for key, pairs in chosen.items()}
    assert {gain[n] for n in told["worst"]} == {gain[n] for n in ranked[:4]}
    assert {gain[n] for n in told["best"]} == {gain[n] for n in ranked[-4:]}
    assert told["worst"][0] == SCENES[0].id  # the script tag earned nothing
    everything = [name for names in told.values() for name in names]
    assert len(everything) == len(set(everything)) == 12
    for few in (1, 2, 3, 5):
        pairs = highlights(BEFORE.captions[:few], AFTER.captions[:few])
        names = [after.sample_id for group in pairs.values() for _, after in group]
        assert len(names) == len(set(names)) == few


def test_long_runs_are_thinned_and_constant_zeros_left_out_of_legends() -> None:
    lines = [{"step": i, "loss": float(i), "loss/policy": float(i), "loss/kl": 0.0} for i in range(5000)]
    (chart,) = charts(lines)
    svg = base64.b64decode(chart.data_uri.split(",", 1)[1]).decode()
    assert "loss/kl" not in svg
    assert svg.count(" L ") + svg.count("\nL ") < 4 * MAX_POINTS
    assert "from 7.5 to" in chart.alt or "from 8" in chart.alt  # the mean of the first stretch


def test_what_never_changes_is_told_and_thin_phases_are_one() -> None:
    lines = [
        {"step": i, "grad_norm": 0.5, "staleness/max": 0, "seconds/a": 1.0 + i, "seconds/b": 0.001, "seconds/c": 0.002}
        for i in range(3)
    ]
    (chart,) = charts(lines)
    assert constants(lines) == {"grad_norm": 0.5, "staleness/max": 0.0}
    assert "other from 0.003 to 0.003" in chart.alt
    assert "seconds/b" not in chart.alt
    assert constants(lines[:1]) == {}


def test_the_reward_is_told_part_by_part() -> None:
    config = (
        "reward: {parts: {said: {kind: caption}, size: {kind: length}}, weights: {said: 1.0, size: 0.5}, "
        "normalize: group}"
    )
    lines = [
        {"reward/mean": 0.3 + s, "reward/said": 0.2 + s, "reward/size": 0.1, "reward_weight/said": 1.0}
        | {"reward_weight/size": 0.5, "reward/sigma": 0.2, "reward/adjusted": 0.1 + s, "reward/risk": 1.0}
        | {"reward/normalized": 1.0}
        for s in (0.0, 0.5)
    ]
    assert reward_rows(config, lines) == [
        ("said, caption on the references", "weight 1, mean 0.2 → 0.7"),
        ("size, length on the text", "weight 0.5, mean 0.1 → 0.1"),
        ("total", "mean 0.3 → 0.8"),
        ("standard deviation of the total", "mean 0.2 → 0.2"),
        ("total - 1σ, learnt from", "mean 0.1 → 0.6"),
        ("normalisation", "each part by its group, then the weighted sum by the step (GDPO)"),
    ]
    assert reward_rows("no: config", lines)[0][0] == "said"
    assert reward_rows(config, []) == []
    drawn = {chart.title for chart in charts([{"step": i, **line} for i, line in enumerate(lines)])}
    assert "Reward less its uncertainty, and that" in drawn
    assert "reward_weight/said" in constants(lines)


def test_charts_survive_gaps_flags_and_single_steps() -> None:
    lines = [{"step": 0, "loss": float("nan"), "kl": True, "entropy": 0.5, "seconds/sample": 1.0}]
    assert [chart.title for chart in charts(lines)] == ["Entropy", "Seconds by phase"]
    assert charts([]) == []


@pytest.mark.parametrize(("seconds", "text"), [(4.25, "4.2 s"), (125, "2 min 05 s"), (11220, "3 h 07 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


FAULTS: list[dict[str, Any]] = [
    {"time": 0.0, "kind": "run_started"},
    {"time": 1.0, "kind": "worker_created", "worker": "worker-0", "detail": "{CPU: 1}"},
    {"time": 1.0, "kind": "worker_created", "worker": "worker-1", "detail": "{CPU: 1}"},
    {"time": 3.0, "kind": "worker_ready", "worker": "worker-0", "detail": "pid 1 on n"},
    {"time": 3.0, "kind": "worker_ready", "worker": "worker-1", "detail": "pid 2 on n"},
    {"time": 10.0, "kind": "worker_lost", "worker": "worker-1", "detail": "ActorDiedError: killed", "samples": ["a"]},
    {"time": 10.0, "kind": "worker_created", "worker": "worker-2", "detail": "{CPU: 1}"},
    {"time": 12.5, "kind": "worker_ready", "worker": "worker-2", "detail": "pid 3 on n"},
    {"time": 20.0, "kind": "worker_lost", "worker": "worker-0", "detail": "no result within 2 s", "samples": []},
    {"time": 20.0, "kind": "worker_created", "worker": "worker-3", "detail": "{CPU: 1}"},
    {"time": 24.0, "kind": "worker_ready", "worker": "worker-3", "detail": "pid 4 on n"},
    {"time": 30.0, "kind": "workers_scaled", "before": 2, "workers": 3, "reason": "the command line asked for 3"},
    {"time": 30.0, "kind": "worker_created", "worker": "worker-4", "detail": "{CPU: 1}"},
    {"time": 31.0, "kind": "worker_ready", "worker": "worker-4", "detail": "pid 5 on n"},
    {"time": 40.0, "kind": "worker_retiring", "worker": "worker-4", "detail": "resized to 2"},
    {"time": 50.0, "kind": "sample_quarantined", "sample": "train-7", "detail": "crashed 3 workers"},
    {"time": 55.0, "kind": "reward_failed", "step": 2, "groups": 3, "detail": "the reward raised <Boom>"},
    {"time": 60.0, "kind": "worker_lost", "worker": "worker-3", "detail": "ActorDiedError: killed", "samples": []},
    {"time": 65.0, "kind": "reward_replica_lost"},
    {"time": 68.0, "kind": "reward_replica_ready", "seconds": 3.0},
    {"time": 69.0, "kind": "run_ended", "status": "failed: the rollout controller is gone"},
    {"time": 70.0, "kind": "run_resumed"},
    {"time": 71.0, "kind": "checkpoint_damaged", "step": 6, "reason": "state.json: hash differs"},
    {"time": 72.0, "kind": "worker_created", "worker": "worker-0", "detail": "{CPU: 1}"},
    {"time": 74.0, "kind": "worker_ready", "worker": "worker-0", "detail": "pid 6 on n"},
    {"time": 80.0, "kind": "learner_restarted", "at_step": 5, "step": 4},
    {"time": 90.0, "kind": "run_ended", "status": "finished"},
]


def test_the_report_says_what_happened(tmp_path: Path) -> None:
    """Two losses made good, one overtaken by a resume; a worker that scaling brought is nobody's replacement."""
    quarantined = [{"sample_id": "train-7", "reason": "crashed 3 workers", "where": ""}]
    rows = {row["what"]: (row["count"], row["details"]) for row in happened(FAULTS, [line(0), line(1)], quarantined)}
    assert rows == {
        "rollout workers lost": ("3", "no result within 2 s; ActorDiedError: killed"),
        "rollout workers replaced": ("2", "ready within 4.0 s of the loss"),
        "rollout workers retired": ("1", ""),
        "changes of scale": ("1", "the command line asked for 3"),
        "learner restarts": ("1", "at step 5, back to 4"),
        "ended with an error": ("1", "failed: the rollout controller is gone"),
        "resumed": ("1", ""),
        "reward replicas lost": ("1", ""),
        "samples quarantined": ("1", "crashed 3 workers"),
        "groups without a reward": ("3", "the reward raised <Boom>"),
        "groups sampled again as too stale": ("4", ""),
        "checkpoints damaged": ("1", "of step 6; state.json: hash differs"),
    }
    run = RunDir.create(tmp_path, "faults")
    for event in FAULTS:
        run.append_line("events.jsonl", event)
    run.append_line("quarantine.jsonl", quarantined[0])
    html = Path(write_report(run)).read_text(encoding="utf-8")
    Page(html)
    text = " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())
    for words in (
        "rollout workers lost 3 no result within 2 s; ActorDiedError: killed",
        "learner restarts 1 at step 5, back to 4",
        "groups without a reward 3 the reward raised <Boom>",
        "1970-01-01 00:01:20 UTC learners restarted at_step: 5, step: 4",
        "rollout worker lost worker: worker-1, detail: ActorDiedError: killed",
    ):
        assert words in text


def test_a_loss_that_nobody_has_made_good_is_told() -> None:
    assert list(replacements(FAULTS[:6])) == []
    assert list(replacements(FAULTS[:7])) == [None]
    (row,) = [row for row in happened(FAULTS[:7], [], []) if row["what"] == "rollout workers replaced"]
    assert row["details"] == "1 not ready (yet)"
    assert happened(FAULTS[:5], [], []) == []


HOSTILE = (
    *("$a_{b$", "[b]bold", "[/x]", "<script>alert(1)</script>", "line\nbreak", "🙂", "\u202eback", "_under", ":dog:"),
    *("\x1b[31mred", "$", "%s {0} {{x}}", "&amp;"),
)


def hostile_run(folder: Path) -> RunDir:
    """A run whose reward's parts, workers, samples and captions are called so."""
    run = RunDir.create(folder, "[b]run")
    for name, evaluation in (("before", BEFORE), ("after", AFTER)):
        captions = [
            replace(c, caption=said, reward=replace(c.reward, parts=dict.fromkeys(HOSTILE, 0.1)))
            for c, said in zip(evaluation.captions, itertools.cycle(HOSTILE), strict=False)
        ]
        save_evaluation(run, name, Evaluation(tuple(captions)), SCENES)
    log = StepLog(run)
    for step in range(3):
        names = [f"{family}/{name}" for family in ("reward", "seconds") for name in HOSTILE]
        log.write({"step": step, **dict.fromkeys(names, 1.0 + step)})
    run.append_line("events.jsonl", {"time": 0, "kind": "[b]what", "worker": "[/x]", "detail": "<script>"})
    run.append_line("quarantine.jsonl", {"sample_id": "[/x]", "reason": "<script>", "where": "$a_{b$"})
    return run


def on_terminal(*shown: Any) -> str:
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=True, color_system=None)
    for each in shown:
        console.print(each)
    return text.getvalue()


def test_names_and_captions_are_shown_as_they_are_written(tmp_path: Path) -> None:
    """No markup, formula, emoji code, escape sequence or direction of writing is taken from one."""
    run = hostile_run(tmp_path)
    html = Path(write_report(run)).read_text(encoding="utf-8")
    page = Page(html)
    assert "alert(1)" in page.words
    assert "<script" not in html.lower()
    charts_by_words = {p["alt"].split(":")[1].split(",")[0].strip(): p["src"] for p in page.all("img") if "alt" in p}
    for title in ("Reward parts", "Seconds by phase"):
        svg = base64.b64decode(charts_by_words[title].split(",", 1)[1])
        labels = {"".join(e.itertext()).strip("\u200b") for e in ElementTree.fromstring(svg).iter() if "text" in e.tag}
        assert {visible(name) for name in HOSTILE[:6]} <= labels
    evaluation = load_evaluation(run, "after")
    assert evaluation is not None
    correlations = dict.fromkeys(HOSTILE, Correlation(0.5, 0.5))
    figures = {"count": 2, "decided": 2, "accuracy": 0.5, "expected": 0.5, "nll": 0.1}
    parts = {"held_out": {"pairs": {**figures, "parts": dict.fromkeys(HOSTILE, figures)}}, "left_out": {"reasons": {}}}
    told = io.StringIO()
    print_report(parts, Console(file=told, width=200))
    assert "0.095 … 0.905" in told.getvalue()  # Wilson's interval of 1 of 2
    tables = {
        "evaluate": on_terminal(measures_table("[b]run", evaluation)),
        "correlations": on_terminal(correlation_table(correlations, 3)),
        "reward": told.getvalue(),
    }
    for table, text in tables.items():
        for name in HOSTILE:
            assert visible(name) in text, (table, name)
        assert not set(text) & {"\x1b", "\u202e"}
    assert "[b]run: 30 samples" in tables["evaluate"]
    lines = io.StringIO()
    with RunProgress(Console(file=lines, width=40)) as progress:
        for name in HOSTILE:
            progress.note(name)
    assert [line.split("] ", 1)[1] for line in lines.getvalue().splitlines()] == [visible(name) for name in HOSTILE]


def test_what_is_visible() -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # joined by characters that nobody sees
    assert visible(f"पानी {family} café") == f"पानी {family} café"
    assert visible("a\tb\r\nc\x00\x9b\u2028\u202e") == r"a\tb\r\nc\x00\x9b\u2028\u202e"


def test_many_events_leave_the_ordinary_ones_out_first() -> None:
    many = [*FAULTS, *({"time": float(i), "kind": "worker_ready", "worker": f"worker-{i}"} for i in range(100))]
    rows, left_out = event_rows(many)
    assert (len(rows), left_out) == (15, 112)
    assert "rollout worker ready" not in {row["what"] for row in rows}
    rows, left_out = event_rows([{"time": float(i), "kind": "worker_lost"} for i in range(100)])
    assert (len(rows), left_out) == (60, 40)
    assert rows[-1]["when"] == "1970-01-01 00:01:39 UTC"
