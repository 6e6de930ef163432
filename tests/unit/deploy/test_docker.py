"""The images, without a Docker engine: hadolint, and every path and program that they name is there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from .crds import ROOT

FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
_OF_DEBIAN = {"groupadd", "useradd", "sed", "grep"}
"""What the base image (python:*-slim) brings and the files use."""


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined and comments left out."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(name.upper(), rest) for line in lines if line.strip() for name, _, rest in [line.partition(" ")]]


def stages(path: Path) -> list[list[tuple[str, str]]]:
    out: list[list[tuple[str, str]]] = []
    for instruction in instructions(path):
        if instruction[0] == "FROM":
            out.append([])
        out[-1].append(instruction)
    return out


def in_context(path: str) -> bool:
    """Whether .dockerignore lets it through: the last pattern that matches decides."""
    inside = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        bare = pattern.removeprefix("!")
        parts = [path, *(str(p) for p in Path(path).parents if str(p) != ".")]
        deep = bare.removeprefix("**/") if bare.startswith("**/") else None
        if any(fnmatch(part, bare) or (deep and fnmatch(Path(part).name, deep)) for part in parts):
            inside = pattern.startswith("!")
    return inside


def programs(command: str) -> list[str]:
    """The programs that a shell line calls."""
    found = []
    for part in re.split(r"&&|\|\||[|;]|\$\(", command):
        words = shlex.split(part.replace(")", " ").replace('"', " ").replace("'", " "))
        words = [w for w in words if not re.match(r"^\w+=", w)]
        if words:
            found.append(words[0])
    return found


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [p.suffix for p in FILES] == [".cpu", ".gpu"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_several_stages_pinned_bases_and_a_plain_user(path: Path) -> None:
    built = stages(path)
    assert len(built) >= 2
    for stage in built:
        image = stage[0][1].split()[0]
        assert re.search(r":\d+\.\d+\.\d+-", image), f"{image} is not pinned"
    last = built[-1]
    users = [rest for name, rest in last if name == "USER"]
    assert users == ["1000:1000"]
    after = last[[name for name, _ in last].index("USER") :]
    assert all(name not in ("RUN", "COPY") for name, _ in after)  # nothing is done as that user that root should do
    assert not [rest for name, rest in last if name == "RUN" and "pip" in rest]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_what_is_copied_is_in_the_context_or_in_the_stage(path: Path) -> None:
    copied = 0
    for stage in stages(path):
        for name, rest in stage:
            if name != "COPY":
                continue
            words = rest.split()
            if words[0].startswith("--from="):
                source, target = words[1:]
                made = " ".join(text for other, text in stages(path)[0] if other in ("RUN", "WORKDIR"))
                assert f"venv {source}" in made
                assert source == target  # scripts of a virtual environment name its place
                continue
            for source in words[:-1]:
                assert (ROOT / source).exists(), source
                assert in_context(source), f"{source} is left out by .dockerignore"
                copied += 1
    assert copied >= 5


def test_the_context_holds_the_package_and_nothing_private() -> None:
    assert in_context("mmrl_ray/cli/__init__.py")
    for path in (".git/config", "runs/demo/config.yaml", "mmrl_ray/__pycache__/x.pyc", "data/a.parquet", ".venv/bin/x"):
        assert not in_context(path), path
    # What the package's own build reads.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path in (project["readme"], *project["license-files"]):
        assert in_context(path)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_program_and_extra_that_is_used_is_there(path: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    used: set[str] = set()
    for name, rest in instructions(path):
        if name == "RUN":
            used |= set(programs(rest))
            for group in re.findall(r"'\.\[(.+?)\]'", rest):
                assert set(group.split(",")) <= extras.keys()
            for module in re.findall(r"python -m (\w+)", rest):
                assert subprocess.run([sys.executable, "-c", f"import {module}"], check=False).returncode == 0, module
    assert used <= {"python", *_OF_DEBIAN, "echo"}, used
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==[\d.]+$", constraints, re.MULTILINE)  # what the files' `sed` looks for
    for extra in ("models", "postgres"):
        for requirement in extras[extra]:
            package = re.match(r"[\w-]+", requirement)
            assert package
            assert package[0] == "torchvision" or f"\n{package[0]}==" in constraints


def test_torch_for_gpus_is_the_pinned_version_where_that_is_built_for_cuda() -> None:
    """An index of PyTorch's own may lack the pinned version: PyPI's wheel of it is the one for CUDA."""
    (gpu,) = (path for path in FILES if path.suffix == ".gpu")
    installs = [rest for name, rest in instructions(gpu) if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    for command in installs:
        assert "pip install -c constraints.txt" in command
        assert not re.search(r"index|torch==|\+cu", command)
    assert "CUDA used to build PyTorch: [0-9]" in installs[0], "the build ends where the wheel is none for CUDA"
    pinned = re.search(r"^torch==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert f"{pinned[1]} is {pinned[1]}+cu" in gpu.read_text(), "look up PyPI's wheel of the new version"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_health_check_asks_the_one_open_route(path: Path) -> None:
    from mmrl_ray.config.serving import ServingSection
    from mmrl_ray.serving.auth import LIVE

    (check,) = (rest for name, rest in instructions(path) if name == "HEALTHCHECK")
    program, option, code = json.loads(check[check.index("[") :])
    assert (program, option) == ("python", "-c")
    compile(code, "health check", "exec")
    assert f"http://127.0.0.1:{ServingSection().port}{LIVE}" in code
    (exposed,) = (rest for name, rest in instructions(path) if name == "EXPOSE")
    assert int(exposed) == ServingSection().port
