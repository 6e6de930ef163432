"""The house rules: layers, what stays light, exported names, and what crosses process boundaries."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mmrl_ray
from mmrl_ray import errors
from mmrl_ray.data import row
from mmrl_ray.data.samples import Sample
from mmrl_ray.experience import carriers
from mmrl_ray.experience.carriers import (
    CaptionState,
    Completion,
    EncodedPrompt,
    GroupKey,
    PlannedGroup,
    RewardBreakdown,
    RolloutGroup,
    SamplingParams,
    ScoredGroup,
    StepPlan,
    VisionFeatures,
)

ROOT = Path(__file__).parents[2]
MODULES = sorted(m.name for m in pkgutil.walk_packages(mmrl_ray.__path__, "mmrl_ray."))


def test_import_contracts_hold() -> None:
    """The layers, the half without Ray, and what must not import torch: the contracts of pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("cli", "torch ray transformers pydantic pyarrow rich.console"),
        ("api.training api.inference api.run", "torch ray transformers pandas matplotlib IPython"),
        ("config.load", "torch ray transformers pyarrow"),
        (
            "rewards.captioning rewards.multimodal rewards.text rewards.build rewards.learned data.samples "
            "run_records.run_dir jobs.control",
            "torch ray transformers",
        ),
        ("serving.deployments serving.app serving.job_service", "torch transformers peft"),
        ("training.train", "transformers peft sklearn sqlalchemy"),
        ("reward_model.run learner.step policy.generation.decode", "ray"),
    ],
)
def test_importing_it_does_not_import(modules: str, unwanted: str) -> None:
    """Also what other libraries drag in, which a contract over our own modules cannot see."""
    code = (
        "import sys, importlib\n"
        f"for name in {modules.split()}:\n"
        "    importlib.import_module(f'mmrl_ray.{name}')\n"
        f"    print(name, [each for each in {unwanted.split()} if each in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == [f"{name} []" for name in modules.split()]


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_every_module_imports_and_exports_what_it_says(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    exported = getattr(module, "__all__", [])
    assert [each for each in exported if not hasattr(module, each)] == []
    assert len(exported) == len(set(exported))


def _exceptions() -> list[type[errors.MMRLError]]:
    return [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.MMRLError)]


def test_scripts_that_import_from_former_places_get_what_is_in_the_new_ones() -> None:
    from mmrl_ray.config.model import ModelSection
    from mmrl_ray.policy.decode import Decoder, DecodeRequest, decode_groups
    from mmrl_ray.policy.prefix import score_completions

    assert {each.__module__ for each in (ModelSection,)} == {"mmrl_ray.config.policy"}
    homes = {each.__module__ for each in (Decoder, DecodeRequest, decode_groups, score_completions)}
    assert all(home.startswith(("mmrl_ray.policy.generation.", "mmrl_ray.policy.scoring.")) for home in homes)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mmrl_ray.policy.nothing")


@pytest.mark.parametrize("kind", _exceptions(), ids=lambda c: c.__name__)
def test_exceptions_pickle_with_their_message(kind: type[errors.MMRLError]) -> None:
    again = pickle.loads(pickle.dumps(kind("learner.lr=-1 must be above 0")))
    assert type(again) is kind
    assert str(again) == "learner.lr=-1 must be above 0"


def test_the_drawn_tree_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    stack: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if line.startswith("MMRLError") or "──" in line:
            name = line.lstrip("│├└─ ").split()[0]
            depth = 0 if line.startswith("MMRLError") else (len(line) - len(line.lstrip("│├└─ "))) // 4
            stack[depth:] = [name]
            drawn[name] = stack[depth - 1] if depth else "Exception"
    assert drawn == {c.__name__: c.__bases__[0].__name__ for c in _exceptions()}


def test_all_our_exceptions_are_in_the_tree() -> None:
    """A class of its own elsewhere would escape the one place that turns errors into a line and an exit code."""
    stray = [
        f"{name}.{label}"
        for name in MODULES
        if not name.endswith("__main__")
        for label, c in inspect.getmembers(importlib.import_module(name), inspect.isclass)
        if issubclass(c, Exception) and c.__module__ == name and not issubclass(c, errors.MMRLError)
    ]
    assert stray == []


def _carriers() -> list[Any]:
    sample = Sample("a", (b"png",), "describe", ("a cat",), {"objects": [{"colour": "red"}]})
    completion = Completion(torch.tensor([3, 2]), torch.tensor([-0.5, -0.1]), "a cat", "stop", torch.zeros(2))
    prompt = EncodedPrompt(torch.tensor([1, 9, 9]), {"pixel_values": torch.zeros(1, 3, 2, 2)}, "key")
    vision = VisionFeatures(torch.zeros(2, 4), (torch.ones(2, 4),))
    reward = RewardBreakdown(0.5, {"bleu": 0.5}, {"bleu": 1.0}, 0.1)
    key = GroupKey(3, 1, 2)
    state = CaptionState(torch.zeros(4), {"image": torch.ones(4)}, torch.ones(4))
    group = RolloutGroup(sample, prompt, (completion,), 3, SamplingParams(seed=7), completion, vision, state)
    scored = ScoredGroup(
        key, "a", 3, 3, (2,), (reward,), reward, None, group, "w0", {"sample": 0.1}, {"vision_hits": 1}
    )
    planned = PlannedGroup(key, "a", 0, (0.5,), (1.0,), (2,), 3, group)
    plan = StepPlan(3, (planned,), 2.0, (((0,),),), {"reward/mean": 0.5})
    return [sample, completion, prompt, vision, reward, key, group, scored, planned, plan, group.sampling, state]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if is_dataclass(a):
        return type(a) is type(b) and all(_same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("module", [row, carriers], ids=lambda m: m.__name__)
def test_examples_of_carriers_are_right(module: Any) -> None:
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert failed == 0
    assert tried >= 2


@pytest.mark.parametrize("carrier", _carriers(), ids=lambda c: type(c).__name__)
def test_carriers_pickle_and_are_frozen_and_slotted(carrier: Any) -> None:
    assert _same(pickle.loads(pickle.dumps(carrier)), carrier)
    field = next(iter(carrier.__dataclass_fields__))
    with pytest.raises(AttributeError):
        setattr(carrier, field, None)
    assert not hasattr(carrier, "__dict__")


def test_same_sees_a_difference() -> None:
    """The comparison above is ours, so it has a test: a tensor's value, its type, and a nested field."""

    @dataclass
    class Box:
        inside: Any

    assert not _same(Box({"a": (torch.zeros(2),)}), Box({"a": (torch.ones(2),)}))
    assert not _same(Box(torch.zeros(2)), Box(torch.zeros(2, dtype=torch.float64)))
    assert not _same([1, 2], [1, 3])
    assert _same(Box([1, {"x": torch.ones(1)}]), Box([1, {"x": torch.ones(1)}]))
