"""Errors in a config as a user reads them: one line each, with place, dotted key, value, and the nearest valid key.

Pydantic's errors come in by `problem_lines`. `parse_yaml` turns YAML text into plain values plus the line of every key,
so that an error can say where it is. Duplicate keys and keys that are no text are refused, `1e-4` is a number (YAML
1.2; PyYAML alone reads it as text), and only plain values exist: a tag such as `!!python/object` is an error.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from mmrl_ray.errors import ConfigError

_TYPES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a section of `key: value` lines",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "list_type": "must be a list",
    "model_type": "must be a section of `key: value` lines",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}
_ALIKE = 0.7
"""How near a value has to be to one that is meant: `kto` is no misspelt `dpo`."""
_COUNTS = {"too_long": "must have at most {max_length} items, not {actual_length}"}
KeyPath = tuple[str | int, ...]

_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


def problem_lines(error: ValidationError, model: type[BaseModel], tree: Tree) -> list[str]:
    """Every problem of `error` as one line, in pydantic's order; raw values and places come from `tree`."""
    found: dict[KeyPath, list[str]] = {}
    unions: dict[KeyPath, list[str]] = {}
    given: dict[KeyPath, str] = {}
    for item in error.errors(include_url=False):
        path, parent, in_union = _locate(model, tuple(item["loc"]))
        if in_union and item["type"] in _TYPES:
            unions.setdefault(path, []).append(_TYPES[item["type"]].removeprefix("must be "))
            found.setdefault(path, [])
            given[path] = _show(item["input"])
        else:
            found.setdefault(path, []).extend(_messages(dict(item), path, parent, model))
    for path, kinds in unions.items():
        found[path] = found[path] or [f"must be {' or '.join(kinds)}, not {given[path]}"]
        if any(len(p) > len(path) and p[: len(path)] == path for p in found):
            del found[path]  # one branch of the union got further: its error is the one that helps
    return [_line(message, path, tree) for path, messages in found.items() for message in messages]


def _line(message: str, path: KeyPath, tree: Tree) -> str:
    quoted = _mentioned(message, path, tree)
    place = tree.place(quoted or path)
    key = dotted(path)
    if not key or place == f"--set {key}":
        return f"{place}: {message}"
    return f"{place}: {key}: {message}"


def dotted(path: KeyPath) -> str:
    """`learner.betas[1]` for ("learner", "betas", 1)."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def _mentioned(message: str, path: KeyPath, tree: Tree) -> KeyPath | None:
    """The first written key that a check over several keys names (`warmup_steps=…`): its line is the one to look at."""
    for name in re.findall(r"([a-z_][\w.]*)=", message):
        candidate: KeyPath = (*path, *name.split("."))
        if candidate in tree.places:
            return candidate
    return None


def _messages(item: dict[str, Any], path: KeyPath, parent: type[BaseModel] | None, root: type[BaseModel]) -> list[str]:
    kind, value, leaf = item["type"], _show(item.get("input")), str(path[-1]) if path else ""
    if kind == "missing":
        under = f"under `{dotted(path[:-1])}:`" if len(path) > 1 else "at the top level"
        return [f"required key is missing: add `{leaf}:` {under}"]
    if kind == "extra_forbidden":
        return [f"unknown key (value {value}){_nearest_key(leaf, parent, root)}"]
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, ").split("\n")
    if kind == "union_tag_not_found":
        return [f"add `kind:` to say what it is; the value is {value}"]
    if kind in ("literal_error", "union_tag_invalid"):
        allowed = item["ctx"].get("expected") or item["ctx"]["expected_tags"]
        given = item["input"].get("kind") if kind == "union_tag_invalid" else item["input"]
        name = "kind" if kind == "union_tag_invalid" else "the value"
        return [f"{name} {_show(given)} is not one of {allowed}{_nearest_value(given, allowed)}"]
    if kind in _TYPES:
        return [f"{_TYPES[kind]}, not {value}{_hint(kind, item.get('input'))}"]
    if kind in _COUNTS:
        return [_COUNTS[kind].format(**item["ctx"])]
    return [f"{item['msg'][:1].lower()}{item['msg'][1:]}, not {value}"]


def _hint(kind: str, value: Any) -> str:
    if kind == "string_type" and value is not None and not isinstance(value, dict | list):
        return ": put it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+\d.eE_]+", value):
        return ": take the quotes away"
    return ""


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _nearest_key(name: str, parent: type[BaseModel] | None, root: type[BaseModel]) -> str:
    siblings = list(parent.model_fields) if parent is not None else []
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    everywhere: dict[str, list[str]] = {}
    for path in _key_paths(root):
        everywhere.setdefault(str(path[-1]), []).append(dotted(path))
    far = difflib.get_close_matches(name, list(everywhere), n=1, cutoff=0.8)
    if far:
        return f"; did you mean {' or '.join(f'`{key}`' for key in everywhere[far[0]])}?"
    return f"; the keys here are {', '.join(siblings)}" if siblings else ""


def _nearest_value(given: Any, allowed: str) -> str:
    choices = re.findall(r"'([^']+)'", allowed)
    near = difflib.get_close_matches(given, choices, n=1, cutoff=_ALIKE) if isinstance(given, str) else []
    return f"; did you mean `{near[0]}`?" if near else ""


def _key_paths(model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, info in model.model_fields.items():
        yield (*prefix, name)
        for option in _options(info.annotation):
            if _is_model(option):
                yield from _key_paths(option, (*prefix, name))


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _options(annotation: Any) -> list[Any]:
    """The members of a (possibly nested, optional, annotated) union; a plain type is its own only member."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [o for member in get_args(annotation) for o in _options(member) if o is not type(None)]
    return [annotation]


def _locate(model: type[BaseModel], loc: KeyPath) -> tuple[KeyPath, type[BaseModel] | None, bool]:
    """Pydantic's location as (the user's key path, the section that holds its last key, whether a union chose it).

    Pydantic puts the branch of a union into the location (`parts.c.caption.alpha`, `targets.list[str]`); no user wrote
    that, so it is left out.
    """
    path: KeyPath = ()
    options: list[Any] = [model]
    parent: type[BaseModel] | None = None
    plain_union = False
    for element in loc:
        models = [o for o in options if _is_model(o)]
        if len(models) > 1:
            options = [m for m in models if element in _tags(m)]
            continue
        if len(options) > 1 and not isinstance(element, int):
            plain_union = True
            options = [o for o in options if str(element).startswith(getattr(o, "__name__", str(o)))] or options
            continue
        option = options[0] if options else None
        path = (*path, element)
        parent = option if _is_model(option) else None
        options = _inside(option, element)
    return path, parent, plain_union


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _inside(annotation: Any, element: str | int) -> list[Any]:
    if _is_model(annotation):
        field = annotation.model_fields.get(element)
        return _options(field.annotation) if field is not None else []
    args = get_args(annotation)
    if get_origin(annotation) is dict:
        return _options(args[1])
    if get_origin(annotation) in (list, tuple) and args:
        return _options(args[min(int(element), len(args) - 1)] if isinstance(element, int) else args[0])
    return []


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's exponents."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number, and writes every value out."""

    def ignore_aliases(self, data: Any) -> bool:
        """No anchors: a resolved config is read by people."""
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass
class Tree:
    """Plain values, and the place (`file:line`, or an override) of each key path."""

    value: Any
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Repeated keys and keys that are no text: the tree is usable, the file is not."""

    def place(self, path: KeyPath) -> str:
        """Where `path` was written; for what was not, where the innermost section around it was."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")

    def forget_below(self, path: KeyPath) -> None:
        """Drop the places under `path`, whose value was replaced."""
        for known in [p for p in self.places if len(p) > len(path) and p[: len(path)] == path]:
            del self.places[known]


def parse_yaml(text: str, source: str) -> Tree:
    """Read one YAML document.

    Raises:
        ConfigError: the text is no YAML (with line and column) or holds more than plain values.
    """
    loader: Any = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        tree = Tree(None, {(): source})
        if node is not None:
            tree.value = _Walk(loader, source, tree).value_of(node, ())
        return tree
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_line(error, text, source)) from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{source}: not a text file ({error.reason} at position {error.position})") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply to be a config") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(value: Any) -> str:
    """YAML of plain values in their own order; `parse_yaml` reads the same values back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


@dataclass
class _Walk:
    """Constructs values node by node and notes where each key stands."""

    loader: Any
    source: str
    tree: Tree
    open: set[int] = field(default_factory=set)

    def value_of(self, node: yaml.Node, path: KeyPath) -> Any:
        if id(node) in self.open:
            raise yaml.constructor.ConstructorError(None, None, "an alias that holds itself", node.start_mark)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
                return [self._item(child, (*path, i)) for i, child in enumerate(node.value)]
            return self.loader.construct_object(node, deep=True)
        finally:
            self.open.discard(id(node))

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.tree.places[path] = self._place(node)
        return self.value_of(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        if node.tag != "tag:yaml.org,2002:map":
            return self.loader.construct_object(node, deep=True)  # sets and foreign tags: refused there or by the types
        self._refuse_duplicates(node, path)
        self.loader.flatten_mapping(node)  # `<<:` merges, the merged keys first
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                self.tree.problems.append(f"{self._place(key_node)}: key {key!r} must be text: quote it")
                continue
            self.tree.places[(*path, key)] = self._place(key_node)
            out[key] = self.value_of(value_node, (*path, key))
        return out

    def _refuse_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in first:
                name = ".".join(str(p) for p in (*path, key_node.value))
                self.tree.problems.append(
                    f"{self._place(key_node)}: {name}: key written twice (first on line {first[key_node.value]}); "
                    "keep one of them"
                )
            first.setdefault(key_node.value, line)

    def _place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}"


def _syntax_line(error: yaml.MarkedYAMLError, text: str, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark is not None else source
    what = " ".join(part for part in (error.problem, f"({error.context})" if error.context else "") if part)
    hint = "; this looks like JSON: write the config as YAML" if text.lstrip()[:1] in ("{", "[") else ""
    if "'\\t'" in what:
        hint = "; indent with spaces, not tabs" + hint
    return f"{where}: not valid YAML: {' '.join(what.split())}{hint}"
