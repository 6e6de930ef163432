"""The commands that hand over to `runs/`: with what arguments, and what the real thing refuses at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from mmrl_ray.config.load import dump_config, parse_config
from mmrl_ray.run_records.run_owner import _machine
from mmrl_ray.training.model_process import Base
from tests.unit.cli.program import Patch, mmrl


def test_train_hands_over_the_config(config: Path, patched: Patch) -> None:
    train = patched("mmrl_ray.training.train.train", return_value=str(config.parent))
    assert mmrl("train", config, "--set", "learner.steps=3").exit_code == 0
    ((cfg,), options) = train.call_args
    assert cfg.learner.steps == 3
    assert options == {"resume": False, "address": None, "debug": False}
    assert mmrl("train", config, "--resume", "--debug").exit_code == 0
    assert train.call_args.kwargs == {"resume": True, "address": None, "debug": True}


def test_a_retry_goes_on_where_there_is_a_run_and_begins_it_where_there_is_none(config: Path, patched: Patch) -> None:
    train = patched("mmrl_ray.training.train.train", return_value=str(config.parent))
    again = ("train", config, "--resume-or-start", "--address", "10.0.0.1:6379")
    assert mmrl(*again).exit_code == 0
    assert train.call_args.kwargs == {"resume": False, "address": "10.0.0.1:6379", "debug": False}
    cfg = train.call_args.args[0]
    (Path(cfg.run.root) / cfg.run.name).mkdir(parents=True)
    assert mmrl(*again).exit_code == 0
    assert train.call_args.kwargs["resume"] is True


@pytest.mark.parametrize("order", [("--resume", "RUN"), ("RUN", "--resume")])
def test_resume_reads_the_config_of_the_run_folder(config: Path, patched: Patch, order: tuple[str, str]) -> None:
    train = patched("mmrl_ray.training.train.train", return_value=str(config.parent))
    cfg = parse_config(config.read_text(), "c.yaml", ["learner.lr=7e-4"])
    folder = Path(cfg.run.root) / "demo"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(cfg))
    done = mmrl("train", *[str(folder) if a == "RUN" else a for a in order], "--set", "learner.steps=12")
    assert done.exit_code == 0, done.stderr
    ((resumed,), options) = train.call_args
    assert options["resume"] is True
    assert resumed == parse_config(config.read_text(), "c.yaml", ["learner.lr=7e-4", "learner.steps=12"])


def test_a_run_folder_that_was_moved_is_resumed_where_it_lies(config: Path, patched: Patch, tmp_path: Path) -> None:
    train = patched("mmrl_ray.training.train.train", return_value=str(config.parent))
    folder = tmp_path / "elsewhere" / "renamed"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(parse_config(config.read_text(), "c.yaml")))
    done = mmrl("train", "--resume", folder)
    assert done.exit_code == 0, done.stderr
    run = train.call_args.args[0].run
    assert (run.root, run.name) == (str(tmp_path / "elsewhere"), "renamed")


def test_dry_run_does_not_train(config: Path, patched: Patch, tmp_path: Path) -> None:
    train = patched("mmrl_ray.training.train.train", return_value=str(config.parent))
    before = sorted(tmp_path.rglob("*"))
    done = mmrl("train", config, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "80 images" in done.stdout
    train.assert_not_called()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_what_would_stop_fails(config: Path, tmp_path: Path) -> None:
    """GPUs that this machine lacks are another's affair: a plan is looked at anywhere."""
    done = mmrl("train", config, "--dry-run", "--set", f"model.path={tmp_path}")
    assert done.exit_code == 1
    assert "Would stop the run" in done.stdout
    assert f"error: the run would stop: model '{tmp_path}': its config.json" in done.stderr
    done = mmrl("train", config, "--dry-run", "--set", "resources.learner.gpus=64")
    assert done.exit_code == 0, done.stderr
    assert "64 GPU asked for" in done.stdout


def test_sft_prints_where_the_model_is(config: Path, patched: Patch) -> None:
    made = Base("/cache/abc", 0, (), None)
    patched("mmrl_ray.training.model_process.warm_start_apart", return_value=made)
    assert mmrl("sft", config).stdout == "/cache/abc\n"


def test_sft_needs_no_learner_and_writes_a_folder(config: Path, patched: Patch, tmp_path: Path) -> None:
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "model.safetensors").write_bytes(b"weights")
    made = Base(str(tmp_path / "abc"), 0, (), None)
    run = patched("mmrl_ray.training.model_process.warm_start_apart", return_value=made)
    cfg = yaml.safe_load(config.read_text())
    cfg.pop("learner")
    config.write_text(yaml.safe_dump(cfg))
    out = tmp_path / "mine"
    done = mmrl("sft", config, "--out", out)
    assert done.stdout == f"{out}\n", done.stderr
    assert (out / "model.safetensors").read_bytes() == b"weights"
    run.reset_mock()
    done = mmrl("sft", config, "--out", out)
    assert done.exit_code == 2
    assert f"{out} is there already" in done.stderr
    run.assert_not_called()


def test_an_existing_run_folder_is_refused_for_real(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    done = mmrl("train", config)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: run folder {folder} exists already: ")
    assert "--resume" in line
    assert [file.name for file in folder.iterdir()] == ["config.yaml"]


def test_a_run_that_was_killed_before_it_had_a_config_is_begun_again(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    dead = {"pid": 2**22 + 1, "started": "1", "machine": _machine(), "time": 0.0}
    (folder / "owner.json").write_text(json.dumps(dead))
    resumed = mmrl("train", "--resume", folder)
    assert resumed.exit_code == 1
    assert f"error: {folder} has no config.yaml" in resumed.stderr
    assert "begin it with mmrl train CONFIG" in resumed.stderr
    missing = ("--set", "data.scenes=null", "--set", f"data.train={tmp_path / 'nowhere'}", "--set", "sft=null")
    begun = mmrl("train", config, *missing)
    assert str(tmp_path / "nowhere") in begun.stderr, "it got as far as any new run"
    assert "exists already" not in begun.stderr


def test_a_run_whose_data_were_moved_too_says_what_to_add(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved" / "demo"
    folder.mkdir(parents=True)
    places = {key: f"{tmp_path}/gone/{key}" for key in ("data.train", "data.eval", "model.path")}
    moved = [f"{key}={place}" for key, place in places.items()]
    cfg = parse_config(config.read_text(), "c.yaml", ["data.scenes=null", "sft=null", *moved])
    (folder / "config.yaml").write_text(dump_config(cfg))
    done = mmrl("train", "--resume", folder)
    assert done.exit_code == 1
    for key, place in places.items():
        assert f"error: {key}={place} is not there any more: where it was moved, add --set {key}=PLACE\n" in done.stderr
    assert (folder / "config.yaml").exists()


def test_missing_data_is_refused_for_real(config: Path, tmp_path: Path) -> None:
    data = tmp_path / "nowhere"
    done = mmrl("train", config, "--set", "data.scenes=null", "--set", f"data.train={data}", "--set", "sft=null")
    assert done.exit_code == 1
    *_, line = done.stderr.splitlines()  # after the live progress
    assert line.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert str(data) in line
    assert not (tmp_path / "runs").exists()


def _text_model(folder: Path) -> Path:
    LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "settings", "expected"),
    [
        (None, ["model.lora.targets=[no_such_proj]"], "no_such_proj"),
        (None, ["model.path=builtin:huge-llava"], "no built-in model 'builtin:huge-llava'"),
        (_text_model, [], "without a vision tower"),
    ],
)
def test_what_cannot_work_is_refused_for_real_before_anything_of_the_run_is_written(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], Path] | None,
    settings: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # data and warm starts land here
    if make is not None:
        settings = [*settings, f"model.path={make(tmp_path / 'model')}"]
    overrides = [part for setting in ("sft=null", *settings) for part in ("--set", setting)]
    done = mmrl("train", config, *overrides)
    assert done.exit_code == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def place(folder: Path, config: bool = True) -> None:
    folder.mkdir(parents=True)
    if config:
        (folder / "config.yaml").write_text("")


def test_evaluate(patched: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place(tmp_path / "runs" / "demo")
    evaluate = patched("mmrl_ray.api.inference.evaluate")
    present = patched("mmrl_ray.evaluation.evaluate.present")
    plain = {"limit": None, "prompt": None, "beta": None, "checkpoint": None}
    assert mmrl("evaluate", "runs/demo", "--data", "d", "--limit", 5, "--out", "o.json").exit_code == 0
    evaluate.assert_called_once_with("runs/demo", "d", **{**plain, "limit": 5})
    present.assert_called_once_with(evaluate.return_value, out=Path("o.json"), as_json=False)
    assert mmrl("evaluate", "runs/demo", "--beta", "2.5", "--checkpoint", "best", "--json").exit_code == 0
    evaluate.assert_called_with("runs/demo", None, **{**plain, "beta": 2.5, "checkpoint": "best"})
    present.assert_called_with(evaluate.return_value, out=None, as_json=True)
    assert mmrl("evaluate", "runs/demo", "--beta", "-1").exit_code == 2
    assert mmrl("evaluate", "runs/demo", "--limit", 0).exit_code == 2


def test_explain_hands_everything_on(patched: Patch) -> None:
    explain = patched("mmrl_ray.evaluation.explain.explain")
    assert mmrl("explain", "r", "a.png").exit_code == 0
    explain.assert_called_with("r", Path("a.png"), caption=None, prompt=None, out=None, checkpoint=None)
    assert mmrl("explain", "r", "a.png", "--caption", "a dog", "--out", "b.png", "--checkpoint", 40).exit_code == 0
    explain.assert_called_with("r", Path("a.png"), caption="a dog", prompt=None, out=Path("b.png"), checkpoint="40")


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("runs/quikstart", "; did you mean runs/quickstart?"),
        ("quickstart", "; did you mean runs/quickstart?"),
        ("ruins/quickstart", None),
        ("data/photo", "; did you mean data/photos?"),
        ("runs/zzz", ""),
        ("far/away/quickstart", "; there is no folder far/away; there is no folder far"),
        ("./models/nope", "; there is no folder models"),
    ],
)
def test_what_looks_like_a_folder_is_never_asked_of_a_hub(
    target: str, hint: str | None, patched: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place(tmp_path / "runs" / "quickstart")
    place(tmp_path / "data" / "photos", config=False)
    begun = [
        patched("mmrl_ray.training.serve.serve"),
        patched("mmrl_ray.evaluation.evaluate.evaluate_target"),
        patched("mmrl_ray.evaluation.explain.explain"),
        patched("mmrl_ray.evaluation.captioning.caption_images", return_value=[["said"]]),
    ]
    patched("mmrl_ray.evaluation.evaluate.present")
    commands = [("serve", target), ("evaluate", target), ("explain", target, "a.png")]
    for command in [*commands, ("caption", "--model", target, "a.png")]:
        done = mmrl(*command)
        if hint is None:  # an owner and a name, as models of the hub have
            assert done.exit_code == 0, done.stderr
            continue
        assert (done.exit_code, done.stderr) == (2, f"error: no such run folder: {target}{hint}\n")
    assert [mock.call_count for mock in begun] == [1 if hint is None else 0] * 4


def test_a_run_to_caption_with_is_a_run(patched: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place(tmp_path / "runs" / "again")
    place(tmp_path / "base", config=False)
    caption = patched("mmrl_ray.evaluation.captioning.caption_images")
    for run, told in [("owner/agin", "there is no folder owner"), ("agian", "did you mean runs/again?")]:
        assert told in mmrl("caption", "--run", run, "a.png").stderr
    assert "for a model write --model base" in mmrl("caption", "--run", "base", "a.png").stderr
    caption.assert_not_called()


def test_caption_needs_one_source(patched: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place(tmp_path / "r")
    caption = patched("mmrl_ray.api.inference.caption", return_value=[["said"], ["told"]])
    for sources in ((), ("--run", "r", "--model", "m")):
        done = mmrl("caption", *sources, "a.png")
        assert (done.exit_code, done.stderr) == (2, "error: give --run RUN, --model MODEL or --url URL\n")
    done = mmrl("caption", "--run", "r", "a.png", "b.png")
    assert (done.exit_code, done.stdout) == (0, "a.png: said\nb.png: told\n")
    plain = {"prompt": None, "n": 1, "temperature": None, "checkpoint": None}
    caption.assert_called_once_with("r", [Path("a.png"), Path("b.png")], beta=None, **plain)
    caption.return_value = [["said"]]
    assert mmrl("caption", "--run", "r", "--beta", "0", "a.png").exit_code == 0
    caption.assert_called_with("r", [Path("a.png")], beta=0.0, **plain)
    assert (
        mmrl("caption", "--run", "r", "-n", "3", "--temperature", "0.5", "--checkpoint", "best", "a.png").exit_code == 0
    )
    caption.assert_called_with(
        "r", [Path("a.png")], beta=None, **{**plain, "n": 3, "temperature": 0.5, "checkpoint": "best"}
    )
    assert mmrl("caption", "--run", "r", "--temperature", "-1", "a.png").exit_code == 2
    done = mmrl("caption", "--url", "http://gate:8000", "--beta", "2", "a.png")
    assert done.exit_code == 2
    assert "has the beta of its own run" in done.output
