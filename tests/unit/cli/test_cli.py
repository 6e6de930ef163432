"""The command line: what it calls, what it says when something is wrong, and its exit codes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

import mmrl_ray
from mmrl_ray.cli import app
from mmrl_ray.cli.program import guarded
from mmrl_ray.config import Config
from mmrl_ray.errors import ConfigError, Interrupted, MMRLError, RolloutError, RunError
from tests.unit.cli.program import Patch, mmrl

# -- nothing heavy, in a process of its own ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["serve", "--help"],
        ["config", "schema"],
        ["config", "show", "CONFIG"],
        ["config", "show", "/nope"],
    ],
)
def test_answers_without_importing_anything_heavy(arguments: list[str], config: Path) -> None:
    code = (
        "import sys\nfrom mmrl_ray.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [m for m in ('torch', 'ray', 'transformers', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    argv = [str(config) if a == "CONFIG" else a for a in arguments]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.endswith("HEAVY []\n")


def test_the_installed_program_exits_2_with_one_plain_line(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("mmrl")
    done = subprocess.run(
        [program, "train", tmp_path / "no.yaml"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/no.yaml: no such config\n"


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["config", "show", "nowhere.yaml"], 2)])
def test_what_crashes_when_the_interpreter_ends_costs_no_exit_code(arguments: list[str], code: int) -> None:
    program = (
        "import os, sys, mmrl_ray.cli as cli\n"
        "class Late:\n"
        "    def __del__(self): os.abort()\n"
        "late = Late()\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout + done.stderr


def test_the_version_is_told() -> None:
    assert mmrl("--version").stdout == f"mmrl {mmrl_ray.__version__}\n"
    assert "Usage: " in mmrl().output


def test_an_example_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mmrl("init").stdout == "quickstart.yaml\n"
    assert mmrl("config", "show", "quickstart.yaml").exit_code == 0
    again = mmrl("init", "quickstart")
    assert (again.exit_code, again.stderr) == (
        2,
        "error: quickstart.yaml is there already: name another file with --out\n",
    )
    assert mmrl("init", "serve", "--out", "mine.yaml").exit_code == 0
    assert (tmp_path / "mine.yaml").read_text().startswith("# mmrl serve mine.yaml")
    assert mmrl("init", "quikstart").stderr.endswith("did you mean quickstart?\n")
    assert "reward-model" in mmrl("init", "--list").stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "quickstart.yaml"]


def test_the_package_holds_the_examples(tmp_path: Path) -> None:
    root = Path(mmrl_ray.__file__).parents[1]
    build = ["-q", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path]
    code = "from setuptools import setup; setup()"
    subprocess.run([sys.executable, "-c", code, *build], cwd=root, timeout=60, check=True, capture_output=True)
    built = {file.name for file in (tmp_path / "mmrl_ray" / "examples").iterdir()}
    assert built == {file.name for file in (root / "configs").iterdir()} > {"quickstart.yaml", "serve.yaml"}


# -- configs -----------------------------------------------------------------------------------------------------------


def test_config_schema_is_json_schema() -> None:
    schema = json.loads(mmrl("config", "schema").stdout)
    assert schema["title"] == "Config"


def test_config_show_prints_the_resolved_config(config: Path) -> None:
    done = mmrl("config", "show", config, "--set", "learner.lr=3e-5", "--set", "algorithm=dapo")
    assert done.exit_code == 0
    shown = yaml.safe_load(done.stdout)
    assert shown["learner"]["lr"] == 3e-5
    assert shown["learner"]["clip_high"] == 0.28
    assert Config.model_validate(shown)


@pytest.mark.parametrize(
    ("replace", "by", "expected"),
    [
        ("steps: 10", "stepz: 10", "c.yaml:5: learner.stepz: unknown key (value 10); did you mean `steps`?"),
        ("steps: 10", "steps: ten", 'c.yaml:5: learner.steps: must be a whole number, not "ten"'),
        ("learner: {steps: 10", "learner: [steps: 10", "c.yaml:5:"),
    ],
)
def test_a_wrong_config_is_told_and_exits_2(config: Path, replace: str, by: str, expected: str) -> None:
    config.write_text(config.read_text().replace(replace, by))
    for command in (("train",), ("sft",), ("config", "show")):
        done = mmrl(*command, config)
        assert done.exit_code == 2
        assert done.stdout == ""
        assert expected in done.stderr
        assert all(line.startswith("error: ") for line in done.stderr.splitlines())
        assert "Traceback" not in done.stderr


def test_several_problems_are_a_line_each(config: Path) -> None:
    done = mmrl("train", config, "--set", "learner.lr=x", "--set", "rollout.workrs=2", "--set", "nonsense")
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: --set ") for line in lines)


# -- train, sft --------------------------------------------------------------------------------------------------------


def test_resuming_what_is_not_there(tmp_path: Path) -> None:
    done = mmrl("train", "--resume", tmp_path / "runs" / "gone")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "gone" in line


def test_a_run_folder_without_resume_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    done = mmrl("train", tmp_path)
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        f"error: {tmp_path}: is a folder, not a config file; it is a run folder: pass --resume to go on with it"
    ]


def test_sft_without_its_section(config: Path) -> None:
    config.write_text(config.read_text().replace("sft: {steps: 20}\n", ""))
    done = mmrl("sft", config)
    assert done.exit_code == 2
    assert done.stderr == f"error: {config}: has no `sft:` section: add one with `steps:`\n"


# -- failures ----------------------------------------------------------------------------------------------------------


class RayTaskError(Exception):
    """As Ray raises an actor's error: the text is the remote traceback, the error itself is the cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback (most recent call last):\n  a\n  b")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (ConfigError("a is wrong\nb is wrong"), 2, "error: a is wrong\nerror: b is wrong\n"),
        (RunError("run folder x exists: add --resume"), 1, "error: run folder x exists: add --resume\n"),
        (RayTaskError(RolloutError("no worker is left")), 1, "error: no worker is left\n"),
        (RayTaskError(Interrupted("stopped after step 3")), 130, "error: stopped after step 3\n"),
        (Interrupted("stopped after step 3"), 130, "error: stopped after step 3\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/demo/metrics.jsonl"),
            1,
            "error: the disk is full while writing /runs/demo/metrics.jsonl: make room, then go on with --resume\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_expected_failure_is_one_line_and_a_code(
    patched: Patch, error: BaseException, code: int, expected: str
) -> None:
    patched("mmrl_ray.report.page.write_report", side_effect=error)
    done = mmrl("report", "runs/demo")
    assert (done.exit_code, done.stderr) == (code, expected)
    told = mmrl("report", "runs/demo", "--debug")
    assert told.exit_code == code
    assert "Traceback (most recent call last)" in told.stderr
    assert told.stderr.endswith(expected)


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), FileNotFoundError(errno.ENOENT, "no", "x")])
def test_a_bug_keeps_its_traceback(patched: Patch, error: Exception) -> None:
    patched("mmrl_ray.report.page.write_report", side_effect=error)
    done = mmrl("report", "runs/demo")
    assert done.exception is error
    assert done.exit_code == 1


# -- the other commands ------------------------------------------------------------------------------------------------


def test_report_says_where_it_wrote(patched: Patch) -> None:
    patched("mmrl_ray.report.page.write_report", return_value="runs/demo/report.html")
    assert mmrl("report", "runs/demo").stdout == "runs/demo/report.html\n"


def test_scenes_are_written_once(tmp_path: Path) -> None:
    arguments = ("data", "scenes", tmp_path / "s", "--train", 6, "--eval", 2, "--image-size", 32)
    assert mmrl(*arguments).stdout == f"{tmp_path}/s: 6 training and 2 held-out images\n"
    assert mmrl(*arguments).stdout.endswith("there already\n")
    done = mmrl(*arguments, "--seed", 1)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")


def _picture(path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 0, 0)).save(path)


def test_import_jsonl_tells_what_it_left_out(tmp_path: Path) -> None:
    _picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_text('{"not": "a picture"}')
    lines = [{"image": f"{name}.png", "captions": ["red", "a red square"]} for name in "ab"]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    done = mmrl("data", "import", "jsonl", tmp_path / "d.jsonl", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{tmp_path}/out: 1 images, 2 references\n"
    assert "left out: " in done.stderr
    again = mmrl("data", "import", "jsonl", tmp_path / "d.jsonl", "--out", tmp_path / "o2", "--max-quarantined", 0)
    assert again.exit_code == 1
    assert not (tmp_path / "o2").exists()


def test_import_coco(tmp_path: Path) -> None:
    _picture(tmp_path / "images" / "1.png")
    captions = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [{"id": 5, "image_id": 1, "caption": "A red square."}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    source = ("--images", tmp_path / "images", "--out", tmp_path / "out")
    done = mmrl("data", "import", "coco", *source, "--annotations", tmp_path / "captions.json")
    assert done.stdout == f"{tmp_path}/out: 1 images, 1 references\n"
    neither = mmrl("data", "import", "coco", *source)
    assert neither.exit_code == 2
    assert neither.stderr == "error: give either --annotations captions_*.json or --karpathy dataset_coco.json\n"


def test_an_unknown_command_gets_a_suggestion() -> None:
    done = mmrl("trian")
    assert done.exit_code == 2
    assert "Did you mean 'train'?" in done.stderr


def test_every_command_has_help_and_debug() -> None:
    def walk(group: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        found = [(*path, c.name) for c in group.registered_commands]
        for inner in group.registered_groups:
            found += walk(inner.typer_instance, (*path, inner.typer_instance.info.name))
        return found

    commands = walk(app, ())
    assert len(commands) == 37
    for command in commands:
        text = mmrl(*command, "--help").stdout
        assert "--debug" in text
        assert len(text.split("\n\n")[1].strip()) > 10


def test_all_errors_but_the_named_ones_exit_1() -> None:
    for kind in MMRLError.__subclasses__():
        with pytest.raises(Exception) as raised:  # noqa: PT011  # typer's Exit, whose class is an internal of its
            guarded(Mock(side_effect=kind("x")), debug=False)
        assert raised.value.exit_code == {ConfigError: 2, Interrupted: 130}.get(kind, 1)  # type: ignore[attr-defined]
