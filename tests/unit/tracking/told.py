"""A run folder as a run leaves it, bit by bit, and trackers that are told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.config.load import parse_config
from mmrl_ray.data.samples import Sample
from mmrl_ray.evaluation.records import save_evaluation
from mmrl_ray.evaluation.scores import CaptionScore, Evaluation
from mmrl_ray.experience.carriers import RewardBreakdown
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.samples import save_samples, store_pictures
from mmrl_ray.tracking.run import Tracking
from tests.unit.rollouts.fakes import png

CONFIG = """
run: {name: told, root: ROOT}
model: {path: none}
data: {train: none, eval: held-out}
eval: {every: 2}
learner: {steps: 6}
tracking: {project: captions, finish_s: 60}
"""
REWARDS = {"reward": [0.25, 0.5, 0.75], "reward/caption": [1.0, 2.0, 4.0]}
DIARY = "tests.unit.tracking.own_trackers:Diary"


class Notes:
    """What a person would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    warn = note


class Folder:
    """A run that is under way, or was."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.root = root
        self.cfg: Config = parse_config(CONFIG.replace("ROOT", str(root)), "told.yaml", overrides)
        self.run = RunDir.open(root, "told") if (root / "told").exists() else RunDir.create(root, "told")
        self.notes = Notes()

    def steps(self, first: int, end: int, reward: Callable[[int], float] = float) -> None:
        for step in range(first, end):
            figures = {"reward/mean": reward(step), "loss": None, "shared_prefix": True, "named [x]": 1.5}
            self.run.append_line("metrics.jsonl", {"step": step, "policy_version": step + 1, **figures})

    def back_to(self, step: int) -> None:
        self.run.truncate_lines("metrics.jsonl", lambda line: line["step"] < step)

    def evaluate(self, step: int) -> None:
        sample = Sample("s-1", (png(7),), "what?", references=("a | reference",))
        reward = RewardBreakdown(total=0.5, parts={"caption": 2.0}, weights={"caption": 0.25})
        names = store_pictures(self.run, sample.images)
        hashes = tuple(name.partition(".")[0] for name in names)
        scores = {"cider_d": 0.125}
        found = CaptionScore("s-1", hashes, "what?", ("a | reference",), "a <b> caption", reward, scores)
        save_evaluation(self.run, f"step-{step:06d}", Evaluation((found,)), [sample])
        self.run.append_line("eval/steps.jsonl", {"step": step, "eval/cider_d": 0.125, "best": step, "since_best": 0})

    def sample(self, step: int) -> None:
        said: dict[str, Any] = {"kind": "fixed", "sample": "s-9", "images": store_pictures(self.run, [png(3)])}
        said |= {"references": ["this"], "best": {"caption": "good", "reward": 0.75}}
        said |= {"worst": {"caption": "poor", "reward": 0.25}}
        save_samples(self.run, step, {"policy_version": step, "rewards": REWARDS, "pictures": [said]})

    def ends(self) -> None:
        sides = {"before": 0.25, "after": 0.5}
        values = {side: {"measures": {"reward": {"value": value}}} for side, value in sides.items()}
        summary = {"status": "finished", "eval": values, "checkpoints": {"best": {"step": 2}}}
        self.run.write_json("summary.json", summary)
        self.run.write_text("adapter/adapter_config.json", "{}")
        self.run.write_text("report.html", "<p>")

    @contextmanager
    def tracked(self) -> Iterator[Tracking]:
        """As `mmrl train` does it."""
        tracking = Tracking(self.cfg, self.run, self.notes, pause_s=0.05)
        try:
            tracking.check(is_resumed=self.run.exists("events.jsonl"))
            tracking.start(self.cfg)
            yield tracking
        finally:
            tracking.close()

    def events(self) -> list[tuple[str, str]]:
        return [(event["kind"], event["detail"]) for event in self.run.read_lines("events.jsonl")]

    def id(self, tracker: str) -> str:
        found: str = self.run.read_json(f"tracking/{tracker}.json")["id"]
        return found
