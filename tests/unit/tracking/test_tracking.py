"""Trackers that raise, hang, die or are out of reach; a user's own class; what is said before a run; secrets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmrl_ray.config.load import parse_config
from mmrl_ray.errors import ConfigError, RunError, TrackerError
from mmrl_ray.jobs.control import RunControl, render
from mmrl_ray.report.facts import happened
from mmrl_ray.run_records.control_files import write_status
from mmrl_ray.tracking import registry
from mmrl_ray.tracking.base import About
from mmrl_ray.tracking.places import places_of
from mmrl_ray.tracking.process import redact
from mmrl_ray.tracking.tail import StepTail
from tests.unit.rollouts.test_controller import until
from tests.unit.tracking.told import DIARY, REWARDS, Folder

SECRET = "a-key-of-mine-4711"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIARY_API_KEY", SECRET)


def diary(root: Path, **own: Any) -> Folder:
    told = json.dumps({"file": str(root / "diary"), **own})
    return Folder(root, f"tracking.to=['{DIARY}']", f"tracking.own={told}", "tracking.timeout_s=10")


def entries(root: Path, kind: str = "") -> list[list[Any]]:
    file = root / "diary"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line[1:] if kind else line for line in lines if not kind or line[0] == kind]


def steps(root: Path) -> list[int]:
    return [step for step, figures in entries(root, "metrics") if "reward/mean" in figures]


def test_a_class_of_the_users_hears_everything_in_order(tmp_path: Path) -> None:
    folder = diary(tmp_path)
    with folder.tracked() as tracking:
        folder.steps(0, 3)
        folder.evaluate(2)
        folder.sample(2)
        folder.ends()
        tracking.finish(failed=False)
    figures = {"policy_version": 1.0, "reward/mean": 0.0, "shared_prefix": 1.0, "named [x]": 1.5}
    row = {"sample": "s-9", "kind": "fixed", "best": "good", "best reward": 0.75, "worst": "poor", "worst reward": 0.25}
    caption = {"sample": "s-1", "caption": "a <b> caption", "reward": 0.5, "reward/caption": 2.0, "cider_d": 0.125}
    summary = {"status": "finished", "steps": 3, "best_step": 2, "before/reward": 0.25, "after/reward": 0.5}
    heard = entries(tmp_path)
    assert heard[0] == ["open", None, 6]
    assert heard[1] == ["metrics", 0, figures]
    assert [line[:2] for line in heard[2:4]] == [["metrics", 1], ["metrics", 2]]
    assert heard[4:] == [
        ["metrics", 2, {"eval/cider_d": 0.125}],
        ["table", 2, "eval/captions", [{**caption, "references": "a | reference"}], [True]],
        ["table", 2, "samples", [{**row, "references": "this"}], [True]],
        *(["histogram", 2, f"samples/{name}", values] for name, values in REWARDS.items()),
        ["summary", summary],
        ["artifact", "adapter", "model", ["adapter_config.json"]],
        ["artifact", "report", "report", "report.html"],
        ["close", False],
    ]
    assert folder.notes.lines == [f"tracking: {DIARY}: a diary at diary"]


@pytest.mark.parametrize("how", ["raises", "hangs", "dies", "forks"])
def test_one_that_fails_is_an_event_and_the_rest_is_told(tmp_path: Path, how: str) -> None:
    folder = diary(tmp_path, at=2, how=how)
    folder.cfg = folder.cfg.model_copy(update={"tracking": folder.cfg.tracking.model_copy(update={"timeout_s": 1.0})})
    with folder.tracked() as tracking:
        folder.steps(0, 5)
        tracking.finish(failed=False)
    events = folder.events()
    if how == "raises":
        assert steps(tmp_path) == [0, 1, 3, 4], "what it fails on again and again is left out"
        assert [kind for kind, _ in events] == ["tracker_failed", "tracker_left_out", "tracker_back"]
        assert "ValueError: no such step, by key ***" in events[0][1]
        assert "own_trackers.py:" in events[0][1], "where it was raised"
    elif how == "forks":
        assert sorted(set(steps(tmp_path))) == [0, 1, 2, 3, 4], "the fork may have written one more, and is not heard"
        assert events == []
    else:
        assert steps(tmp_path) == [0, 1, 2, 3, 4], "a new process is told what the lost one did not answer for"
        assert entries(tmp_path, "open") == [[None, 6], ["diary-7", 6]], "of the same id"
        assert [kind for kind, _ in events] == ["tracker_failed", "tracker_back"]
        assert ("gave no answer within 1 s" if how == "hangs" else "exit status 3") in events[0][1]
    assert entries(tmp_path)[-1] == ["close", False]
    rows = happened(folder.run.read_lines("events.jsonl"), [], [])
    assert [row["what"] for row in rows] == (["failures of trackers"] if events else [])
    for path in (tmp_path / "told").rglob("*"):
        assert not path.is_file() or SECRET not in path.read_text(errors="replace"), path
    assert SECRET not in "".join(folder.notes.lines)
    if how == "raises":
        assert (
            "the key is ***" in (tmp_path / "told" / "tracking").joinpath(f"{DIARY.replace(':', '-')}.log").read_text()
        )


def test_one_that_is_out_of_reach_for_a_while_catches_up(tmp_path: Path) -> None:
    folder = diary(tmp_path, broken=str(tmp_path / "broken"))
    with folder.tracked() as tracking:
        folder.steps(0, 2)
        until(lambda: steps(tmp_path) == [0, 1])
        (tmp_path / "broken").touch()
        folder.steps(2, 5)
        until(lambda: len(folder.events()) == 1)
        (tmp_path / "broken").unlink()
        until(lambda: steps(tmp_path) == [0, 1, 2, 3, 4])
        tracking.finish(failed=True)
    assert [kind for kind, _ in folder.events()] == ["tracker_failed", "tracker_back"]
    assert entries(tmp_path)[-1] == ["close", True]


def test_a_run_does_not_wait_for_ever_for_one_that_is_behind(tmp_path: Path) -> None:
    folder = diary(tmp_path, broken=str(tmp_path / "broken"))
    with folder.tracked() as tracking:
        (tmp_path / "broken").touch()
        folder.steps(0, 5)
        until(folder.events)
        tracking.finish(failed=False, within_s=0.5)
    assert folder.events() == [
        ("tracker_failed", "the diary is out of reach: find it"),
        ("tracker_behind", "the diary is out of reach: find it; it has 0 steps of the run"),
    ]

    # A new run is not begun with it; one that goes on is.
    with (
        pytest.raises(TrackerError, match="out of reach"),
        diary(tmp_path / "new", broken=str(tmp_path / "broken")).tracked(),
    ):
        pass
    again = diary(tmp_path, broken=str(tmp_path / "broken"))
    with again.tracked() as tracking:
        assert "out of reach" in again.notes.lines[0]
        (tmp_path / "broken").unlink()
        tracking.finish(failed=False)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


# -- before a run ------------------------------------------------------------------------------------------------------

BASE = "run: {name: r, root: R}\nmodel: {path: m}\ndata: {train: t}\nlearner: {steps: 1}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[neptune]", "'neptune' is no tracker; there are tensorboard, wandb, mlflow, trackio, and module:Class of"),
        ("[tensorbord]", "did you mean tensorboard?"),
        ("{to: [mlflow], mlflow: {uri: 'https://me:hunter22@host'}}", "mlflow.uri: holds a password"),
        ("{to: ['a:B'], own: {api_key: hunter22}}", "looks like a secret"),
        ("{to: [wandb], own: {file: x}}", "trackers of your own alone"),
    ],
)
def test_what_a_config_may_not_say(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f"{BASE}tracking: {text}\n", "c.yaml")
    assert told in str(caught.value)
    assert str(caught.value).startswith("c.yaml:5: tracking")
    assert "hunter22" not in str(caught.value)


def test_the_short_form_takes_further_keys() -> None:
    cfg = parse_config(f"{BASE}tracking: [tensorboard, wandb]\n", "c.yaml", ["tracking.samples_every=5"])
    assert (cfg.tracking.to, cfg.tracking.samples_every) == (["tensorboard", "wandb"], 5)
    assert parse_config(BASE, "c.yaml").tracking.to == ["tensorboard"]
    assert parse_config(BASE, "c.yaml", ["tracking=[]"]).tracking.to == []


def test_what_is_wrong_with_a_tracker_is_said_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = "tests.unit.tracking.own_trackers"
    names = ["tensorboard", f"{here}:Reticent", f"{here}:NoTracker", f"{here}:Absent", "no_such_module:X"]
    cfg = parse_config(BASE.replace("R}", f"{tmp_path}}}"), "c.yaml", [f"tracking={json.dumps(names)}"])
    board, reticent, other, absent, module = places_of(cfg)
    assert (board.where, board.error) == (str(tmp_path / "r" / "tb"), None)
    assert reticent.error is None
    assert "has no class 'NoTracker' that is an mmrl_ray.tracking.base.Tracker" in other.told
    assert "has no class 'Absent'" in absent.told
    assert "no_such_module:X cannot be imported" in module.told
    assert list(tmp_path.iterdir()) == [], "nothing is written"
    assert (
        "nowhere" in places_of(cfg.model_copy(update={"run": cfg.run.model_copy(update={"root": "s3://x/y"})}))[0].told
    )

    absent_library = registry.Known("mmrl_ray.tracking.wandb:Wandb", ("no_such_library",), "wandb")
    monkeypatch.setitem(registry.KNOWN, "wandb", absent_library)
    with pytest.raises(TrackerError, match=r"no_such_library is not installed: pip install 'mmrl_ray\[wandb\]'"):
        registry.make("wandb", About("r", "p", {}, None), {})


def test_wandb_without_a_key_or_a_network_suggests_to_stay_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mmrl_ray[wandb]'")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    cfg = parse_config(BASE.replace("R}", f"{tmp_path}}}"), "c.yaml", ["tracking=wandb"])
    (place,) = places_of(cfg)
    assert "has no key for http://127.0.0.1:9: `wandb login`, or set WANDB_API_KEY" in place.told
    assert "WANDB_MODE=offline" in place.told
    monkeypatch.setenv("WANDB_MODE", "offline")
    (place,) = places_of(cfg)
    assert (place.error, place.where) == (None, f"offline, in {tmp_path}/r/wandb")


# -- parts -------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_rewritten_is_read_on_where_it_differs(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    tail = StepTail(folder.run, "metrics.jsonl")
    assert tail.read() == []
    folder.steps(0, 4)
    assert [(line["step"], is_other) for line, is_other in tail.read()] == [(step, False) for step in range(4)]
    with (tmp_path / "told" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    assert tail.read() == [], "a line that is being written"
    with (tmp_path / "told" / "metrics.jsonl").open("a") as file:
        file.write("}\n")
    assert [line for line, _ in tail.read()] == [{"step": 4}]
    folder.back_to(2)
    assert tail.read() == []
    folder.steps(2, 6, lambda step: step + 0.5)
    expected = [(2, True), (3, False), (4, False), (5, False)]
    assert [(line["step"], is_other) for line, is_other in tail.read()] == expected
    (tmp_path / "told" / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(RunError, match="a line that is none"):
        tail.read()


def test_keys_and_passwords_are_taken_out() -> None:
    environment = {"WANDB_API_KEY": "abcdef0123", "HF_TOKEN": "hf_x", "PLAIN": "visible"}
    text = (
        "key abcdef0123 at postgresql://me:pw@host/db?token=t1&x=2 Authorization: Bearer eyJx hf_abcdefghijklmnopqrst"
    )
    said = redact(f"{text} visible hf_x", environment)
    assert said == "key *** at postgresql://***@host/db?token=***&x=2 Authorization: Bearer *** *** visible hf_x"


def test_status_shows_the_newest_captions(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    write_status(folder.run, "starting", 60.0)
    control = RunControl(folder.run)
    assert "samples" not in control.shown()
    folder.sample(20)
    folder.sample(40)
    shown = control.shown()
    assert shown["samples"]["step"] == 40
    text = io.StringIO()
    Console(file=text, width=120).print(render(shown))
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["fixed", "s-9", "0.750", "good"] in lines
    assert ["0.250", "poor"] in lines
    assert "after step 40" in text.getvalue()
