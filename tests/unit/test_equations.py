"""The page of equations: each is where it says, is tested where it says, and is used by the system itself."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from mmrl_ray.cli import app
from mmrl_ray.config.load import load_config

ROOT = Path(__file__).parents[2]

HOMES = {
    1: ("mmrl_ray.reward_model.fusion", ("SharedAttentionFusion",)),
    2: ("mmrl_ray.reward_model.fusion", ("CoupledEncodersFusion",)),
    3: ("mmrl_ray.losses.td", ("q_learning_target", "q_learning_update")),
    4: ("mmrl_ray.losses.regularizers", ("l2_to_pretrained",)),
    5: ("mmrl_ray.reward_model.fusion", ("AttentionFusion",)),
    6: ("mmrl_ray.reward_model.fusion", ("WeightedSumFusion",)),
    7: ("mmrl_ray.losses.regularizers", ("adapter_l2",)),
    8: ("mmrl_ray.losses.schedule", ("cosine_annealing",)),
    9: ("mmrl_ray.analysis.attribution", ("modality_importance",)),
    10: ("mmrl_ray.rewards.multimodal", ("MultimodalReward",)),
    11: ("mmrl_ray.analysis.pca", ("fit_pca",)),
    12: ("mmrl_ray.algorithms.dqn.exploration", ("epsilon_greedy",)),
    13: ("mmrl_ray.algorithms.dqn.exploration", ("boltzmann_probabilities",)),
    14: ("mmrl_ray.losses.policy_gradient", ("reward_guided_loss",)),
    15: ("mmrl_ray.losses.uncertainty", ("gaussian_nll",)),
    16: ("mmrl_ray.rewards.captioning", ("CaptionReward",)),
    17: ("mmrl_ray.analysis.correlation", ("modality_correlation",)),
}
Name = tuple[str, str]
"""A module, and a function or class at its top level; "" for what the module does when it is imported."""


@cache
def table() -> dict[int, dict[str, str]]:
    """What docs/equations.md says of each equation, by the word before the colon."""
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    found = re.split(r"^## (\d+)\. ", text, flags=re.MULTILINE)[1:]
    sections = {int(number): body for number, body in zip(found[::2], found[1::2], strict=True)}
    assert len(sections) == len(found) // 2
    return {n: dict(re.findall(r"^- ([\w ]+): (.+)$", body, re.MULTILINE)) for n, body in sections.items()}


def exists(row: int) -> bool:
    module, names = HOMES[row]
    try:
        if find_spec(module) is None:
            return False
    except ModuleNotFoundError:  # of the package around it
        return False
    return all(hasattr(importlib.import_module(module), name) for name in names)


def imported(tree: ast.Module) -> tuple[dict[str, Name], dict[str, str]]:
    """What names stand for in a module, wherever they are imported: names of other modules, and modules."""
    names: dict[str, Name] = {}
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = (node.module, alias.name)
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            modules.update({alias.asname: alias.name for alias in node.names if alias.asname})
    return names, modules


def code(node: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` without annotations: to be named there is not to be used."""
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from code(child)


def uses(path: Path, module: str) -> Iterator[tuple[Name, Name]]:
    """(who, what) for every mention of a name in code: a call, a base class, something handed on."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names, modules = imported(tree)
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        who = (module, statement.name if isinstance(statement, ast.FunctionDef | ast.ClassDef) else "")
        for node in code(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                if node.id in names:
                    yield who, names[node.id]
                elif node.id in own and node.id != who[1]:
                    yield who, (module, node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                yield who, (modules[node.value.id], node.attr)


@cache
def users() -> dict[Name, set[Name]]:
    """Of each name, who mentions it in the program."""
    found: dict[Name, set[Name]] = {}
    for path in sorted((ROOT / "mmrl_ray").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for who, what in uses(path, module):
            found.setdefault(what, set()).add(who)
    return found


def reached_from_elsewhere(name: Name) -> bool:
    """Whether another module leads to it, through functions of its own module if need be."""
    seen, waiting = {name}, [name]
    while waiting:
        for user in users().get(waiting.pop(), ()):
            if user[0] != name[0]:
                return True
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return False


def test_the_page_has_every_equation_with_its_home() -> None:
    assert sorted(table()) == sorted(HOMES) == list(range(1, 18))
    for row, (module, names) in HOMES.items():
        assert re.findall(r"`([^`]+)`", table()[row]["import"]) == [f"{module}.{name}" for name in names], row


@pytest.mark.parametrize("row", HOMES)
def test_it_exists_and_the_system_uses_it(row: int) -> None:
    module, names = HOMES[row]
    assert exists(row), f"row {row}: {module} has no {', '.join(names)}"
    for name in names:
        assert reached_from_elsewhere((module, name)), f"row {row}: nothing but tests leads to {module}.{name}"


@pytest.mark.parametrize("row", HOMES)
def test_its_test_and_its_command_are_real(row: int) -> None:
    (file,) = re.findall(r"`(tests/[^`]+)`", table()[row]["tested in"])
    tested = (ROOT / file).read_text(encoding="utf-8")
    assert all(name in tested for name in HOMES[row][1]), f"row {row}: {file} does not test it"
    words = shlex.split(re.findall(r"`(mmrl [^`]+)`", table()[row]["see it with"])[0])[1:]
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[0] in known
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    if words[0] == "train":
        load_config(ROOT / words[1], overrides)


def test_the_search_for_users_finds_what_nobody_uses(tmp_path: Path) -> None:
    """The check above is ours, so it has a test: a name that is only imported, annotated or defined is not used."""
    file = tmp_path / "m.py"
    file.write_text(
        "from a import f, g, h\nfrom b import c\nimport d as e\n"
        "def one(x: h) -> h:\n    return f()\ndef two():\n    return one(), c.k, e.z(g)\n"
    )
    found = set(uses(file, "m"))
    assert found >= {(("m", "one"), ("a", "f")), (("m", "two"), ("a", "g")), (("m", "two"), ("m", "one"))}
    assert found >= {(("m", "two"), ("b.c", "k")), (("m", "two"), ("d", "z"))}
    assert not any(what == ("a", "h") for _, what in found)
    assert not reached_from_elsewhere(("mmrl_ray.analysis.correlation", "no_such_function"))


@pytest.mark.parametrize(
    ("former", "home"),
    [
        ("mmrl_ray.models.fusion", "mmrl_ray.reward_model.fusion"),
        ("mmrl_ray.learner.schedule", "mmrl_ray.losses.schedule"),
    ],
)
def test_a_former_import_path_leads_to_the_same(former: str, home: str) -> None:
    old, new = importlib.import_module(former), importlib.import_module(home)
    assert old.__all__
    assert all(getattr(old, name) is getattr(new, name) for name in old.__all__)
