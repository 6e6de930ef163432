"""`--dry-run` on complete, half-there and wrong configs; it neither writes nor starts Ray."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from mmrl_ray.config import Config
from mmrl_ray.config.reward import FormatPart
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.samples import write_parquet
from mmrl_ray.data.scenes.generator import generate_scenes, write_scenes
from mmrl_ray.errors import DataError, ModelError
from mmrl_ray.planning.dry_run import dry_run
from mmrl_ray.planning.findings import DryRun
from mmrl_ray.planning.preflight import with_opening
from mmrl_ray.policy import load as loading
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.processes import free_port
from mmrl_ray.training.train import train
from mmrl_ray.training.warm_start import TINY_LLAVA
from tests.support.tiny_models import build_family


def config(folder: Path, **sections: Any) -> Config:
    merged: dict[str, Any] = {
        "run": {"name": "demo", "root": str(folder / "runs")},
        "model": {"path": "builtin:tiny-llava", "dtype": "float32"},
        "data": {"train": str(folder / "train"), "prompt": "describe the image .", "scenes": {"train": 40, "eval": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 16},
        "learner": {"steps": 10, "groups_per_step": 8},
    }
    for name, section in sections.items():
        merged[name] = {**merged.get(name, {}), **section}
    return Config.model_validate(merged)


def show(cfg: Config, **options: Any) -> tuple[DryRun, str]:
    text = io.StringIO()
    found = dry_run(cfg, console=Console(file=text, width=200), **options)
    return found, text.getvalue()


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_tells_everything_of_a_run_whose_data_will_be_generated(tmp_path: Path) -> None:
    found, text = show(config(tmp_path))
    assert found.blocking == []
    assert found.rows == 40
    assert found.sample is not None
    assert len(found.sample.references) == 5
    assert found.image_tokens == 16
    assert found.prompt_tokens is not None
    assert found.prompt_tokens > 16
    for line in (
        "a step      8 images × 4 completions = 32 completions",
        "the run     10 steps, 80 images, 320 completions",
        "epochs      2.00 over 40 training images",
        "placement   shared; asked for together: 2 CPU, 0 GPU",
        "is not there yet: the run will generate the scenes",
        "1 × caption      caption, on the references",
        "one learner worker, about",
        "while it loads, up to 60",  # MiB: of a process, nearly all
    ):
        assert line in text
    assert f"reference   {found.sample.references[0]}" in text
    assert "clip_high: 0.2" in text  # resolved
    assert files(tmp_path) == set()


def test_a_server_that_is_to_sample_and_does_not_answer_is_said(tmp_path: Path) -> None:
    server = {"kind": "openai", "url": f"http://127.0.0.1:{free_port()}", "adapters": str(tmp_path / "adapters")}
    found, text = show(config(tmp_path, rollout={"engine": server}))
    (line,) = found.lacking
    assert line in found.blocking
    assert f"rollout.engine.url={server['url']}: no vLLM server answers there" in text
    assert files(tmp_path) == set()


def test_reads_the_first_sample_of_data_that_is_there(tmp_path: Path) -> None:
    write_scenes(ScenesSection(train=12, eval=4), tmp_path / "train", tmp_path / "eval")
    before = files(tmp_path)
    found, _ = show(config(tmp_path, data={"scenes": None, "eval": str(tmp_path / "eval")}))
    assert (found.rows, found.blocking) == (12, [])
    assert files(tmp_path) == before


def test_the_first_row_does_not_stand_for_the_set(tmp_path: Path) -> None:
    """A broken picture comes first in both splits, and two held-out pictures are trained on."""
    _, scenes = generate_scenes(ScenesSection(train=1, eval=8))
    broken = replace(scenes[0], id="broken", images=(b"no picture",))
    write_parquet(tmp_path / "train", [broken, *scenes[:5]])
    write_parquet(tmp_path / "eval", [broken, *scenes[3:]])
    data = {"scenes": None, "eval": str(tmp_path / "eval")}
    found, text = show(config(tmp_path, data=data))
    assert found.blocking == []
    assert found.sample == replace(scenes[0], prompt=found.sample.prompt)  # type: ignore[union-attr]
    assert f"5 samples of {tmp_path / 'eval'}" in text
    assert "1 samples left out (broken): part-00000-of-00001.parquet row 0: text instead of an image" in text
    assert f"2 of 5 held-out pictures (40%) are trained on: {scenes[3].id}, {scenes[4].id};" in text
    (blocked,) = show(config(tmp_path, data={**data, "max_quarantined": 0}))[0].blocking[:1]
    assert f"at most 0 are tolerated (max_quarantined): mend them or raise it. First of {tmp_path / 'train'}" in blocked
    same, _ = show(config(tmp_path, data={**data, "eval": str(tmp_path / "train")}))
    assert any("nothing is held out: all 5 held-out pictures are trained on" in line for line in same.held_out)
    assert any("in data.train, which data.eval is, too" in line for line in same.held_out)


def test_what_train_refuses_of_the_data_is_said(tmp_path: Path) -> None:
    _, scenes = generate_scenes(ScenesSection(train=1, eval=4))
    bare = [replace(each, references=()) for each in scenes]
    write_parquet(tmp_path / "train", bare)
    write_parquet(tmp_path / "eval", [*scenes[:2], bare[2]])
    model = build_tiny_llava(tmp_path / "model", vocabulary=["a"], **TINY_LLAVA)
    cfg = config(tmp_path, data={"scenes": None, "eval": str(tmp_path / "eval")}, model={"path": str(model)})
    found, _ = show(cfg)
    training, held_out = found.blocking
    assert training.startswith(f"data.train: no row of {tmp_path / 'train'} has a reference")
    assert held_out.endswith(f"sample {bare[2].id!r} has no references to evaluate against")
    pq.write_table(pa.table({"image": [each.images[0] for each in scenes]}), tmp_path / "column.parquet")
    column = config(tmp_path, data={"scenes": None, "train": str(tmp_path / "column.parquet")})
    assert "has no references" in show(column)[0].blocking[0]
    with pytest.raises(DataError, match=re.escape(training.removeprefix("data.train: "))):
        train(cfg)
    write_parquet(tmp_path / "good", scenes)
    other = config(tmp_path, data={"scenes": None, "train": str(tmp_path / "good"), "eval": str(tmp_path / "eval")})
    with pytest.raises(DataError, match=re.escape(held_out.removeprefix("data.eval: "))):
        train(other)
    assert not (tmp_path / "runs").exists()


def test_a_log_that_is_not_there_yet_is_told_and_one_that_does_not_fit_blocks(tmp_path: Path) -> None:
    def look() -> DryRun:
        cfg = config(
            tmp_path,
            data={"rollouts": {"run": str(tmp_path / "again")}},
            learner={"loss": "ilql", "advantage": "none", "kl": {"weight": 0.0}},
        )
        return show(cfg)[0]

    found = look()
    assert found.blocking == []
    assert any("again is not there yet: train that first" in line for line in found.unchecked)
    (tmp_path / "again").mkdir()
    (blocked,) = look().blocking
    assert "has no rollout log" in blocked


def test_any_model_folder(tmp_path: Path) -> None:
    build_family("qwen2_5_vl", tmp_path / "model")
    found, text = show(config(tmp_path, model={"path": str(tmp_path / "model")}))
    assert found.shape is not None
    assert found.blocking == []
    assert "micro-batches 1 over 1 learner worker(s) a step" in text


def _drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _count_one_token_less(folder: Path) -> None:
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**settings, "num_additional_image_tokens": 0}))


def _write_no_picture(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_drop_a_tensor, "its weight files lack 1 tensors, the first 'lm_head.weight'"),
        (_count_one_token_less, "a first trial with a picture of 64×48 failed, in transformers' own forward"),
        (_write_no_picture, "its chat template cannot render a conversation: TypeError"),
    ],
)
def test_a_model_in_a_folder_that_cannot_be_used_stops_the_run(
    tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    """Told by the dry run, and by the run itself before its folder exists or anything is started."""
    model = build_family("llava", tmp_path / "model")
    damage(model)
    cfg = config(tmp_path, model={"path": str(model)})
    found, text = show(cfg)
    (blocked,) = found.blocking
    assert str(model) in blocked
    assert expected in blocked
    assert "Would stop the run" in text
    assert not any(str(model) in line for line in found.unchecked)
    with pytest.raises(ModelError) as error:
        train(cfg)
    assert expected in str(error.value)
    assert not (tmp_path / "runs").exists()
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_a_model_that_takes_long_to_load_is_looked_at_without_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "QUICK_BYTES", 1000)
    model = build_family("llava", tmp_path / "model")
    _count_one_token_less(model)
    cfg = config(tmp_path, model={"path": str(model)})
    found, _ = show(cfg)
    assert found.blocking == []
    assert any("the numbers in the weights of" in line and "a first trial" in line for line in found.unchecked)
    _drop_a_tensor(model)
    assert "lack 1 tensors" in show(cfg)[0].blocking[0]


def test_a_setting_of_the_processor_that_is_none_stops_the_run(tmp_path: Path) -> None:
    found, _ = show(config(tmp_path, model={"processor": {"szie": 3}}))
    assert "model.processor.szie" in found.blocking[0]
    assert "did you mean size?" in found.blocking[0]


def test_goes_on_without_data_and_without_the_hub(tmp_path: Path) -> None:
    found, text = show(config(tmp_path, data={"scenes": None}, model={"path": "nobody/nothing"}))
    assert found.shape is None
    (data,) = found.blocking
    assert data.startswith("data.train: ")
    assert str(tmp_path / "train") in data
    assert any("nobody/nothing" in line for line in found.unchecked)
    assert "unknown without the model's config" in text
    assert "80 images, 320 completions" in text


def test_without_data_a_stand_in_picture_gives_the_prompt_length(tmp_path: Path) -> None:
    build_family("smolvlm", tmp_path / "model")
    found, _ = show(config(tmp_path, data={"scenes": None}, model={"path": str(tmp_path / "model")}))
    assert found.sample is None
    assert found.prompt_tokens is not None
    assert any("blank picture of 640×480" in line for line in found.unchecked)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"rollout": {"max_new_tokens": 5000}}, "exceeds the model's context of 512"),
        ({"model": {"lora": {"targets": ["no_such_proj"]}}}, "no_such_proj"),
        ({"resources": {"learner": {"gpus": 1000}}}, "1000 GPU asked for"),
        ({"data": {"prompt": "see <image> ."}}, "<image>"),
        ({"rollout": {"engine": {"kind": "vllm", "python": "/nowhere/python"}}}, "'/nowhere/python' is no program"),
        (
            {
                "reward": {
                    "parts": {"mine": {"kind": "function", "path": "no_such_module:f", "state": "text"}},
                    "weights": {"mine": 1.0},
                }
            },
            "reward.parts.mine: no_such_module:f cannot be imported",
        ),
    ],
)
def test_says_what_would_stop_the_run(tmp_path: Path, sections: dict[str, Any], expected: str) -> None:
    found, text = show(config(tmp_path, **sections))
    assert len(found.blocking) == 1
    assert expected in found.blocking[0]
    assert ("Would stop the run" in text) == bool(found.refused), "the exit code goes by it"
    assert ("Not on this machine" in text) == bool(found.lacking)
    assert ("a resumed run goes on with other tokens" in text) == ("engine" in sections.get("rollout", {}))


def test_warns_of_a_format_that_no_reference_has_and_knows_what_the_template_writes(tmp_path: Path) -> None:
    write_scenes(ScenesSection(train=12, eval=4), tmp_path / "train", tmp_path / "eval")
    model = build_family("llava", tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>{% endif %}")
    parts = {
        "thought": {"kind": "format", "pattern": "<think>.*</think>.*"},
        "said": {"kind": "format", "pattern": "<think>.*"},
        "short": {"kind": "format", "pattern": "(?:a|aa|[^a])+!"},  # in too many ways to try them all
    }
    cfg = config(
        tmp_path,
        model={"path": str(model)},
        data={"scenes": None},
        reward={"parts": parts, "weights": dict.fromkeys(parts, 1.0)},
    )
    found, text = show(cfg)
    assert found.blocking == []
    thought, short = found.warnings
    assert "reward.parts.thought: pattern '<think>.*</think>.*' after '<think>', which the chat template" in thought
    assert "matches none of 12 references, such as 'a " in thought
    assert "reward.parts.short: " in short
    assert "Warnings" in text
    assert "said: answers begin with '<think>', which the chat template writes" in text
    run = with_opening(cfg, cfg.model).reward.parts
    assert [part.prefix for part in run.values() if isinstance(part, FormatPart)] == ["<think>"] * 3
    own = cfg.reward.with_opening("x").with_opening("y")
    assert own == cfg.reward.with_opening("x")


def test_calls_own_reward_functions_on_one_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "dry_rewards.py").write_text(
        "def words(captions, states):\n    print('sees', states)\n    return [len(c.split()) for c in captions]\n"
        "def broken(captions, states):\n    return [1 / 0 for _ in captions]\n"
    )
    monkeypatch.chdir(tmp_path / "code")
    parts = {name: {"kind": "function", "path": f"dry_rewards:{name}", "state": "text"} for name in ("words", "broken")}
    cfg = config(tmp_path, reward={"parts": parts, "weights": dict.fromkeys(parts, 1.0)})
    found, text = show(cfg)
    assert found.sample is not None
    caption = found.sample.references[0]
    (line,) = found.tried
    assert line == f"words of {caption!r}, on sample {found.sample.id}: {len(caption.split())}"
    assert line in text
    (problem,) = found.blocking
    assert problem.startswith("reward.parts.broken: ZeroDivisionError: division by zero (")
    assert "dry_rewards.py:5)" in problem
    printed = capfd.readouterr().err
    assert f"[reward dry_rewards:words] sees ['{found.sample.prompt}']" in printed
    assert "[reward dry_rewards:broken] ZeroDivisionError: division by zero" in printed


def test_run_folder_and_resume(tmp_path: Path) -> None:
    assert show(config(tmp_path), resume=True)[0].blocking == [f"there is no run demo in {tmp_path / 'runs'} to resume"]
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert "exists: add --resume" in show(config(tmp_path))[0].blocking[0]
    assert show(config(tmp_path), resume=True)[0].blocking == []


def test_a_cluster_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    found, _ = show(config(tmp_path, resources={"learner": {"gpus": 1000}}))
    assert found.blocking == []
    assert any("RAY_ADDRESS" in line for line in found.unchecked)
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
