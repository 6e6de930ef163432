"""A whole run with a teacher, and with all keys about captions of its own at once; a resumed one is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmrl_ray.data.scenes.generator import scenes_vocabulary
from mmrl_ray.policy.tiny import build_tiny_llava

from .conftest import Workplace


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("distill/", "sampled/", "loss", "kl"))} for line in found]


def test_a_student_is_distilled_and_a_resumed_one_is_the_same_bit_for_bit(workplace: Workplace) -> None:
    teacher = build_tiny_llava(
        workplace.folder / "teacher",
        vocabulary=["describe", "the", "image", ".", *scenes_vocabulary()],
        patch_size=8,
        hidden=48,
        layers=2,
        heads=4,
        vision_hidden=32,
        vision_layers=1,
        vision_heads=2,
        seed=5,
    )
    own = {"dynamic_sampling": True, "max_oversampling": 1.5, "mask_truncated": True, "entropy_bonus": 0.01}
    path = workplace.config(
        "distilled",
        algorithm="distill",
        teacher={"path": str(teacher), "dtype": "float32"},
        learner={"steps": 4, "checkpoint_every": 2, "overlong": {"penalty": 0.5}, **own},
        resources={"teacher": {"cpus": 0.5, "threads": 1}},
    )
    workplace.mmrl("train", path)
    run = workplace.runs / "distilled"
    whole, adapter = lines(run), (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert len(whole) == 4
    assert all(line["kl"] > 0 and line["sampled/groups"] in range(4, 7) for line in whole)

    # As it was after two steps, its machine gone.
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (run / "summary.json").unlink()
    workplace.mmrl("train", "--resume", run)
    assert lines(run) == whole
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter

    other = build_tiny_llava(workplace.folder / "stranger", vocabulary=["describe", "image", "zebra"])
    said = workplace.mmrl("train", path, "--set", f"teacher.path={other}", "--set", "run.name=refused", code=1)
    assert "teacher" in said
    assert "its vocabulary has" in said
    assert not (workplace.runs / "refused").exists()
