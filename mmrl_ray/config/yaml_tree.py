"""YAML text to plain values plus the line of every key, so that an error can say where it is.

Duplicate keys and keys that are no text are refused, `1e-4` is a number (YAML 1.2; PyYAML alone reads it as text), and
only plain values exist: a tag such as `!!python/object` is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from mmrl_ray.errors import ConfigError

KeyPath = tuple[str | int, ...]

_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


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


class _Walk:
    """Constructs values node by node and notes where each key stands."""

    def __init__(self, loader: Any, source: str, tree: Tree) -> None:
        self.loader = loader
        self.source = source
        self.tree = tree
        self.open: set[int] = set()

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
