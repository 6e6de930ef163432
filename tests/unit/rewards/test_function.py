"""A user's own function as a part: what it is given, what it may return, and how it fails."""

import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.load import parse_config
from mmrl_ray.config.paths import with_absolute_paths
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, RewardError
from mmrl_ray.experience.carriers import RewardBreakdown, RewardFailure
from mmrl_ray.experience.plan import build_step_plan
from mmrl_ray.rewards import function
from mmrl_ray.rewards.base import RewardFn, score_with_retry
from mmrl_ray.rewards.build import NOTHING, build_reward, check_reward
from mmrl_ray.rewards.function import FunctionReward
from tests.unit.experience.factories import scored

SAMPLES = [Sample(f"s{i}", (b"png", b"two"), "Say it.", ("a red square", "red"), {"n": i}) for i in range(2)]
CAPTIONS = ["a red square", "blue"]
MODULE = """
import os, pickle, re, signal, sys, time
from decimal import Decimal
from fractions import Fraction
import numpy as np

CALLS = 0

def words(captions, states, *, scale=1.0):
    return [scale * len(caption.split()) for caption in captions]

def seen(captions, states, *, file):
    with open(file, "wb") as stream:
        pickle.dump((captions, states), stream)
    return [0.0] * len(captions)

def odd(captions, states, *, returned):
    print("asked for", returned)
    return {"nan": [float("nan"), 1], "few": [1.0], "text": "12", "none": None, "hole": [None, 1], "words": ["1", 1],
            "bools": [1, True], "tuple": (1.0, 1.0), "array": np.ones(2), "float32": np.float32([1, 1]),
            "scalars": [np.bool_(True), np.array(1.0)], "decimals": [Decimal("1.0"), Fraction(1)]}[returned]

def picky(captions, states):
    if "blue" in captions:
        raise KeyError("no blue here")
    return [0.5] * len(captions)

def one_in_four(captions, states):
    return [(1.0, 0.0, None, 0.0)[i % 4] for i in range(len(captions))]

def awkward(captions, states, *, how):
    global CALLS
    CALLS += 1
    if any("blue" in caption for caption in captions):
        if how == "regex":
            re.fullmatch("(a+)+$", "a" * 60 + "b")
        elif how == "sleep":
            time.sleep(600)
        else:
            if how == "crash beside a child" and os.fork() == 0:
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGSEGV)
    return [float(CALLS)] * len(captions)

def twice(captions, states):
    global CALLS
    CALLS += 1
    os.fork()
    return [float(CALLS)] * len(captions)

class OutOfTime(BaseException):  # as some libraries say it
    pass

def times_out(captions, states):
    raise OutOfTime("half a character: \\ud800")

def pid(captions, states):
    return [float(os.getpid())] * len(captions)

def waits(captions, states, *, file):
    with open(file, "w") as stream:
        stream.write(str(os.getpid()))
    re.fullmatch("(a+)+$", "a" * 60 + "b")

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('half written')")
    monkeypatch.syspath_prepend(str(tmp_path))


def section(path: str, state: str = "text", **kwargs: Any) -> RewardSection:
    part = {"kind": "function", "path": path, "state": state, "kwargs": kwargs}
    return RewardSection.model_validate({"parts": {"mine": part}, "weights": {"mine": 2.0}})


def build(path: str, state: str = "text", **kwargs: Any) -> RewardFn:
    return build_reward(section(path, state, **kwargs), NOTHING)


@pytest.mark.parametrize(
    ("state", "given"),
    [
        ("image", [(b"png", b"two")] * 2),
        ("text", ["Say it."] * 2),
        ("reference", [("a red square", "red")] * 2),
        ("sample", SAMPLES),
    ],
)
def test_it_gets_the_state_of_its_modality_and_its_arguments(tmp_path: Path, state: str, given: list) -> None:
    file = tmp_path / "seen.pickle"
    build("own_rewards:seen", state, file=str(file)).score_batch(SAMPLES, CAPTIONS)
    assert pickle.loads(file.read_bytes()) == (CAPTIONS, given)
    scores = build("own_rewards:words", state, scale=0.5).score_batch(SAMPLES, CAPTIONS)
    assert [s.total for s in scores] == [3.0, 1.0]
    assert scores[0].parts == {"mine": 1.5, "mine/value": 1.5}
    assert section("own_rewards:words", state).needs_images == (state in ("image", "sample"))


def test_it_travels_by_its_path() -> None:
    there = pickle.dumps(build("own_rewards:words"))
    assert b"len(caption" not in there
    assert pickle.loads(there).score_batch(SAMPLES, CAPTIONS)[0].total == 6.0


def test_modules_of_the_working_directory_or_of_a_named_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, factor in (("here", 1), ("there", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "place_rewards.py").write_text("from place_helper import count\n")
        (tmp_path / name / "place_helper.py").write_text(
            f"def count(captions, states):\n    return [{factor}.0 * len(c) for c in captions]\n"
        )
    monkeypatch.chdir(tmp_path / "here")
    assert build("place_rewards:count").score_batch(SAMPLES, ["abc", "d"])[0].total == 6.0
    relative = section("place_rewards:count").model_copy(update={"code": "../there"})
    assert build_reward(relative, NOTHING).score_batch(SAMPLES, ["abc", "d"])[0].total == 60.0

    text = "run: {name: a}\nmodel: {path: o/m}\ndata: {train: d}\nlearner: {steps: 1}\n"
    cfg = parse_config(text, "test").model_copy(update={"reward": section("place_rewards:count")})
    kept = with_absolute_paths(cfg).reward
    assert kept.code == str(tmp_path / "here")
    there = pickle.dumps(build_reward(kept, NOTHING))
    monkeypatch.chdir("/")  # as a worker's, which is somewhere else
    assert pickle.loads(there).score_batch(SAMPLES, ["abc", "d"])[0].total == 6.0
    with pytest.raises(ConfigError, match=r"looked for in reward\.code, by default the working directory, here /"):
        build("place_rewards:count")


def test_an_exception_shows_its_traceback_at_once_and_once(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reward = build("own_rewards:picky")
    capfd.readouterr()
    for _ in range(2):
        with pytest.raises(RewardError, match="no blue here"):
            reward.score_batch(SAMPLES, CAPTIONS)
    lines = capfd.readouterr().err.splitlines()
    line = 1 + MODULE.splitlines().index('        raise KeyError("no blue here")')
    assert lines == [
        f"[reward own_rewards:picky] {text}"
        for text in (
            "Traceback (most recent call last):",
            f'  File "{tmp_path}/own_rewards.py", line {line}, in picky',
            '    raise KeyError("no blue here")',
            "KeyError: 'no blue here'",
        )
    ]
    with pytest.raises(ConfigError, match="half written"):
        build("broken_rewards:f")
    assert f'[reward broken_rewards:f]   File "{tmp_path}/broken_rewards.py", line 1' in capfd.readouterr().err


@pytest.mark.parametrize("returned", ["bools", "tuple", "array", "float32", "scalars", "decimals"])
def test_it_may_return_any_sequence_of_numbers(returned: str, capfd: pytest.CaptureFixture[str]) -> None:
    scores = build("own_rewards:odd", returned=returned).score_batch(SAMPLES, CAPTIONS)
    assert [(type(s.total), s.total) for s in scores] == [(float, 2.0)] * 2
    printed = capfd.readouterr()  # of the other process
    assert printed.err == f"[reward own_rewards:odd] asked for {returned}\n"
    assert printed.out == ""  # where captions and figures of a command go


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("few", "returned 1 numbers for 2 captions"),
        ("text", "returned str; return a list"),
        ("none", "returned NoneType"),
    ],
)
def test_what_it_must_not_return_names_part_and_path(returned: str, said: str) -> None:
    with pytest.raises(RewardError, match=rf"reward part 'mine' failed: own_rewards:odd {said}"):
        build("own_rewards:odd", returned=returned).score_batch(SAMPLES, CAPTIONS)


@pytest.mark.parametrize(("returned", "value"), [("nan", "nan"), ("hole", "None"), ("words", "'1'")])
def test_a_caption_it_has_no_number_for_fails_alone(returned: str, value: str) -> None:
    failed, scored = build("own_rewards:odd", returned=returned).score_batch(SAMPLES, CAPTIONS)
    said = f"reward part 'mine' failed: own_rewards:odd returned {value} for caption 0, which is no finite number"
    assert failed == RewardFailure(said)
    assert scored.total == 2.0


@pytest.mark.parametrize(
    ("path", "kwargs", "said"),
    [
        ("no_such_module_here:f", {}, r"cannot be imported \(ModuleNotFoundError"),
        ("broken_rewards:f", {}, r"cannot be imported \(RuntimeError: half written .*broken_rewards\.py:1\)\)"),
        ("own_rewards:missing", {}, "has no function 'missing'"),
        ("own_rewards:NUMBER", {}, "has no function 'NUMBER'"),
        ("own_rewards:words", {"scales": 1}, "cannot be called .*'scales'"),
        ("own_rewards:odd", {}, "cannot be called .*returned"),
    ],
)
def test_what_cannot_work_is_found_at_start(path: str, kwargs: dict, said: str) -> None:
    for make in (check_reward, lambda cfg: build_reward(cfg, NOTHING)):
        with pytest.raises(ConfigError, match=rf"reward\.parts\.mine: .*{said}"):
            make(section(path, **kwargs))


@pytest.mark.parametrize("path", ["json", "json:", ":loads", "a b:c", "os.path;x:y", "../evil:f"])
def test_a_path_is_module_and_function(path: str) -> None:
    with pytest.raises(ValueError, match="must be `module:function`"):
        section(path)


def test_arguments_are_what_json_can_hold() -> None:
    with pytest.raises(ValueError, match="what JSON can"):
        section("json:loads", limit=math.inf)


def test_a_part_that_raises_masks_its_own_caption(tmp_path: Path) -> None:
    first, second = score_with_retry(build("own_rewards:picky"), SAMPLES, CAPTIONS, timeout_s=30.0, retries=0)
    assert not isinstance(first, RewardFailure)
    assert first.total == 1.0
    assert isinstance(second, RewardFailure)
    line = 1 + MODULE[: MODULE.index("raise KeyError")].count("\n")
    where = f"({tmp_path}/own_rewards.py:{line})"
    assert second.reason == f"reward part 'mine' failed: KeyError: 'no blue here' {where}"[:300]


FOUR = ["red", "a blue one", "green", "grey"]


@pytest.mark.parametrize("how", ["regex", "sleep", "crash", "crash beside a child"])
def test_only_what_it_hangs_on_or_dies_of_is_masked(how: str) -> None:
    """A regular expression holds the interpreter, so that no thread of its process could end it."""
    threads = set(threading.enumerate())
    reward = build("own_rewards:awkward", how=how)
    samples = [SAMPLES[0]] * 4
    scores = score_with_retry(reward, samples, FOUR, timeout_s=1.0, retries=2)
    assert [isinstance(score, RewardFailure) for score in scores] == [False, True, False, False]
    assert ("SIGSEGV" if how.startswith("crash") else "gave no answer within") in scores[1].reason
    # Another process has taken its place, and keeps what it knows.
    first, second = (reward.score_batch(SAMPLES[:1], ["red"])[0].total for _ in range(2))
    assert second == first + 2.0
    assert set(threading.enumerate()) == threads


def test_one_that_forks_and_returns_twice_answers_once() -> None:
    reward = build("own_rewards:twice")
    assert [reward.score_batch(SAMPLES, CAPTIONS)[0].total for _ in range(3)] == [2.0, 4.0, 6.0]


def test_whatever_it_raises_its_process_goes_on_and_files_can_hold_the_reason() -> None:
    with pytest.raises(RewardError, match=r"OutOfTime: half a character: \\ud800 \("):
        build("own_rewards:times_out").score_batch(SAMPLES, CAPTIONS)


def test_all_that_hang_leave_the_call_within_its_time() -> None:
    reward = FunctionReward("own_rewards:awkward", "text", {"how": "sleep"})
    scores = reward.score_within([SAMPLES[0]] * 30, ["blue"] * 29 + ["red"], timeout_s=0.2)
    assert all(isinstance(score, RewardFailure) for score in scores)


def test_its_process_ends_with_the_reward(tmp_path: Path) -> None:
    reward = FunctionReward("own_rewards:pid", "text", {})
    (score,) = reward.score_batch(SAMPLES[:1], ["x"])
    pid = int(score.total)
    assert psutil.pid_exists(pid)
    assert reward.score_batch(SAMPLES[:1], ["x"])[0].total == pid
    del reward
    gone(pid)


def test_its_process_ends_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    """By SIGKILL, while the function holds the interpreter."""
    file = tmp_path / "pid"
    script = (
        "from mmrl_ray.rewards.function import FunctionReward; from mmrl_ray.data.samples import Sample; "
        f"reward = FunctionReward('own_rewards:waits', 'text', {{'file': {str(file)!r}}}); "
        "reward.score_batch([Sample('s', (), '')], ['x'])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    owner = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        wait_until(lambda: file.exists() and file.read_text() != "")
        pid = int(file.read_text())
        watcher = psutil.Process(pid).ppid()
    finally:
        owner.kill()
        owner.wait()
    gone(pid)
    gone(watcher)


def gone(pid: int) -> None:
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_import_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_rewards.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(function, "START_TIMEOUT_S", 0.5)
    with pytest.raises(ConfigError, match=r"slow_rewards:f cannot be imported: .* within 0\.5 s"):
        FunctionReward("slow_rewards:f", "text", {})


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [("rloo", [1.0, -0.5, 0.0, -0.5]), ("grpo", [1.1547005, -0.5773503, 0.0, -0.5773503])],
)
def test_one_answer_in_four_that_fails_masks_one_caption(algorithm: str, expected: list[float]) -> None:
    """From the part to the step's plan, also where the part beside it, of weight 0, fails altogether."""
    parts = {
        "mine": {"kind": "function", "path": "own_rewards:one_in_four", "state": "text"},
        "beside": {"kind": "function", "path": "own_rewards:odd", "state": "text", "kwargs": {"returned": "none"}},
    }
    cfg = RewardSection.model_validate({"parts": parts, "weights": {"mine": 1.0, "beside": 0.0}})
    scores = score_with_retry(build_reward(cfg, NOTHING), [SAMPLES[0]] * 8, ["x"] * 8, timeout_s=30, retries=2)
    groups = [replace(scored(0, i, lengths=(2, 3, 9, 4)), rewards=tuple(scores[4 * i : 4 * i + 4])) for i in (0, 1)]
    preset = {"rloo": {"advantage": "leave_one_out"}, "grpo": {"advantage": "group", "advantage_std": True}}
    learner = LearnerSection(steps=1, aggregation="token_mean", **preset[algorithm])
    plan = build_step_plan(0, groups, learner=learner, max_new_tokens=9, world_size=1)
    for group in plan.groups:
        assert group.advantages == pytest.approx(expected, rel=1e-6)
        assert group.scales == (1.0, 1.0, 0.0, 1.0)
        assert group.rewards == (1.0, 0.0, None, 0.0)
    assert plan.denominator == 2 * (2 + 3 + 4)
    figures = ("masked", "masked_captions", "reward/masked", "reward_missing/beside", "reward/mean")
    assert [plan.metrics[name] for name in figures] == [0, 2, 0.25, 6, pytest.approx(1 / 3)]


def test_the_function_in_the_docs_is_the_part_in_the_docs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "howto" / "reward.md").read_text()
    (written,) = [text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "colours" in text]
    (text,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_rewards").mkdir()
    (tmp_path / "my_rewards" / "colours.py").write_text(text)
    part = RewardSection.model_validate(yaml.safe_load(written)["reward"]).functions["named"]
    made = FunctionReward(part.path, part.state, part.kwargs, code=str(tmp_path))
    scores = made.score_batch(SAMPLES, ["a red square and a blue circle", "a circle"])
    assert [score.total for score in scores if isinstance(score, RewardBreakdown)] == [2.0, 0.0]
