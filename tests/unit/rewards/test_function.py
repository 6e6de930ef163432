"""A user's own function as a part: what it is given, what it may return, and how it fails."""

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, RewardError
from mmrl_ray.rewards.base import RewardFn
from mmrl_ray.rewards.build import NOTHING, build_reward, check_reward
from mmrl_ray.rewards.scoring import RewardFailure, score_with_retry

SAMPLES = [Sample(f"s{i}", (b"png", b"two"), "Say it.", ("a red square", "red"), {"n": i}) for i in range(2)]
CAPTIONS = ["a red square", "blue"]
MODULE = """
SEEN = []

def words(captions, states, *, scale=1.0):
    SEEN.append((captions, states))
    return [scale * len(caption.split()) for caption in captions]

def odd(captions, states, *, returned):
    return {"nan": [float("nan")] * len(captions), "few": [1.0], "text": "12", "none": None,
            "words": ["1"] * len(captions)}[returned]

def picky(captions, states):
    if "blue" in captions:
        raise KeyError("no blue here")
    return [0.5] * len(captions)

NUMBER = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('half written')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_rewards", "broken_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import own_rewards

    return own_rewards


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
def test_it_gets_the_state_of_its_modality_and_its_arguments(module: Any, state: str, given: list) -> None:
    scores = build("own_rewards:words", state, scale=0.5).score_batch(SAMPLES, CAPTIONS)
    (seen,) = module.SEEN
    assert seen == (CAPTIONS, given)
    assert [s.total for s in scores] == [3.0, 1.0]
    assert scores[0].parts == {"mine": 1.5, "mine/value": 1.5}
    assert section("own_rewards:words", state).needs_images == (state in ("image", "sample"))


def test_it_travels_by_its_path(module: Any) -> None:
    there = pickle.dumps(build("own_rewards:words"))
    assert b"len(caption" not in there
    assert pickle.loads(there).score_batch(SAMPLES, CAPTIONS)[0].total == 6.0


@pytest.mark.parametrize("returned", [[1, True], (1.0, 2.0), np.array([1.0, 2.0]), np.float32([1, 2])])
def test_it_may_return_any_sequence_of_numbers(module: Any, monkeypatch: pytest.MonkeyPatch, returned: Any) -> None:
    monkeypatch.setattr(module, "words", lambda captions, states: returned)
    assert [type(s.total) for s in build("own_rewards:words").score_batch(SAMPLES, CAPTIONS)] == [float, float]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("nan", "returned nan for caption 0"),
        ("few", "returned 1 numbers for 2 captions"),
        ("text", "returned str; return a list"),
        ("none", "returned NoneType"),
        ("words", "returned '1' for caption 0"),
    ],
)
def test_what_it_must_not_return_names_part_and_path(module: Any, returned: str, said: str) -> None:
    with pytest.raises(RewardError, match=rf"reward part 'mine' failed: own_rewards:odd {said}"):
        build("own_rewards:odd", returned=returned).score_batch(SAMPLES, CAPTIONS)


@pytest.mark.parametrize(
    ("path", "kwargs", "said"),
    [
        ("no_such_module_here:f", {}, r"cannot be imported \(ModuleNotFoundError"),
        ("broken_rewards:f", {}, r"cannot be imported \(RuntimeError: half written\)"),
        ("own_rewards:missing", {}, "has no function 'missing'"),
        ("own_rewards:NUMBER", {}, "has no function 'NUMBER'"),
        ("own_rewards:words", {"scales": 1}, "cannot be called .*'scales'"),
        ("own_rewards:odd", {}, "cannot be called .*returned"),
    ],
)
def test_what_cannot_work_is_found_at_start(module: Any, path: str, kwargs: dict, said: str) -> None:
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


def test_a_part_that_raises_masks_its_own_sample(module: Any) -> None:
    first, second = score_with_retry(build("own_rewards:picky"), SAMPLES, CAPTIONS, timeout_s=30.0, retries=0)
    assert not isinstance(first, RewardFailure)
    assert first.total == 1.0
    assert isinstance(second, RewardFailure)
    assert second.reason == "reward part 'mine' failed: KeyError: 'no blue here'"
