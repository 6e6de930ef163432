"""Reads a config file with its overrides, writes a resolved one, and describes them all as JSON Schema."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mmrl_ray.config.problems import Tree, dotted, dump_yaml, parse_yaml, problem_lines
from mmrl_ray.config.reward_model import RewardModelConfig
from mmrl_ray.config.schema import Config
from mmrl_ray.config.sections import Section
from mmrl_ray.config.serving import ServeConfig
from mmrl_ray.config.tracking import written_out
from mmrl_ray.errors import ConfigError

Whole = TypeVar("Whole", Config, ServeConfig, RewardModelConfig)


def load_config(path: str | Path, overrides: Sequence[str] = (), *, given: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML config; each override is `a.b=value`, its value read as YAML. Environment variables stay as written.

    `given` are sections that the file need not have.

    Raises:
        ConfigError: no such file, no YAML, or anything in it wrong; one line a problem, all of them at once, each with
            file and line (or its `--set`), dotted key, value and remedy.
    """
    return parse_as(Config, _read(Path(path)), str(path), overrides, given)


def load_as(kind: type[Whole], path: str | Path, overrides: Sequence[str] = ()) -> Whole:
    """`load_config` of any kind of config file; raises as it does."""
    return parse_as(kind, _read(Path(path)), str(path), overrides)


def load_any_config(path: str | Path, overrides: Sequence[str] = ()) -> Config | ServeConfig:
    """Either of the two, told apart by the sections that only a run has; raises as `load_config`."""
    text = _read(Path(path))
    value = parse_yaml(text, str(path)).value
    only_of_runs = Config.model_fields.keys() - ServeConfig.model_fields.keys()
    if isinstance(value, dict) and not value.keys() & only_of_runs:
        return parse_as(ServeConfig, text, str(path), overrides)
    return parse_config(text, str(path), overrides)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """`load_config` of text that is already read; `source` is what its errors call the file."""
    return parse_as(Config, text, source, overrides)


def config_of(config: Config | Mapping[str, Any] | str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """A config out of what a program has: itself, a mapping as YAML would be read, or the path of a YAML file.

    Overrides of a `Config` are applied to it as it is resolved: a preset's values stay where only its name changes.

    Raises:
        ConfigError: as `load_config`; a mapping is called `config` in place of a file and a line.
    """
    if isinstance(config, str | os.PathLike):
        return load_config(Path(config), overrides)
    if isinstance(config, Mapping):
        return _validated(Config, Tree(_plain(config), {(): "config"}), "config", overrides)
    if not isinstance(config, Config):
        told = f"{type(config).__name__} is no config"
        raise ConfigError(f"{told}: give a Config, a mapping of its sections, or the path of a YAML file")
    return parse_config(dump_config(config), "config", overrides) if overrides else config


def as_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """`a.b=value` of each, as `--set` takes them; of a mapping its values are Python's.

    Raises:
        ConfigError: a value is none that YAML has.
    """
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return [*overrides]
    try:
        return [f"{key}={json.dumps(_plain(value), allow_nan=False)}" for key, value in overrides.items()]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"overrides hold what no config can: {error}") from None


def _plain(value: Any) -> Any:
    """A copy of a mapping's values as YAML would have brought them."""
    if isinstance(value, Section):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # NumPy's and torch's numbers
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def parse_as(
    kind: type[Whole],
    text: str,
    source: str,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> Whole:
    """`parse_config` of any kind of config file."""
    return _validated(kind, parse_yaml(text, source), source, overrides, given)


def _validated(
    kind: type[Whole], tree: Tree, source: str, overrides: Sequence[str], given: Mapping[str, Any] | None = None
) -> Whole:
    sections = ", ".join(f"`{name}:`" for name, info in kind.model_fields.items() if info.is_required())
    if tree.value is None:
        raise ConfigError(f"{source}: the file is empty; a config needs the sections {sections}")
    if not isinstance(tree.value, dict):
        found = "a list" if isinstance(tree.value, list) else f"one value ({str(tree.value)[:40]!r})"
        raise ConfigError(f"{source}: holds {found}, not a config; a config has the sections {sections}")
    for name, section in (given or {}).items():
        tree.value.setdefault(name, section)
    problems = [*tree.problems]
    _write_out(tree)
    for override in overrides:
        problems += _apply_override(tree, override)
        _write_out(tree)
    try:
        cfg = kind.model_validate(tree.value)
    except ValidationError as error:
        problems += problem_lines(error, kind, tree)
    if problems:
        raise ConfigError("\n".join(sorted(problems, key=_line_number)))
    return cfg


def dump_config(cfg: Section) -> str:
    """The resolved config, preset applied and every default written out; `load_config` reads an equal one back."""
    return dump_yaml(cfg.model_dump(mode="json"))


def changed_keys(before: str, after: str) -> list[str]:
    """`a.b: old → new` for each value in which two dumped configs differ."""
    old, new = (_leaves(parse_yaml(text, "config").value) for text in (before, after))
    return [
        f"{key}: {_short(old.get(key))} → {_short(new.get(key))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    inside = (_leaves(each, f"{path}.{key}" if path else str(key)) for key, each in value.items())
    return {key: leaf for part in inside for key, leaf in part.items()}


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def config_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors and for reading."""
    schema = Config.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = _nearest_file(path)
        raise ConfigError(f"{path}: no such config{near}") from None
    except IsADirectoryError:
        inside = "; it is a run folder: pass --resume to go on with it" if (path / "config.yaml").is_file() else ""
        raise ConfigError(f"{path}: is a folder, not a config file{inside}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (byte {error.start} is not UTF-8); a config is YAML") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _apply_override(tree: Tree, override: str) -> list[str]:
    """Write one `a.b=value` into the tree; the problems found, if any."""
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        return [f"--set {override}: write it as key=value, for example --set learner.lr=1e-4"]
    place = f"--set {key.strip()}"
    try:
        value = parse_yaml(text, place)
    except ConfigError as error:
        return [str(error)]
    section, path = tree.value, ()  # type: dict[str, Any], tuple[str, ...]
    for name in keys[:-1]:
        path = (*path, name)
        if section.get(name) is None:
            section[name] = {}
            tree.places[path] = place
        elif not isinstance(section[name], dict):
            return [f"{place}: {dotted(path)} is a value, not a section (it is {section[name]!r})"]
        section = section[name]
    path = (*path, keys[-1])
    section[keys[-1]] = value.value
    tree.forget_below(path)
    tree.places[path] = place
    return value.problems


def _write_out(tree: Tree) -> None:
    """Has `tracking: [wandb]`, which is short, as the section that it is short for: further keys can be set in it."""
    short = tree.value.get("tracking")
    if isinstance(short, str | list):
        tree.value["tracking"] = written_out(short)
        moved = {path: place for path, place in tree.places.items() if path[:1] == ("tracking",)}
        tree.places |= {("tracking", "to", *path[1:]): place for path, place in moved.items()}


def _line_number(problem: str) -> int:
    """Problems come in the order of the file, those of overrides last; the sort is stable."""
    found = re.match(r"[^\n]*?:(\d+):", problem)
    return int(found[1]) if found and not problem.startswith("--set") else sys.maxsize
