"""Every command of the README, in its order, in a folder that holds what it takes for granted."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from mmrl_ray.data.samples import read_split

from .conftest import Workplace

ROOT = Path(__file__).parents[3]


def commands(tool: str) -> list[str]:
    """Lines of the README's shell blocks that call `tool`, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"{tool} ")]


@pytest.fixture
def place(workplace: Workplace, tmp_path: Path) -> Path:
    """The files that the README's commands name: COCO, Karpathy's splits, photographs, a config."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    samples = read_split(workplace.folder / "train", prompt="")[:6]
    for folder in ("train2017", "coco/val2014", "."):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for i, sample in enumerate(samples):
            (tmp_path / folder / f"{i}.png").write_bytes(sample.images[0])
    (tmp_path / "photo.jpg").write_bytes(samples[0].images[0])
    numbered = list(enumerate(samples))
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i, _ in numbered],
        "annotations": [
            {"id": 10 * i + j, "image_id": i, "caption": text}
            for i, s in numbered
            for j, text in enumerate(s.references)
        ],
    }
    (tmp_path / "captions_train2017.json").write_text(json.dumps(coco))
    karpathy = {
        "dataset": "coco",
        "images": [
            {
                "filename": f"{i}.png",
                "filepath": "val2014",
                "split": "test",
                "cocoid": i,
                "imgid": i,
                "sentences": [{"raw": text} for text in s.references],
            }
            for i, s in numbered
        ],
    }
    (tmp_path / "dataset_coco.json").write_text(json.dumps(karpathy))
    lines = [json.dumps({"image": f"{i}.png", "captions": list(s.references)}) for i, s in numbered]
    (tmp_path / "photos.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        **workplace.settings,
        "run": {"name": "mine"},
        "data": {"train": "data/photos", "eval": "data/coco/test", "prompt": "describe the image ."},
        "sft": {"steps": 2, "batch_size": 4, "warmup_steps": 0},
        "learner": {"steps": 2, "groups_per_step": 2},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.mark.timeout(600)
def test_every_mmrl_command_of_the_readme_runs(workplace: Workplace, place: Path) -> None:
    found = commands("mmrl")
    assert len(found) >= 12
    for command in found:
        output = workplace.mmrl(*shlex.split(command)[1:], cwd=place)
        assert "Traceback" not in output, command
    assert (place / "runs" / "again" / "report.html").exists()
    assert len(read_split(place / "data" / "coco" / "train", prompt="")) == 6
    summary = json.loads((place / "runs" / "again" / "summary.json").read_text())
    assert summary["status"] == "finished"


def test_every_make_target_of_the_readme_is_there() -> None:
    found = commands("make")
    assert {"make quickstart", "make test"} <= set(found)
    for command in found:
        done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
