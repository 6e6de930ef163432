"""Whether captions depend on the picture: what is blind, what only says little, and who is told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mmrl_ray.config import Config
from mmrl_ray.config.load import load_config
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.evaluation.scores import Blindness, blindness
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.report.page import write_report
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.telemetry.terminal import RunProgress
from mmrl_ray.training.held_out import HeldOut

PHOTOS = [(f"a photo of thing {i}", f"thing {i} outside") for i in range(200)]


def found(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Blindness | None:
    rows = zip(references, captions, strict=True)
    return blindness(([f"{i:x}"], theirs, caption) for i, (theirs, caption) in enumerate(rows))


@pytest.mark.parametrize(
    ("captions", "references", "is_blind"),
    [
        (["A man."] * 200, PHOTOS, True),
        (["a man ."] * 185 + [f"a dog {i}" for i in range(15)], PHOTOS, True),
        ([""] * 200, PHOTOS, True),
        (["A man.", "a  MAN."] * 100, PHOTOS, True),
        (["A man."] * 160 + ["A dog."] * 40, PHOTOS, True),
        (["A man.", "A dog.", "A cat.", "A car."] * 50, PHOTOS, False),
        (["A man."] * 150 + [f"a dog {i}" for i in range(50)], PHOTOS, False),
        (["A man."] * 19, PHOTOS[:19], False),  # too few to tell
        (["good"] * 200, [["good"]] * 190 + [["bad"]] * 10, False),  # the pictures themselves are alike
        (["good"] * 200, [["good", f"fine {i}"] for i in range(200)], False),  # and one sentence is right for all
        (["good"] * 200, [["good"]] * 100 + [["bad"]] * 100, True),
        (["A man."] * 200, [[]] * 200, False),  # nothing to hold it against
    ],
)
def test_captions_are_held_against_the_variety_of_the_references(
    captions: list[str], references: list[Sequence[str]], is_blind: bool
) -> None:
    assert (found(captions, references) is not None) == is_blind


def test_the_same_picture_many_times_is_one_picture() -> None:
    assert blindness((["same"], PHOTOS[i], "a man") for i in range(200)) is None


def test_a_policy_that_says_too_little_of_scenes_is_not_blind() -> None:
    """What the quickstart's warm start learns to say."""
    cfg = load_config("configs/quickstart.yaml")
    assert cfg.data.scenes is not None
    _, scenes = generate_scenes(ScenesSection(train=1, eval=cfg.data.scenes.eval, image_size=32))
    for kind in ("terse", "partial"):
        captions = [sample.metadata[kind][0] for sample in scenes]
        assert found(captions, [sample.references for sample in scenes]) is None
    captions = [scenes[0].metadata["terse"][0]] * len(scenes)
    assert found(captions, [sample.references for sample in scenes]) is not None


def test_an_evaluation_of_a_blind_policy_is_loud_wherever_one_looks(
    tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = Config.model_validate(
        {
            "run": {"name": "run", "root": str(tmp_path)},
            "model": {"path": "x"},
            "data": {"train": "x"},
            "learner": {"steps": 1},
        }
    )
    _, scenes = generate_scenes(ScenesSection(train=1, eval=24, image_size=32))
    statistics = CorpusStatistics.from_references(sample.references for sample in scenes)
    reward = build_reward(RewardSection(), statistics)
    run = RunDir.create(str(tmp_path), "run")

    def evaluate(name: str, samples: Sequence[Sample], captions: Sequence[str]) -> None:
        with RunProgress() as shown:
            HeldOut(cfg, run, samples, reward, statistics, shown).score(name, samples, captions)

    evaluate("before", scenes, ["a [bold] thing"] * 24)
    evaluate("after", scenes, [sample.references[0] for sample in scenes])
    said = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(said) == 1
    assert "(evaluation before training): 100% of 24 different pictures got 'a [bold] thing'" in said[0]
    assert "sft.train_vision" in said[0]
    [event] = run.read_lines("events.jsonl")
    assert (event["kind"], event["what"], event["share"]) == ("captions_blind", "evaluation before training", 1.0)
    write_report(run)
    page = run.read_text("report.html")
    assert "Captions do not depend on the picture (evaluation before training)" in page
    assert "captions that do not depend on the picture" in page
