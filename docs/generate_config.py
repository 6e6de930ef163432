"""The reference of configs, out of their pydantic schema: each section once, its keys, types, defaults and meaning."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

Lines = Iterator[str]


def prose(text: str | None) -> str:
    """One paragraph of a docstring on one line."""
    return " ".join((text or "").split())


def cell(text: str) -> str:
    """For a table: no bar ends a cell."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def config_reference() -> Lines:
    """Each section of the three configs once, with its keys, their types, defaults and meaning."""
    from mmrl_ray.config.reward_model import RewardModelConfig
    from mmrl_ray.config.schema import Config
    from mmrl_ray.config.serving import ServeConfig

    seen: dict[type[BaseModel], str] = {}
    roots = {
        "Run": (Config, "`mmrl train`, `mmrl sft`, `mmrl deploy render`"),
        "Server": (ServeConfig, "`mmrl serve`"),
        "Reward model": (RewardModelConfig, "`mmrl reward train`"),
    }
    for title, (model, used_by) in roots.items():
        yield from (f"## {title}", "", f"Read by {used_by}.", "")
        yield from _section(model, "", seen, title.lower().replace(" ", "-"))


def _section(model: type[BaseModel], path: str, seen: dict[type[BaseModel], str], root: str) -> Lines:
    seen[model] = target = f"config-{root}-{path}".rstrip("-").replace(".", "-").replace("<", "").replace(">", "")
    if path:
        yield from (f"({target})=", f"### `{path}`", "", prose(model.__doc__), "")
    nested: list[tuple[type[BaseModel], str]] = []
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for name, field in model.model_fields.items():
        found = list(_models(field.annotation))
        several = len(found) > 1
        links = []
        for each in found:
            where = f"{path}.{name}".lstrip(".") + (".<name>" if _is_mapping(field.annotation) else "")
            where += f".<{_kind(each)}>" if several and _kind(each) else ""
            if each not in seen:
                seen[each] = f"config-{root}-{where}".replace(".", "-").replace("<", "").replace(">", "")
                nested.append((each, where))
            links.append(f"[{_kind(each) or 'section'}](#{seen[each]})")
        kind = " or ".join(links) if links else f"`{_type(field)}`"
        yield f"| `{name}` | {cell(kind)} | {cell(_default(field))} | {cell(prose(field.description))} |"
    yield ""
    for each, where in nested:
        yield from _section(each, where, seen, root)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in an annotation, unions and containers looked into."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def _is_mapping(annotation: Any) -> bool:
    return any(typing.get_origin(each) in (dict, Mapping) or typing.get_origin(each) is dict
               for each in (annotation, *typing.get_args(annotation)))  # fmt: skip


def _kind(model: type[BaseModel]) -> str:
    field = model.model_fields.get("kind")
    values = typing.get_args(field.annotation) if field is not None else ()
    return str(values[0]) if len(values) == 1 else ""


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(each, name)}"
        for each in field.metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"), ("multiple_of", "multiple of"))
        if getattr(each, name, None) is not None
    ]
    named = [each.json_schema for each in field.metadata if isinstance(each, WithJsonSchema)]
    kind = " | ".join(_choices(named[0] or {})) if named else _annotation(field.annotation)
    return ", ".join([kind, *bounds])


def _choices(schema: Mapping[str, Any]) -> list[str]:
    """The names that a JSON schema allows, and what else."""
    return [str(name) for each in schema.get("anyOf", [schema]) for name in each.get("enum", ["module:Class"])]


def _annotation(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _annotation(arguments[0])
    if origin is typing.Literal:
        return " | ".join(str(each) for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if each is types.NoneType else _annotation(each) for each in arguments)
    if origin is not None:
        inside = ", ".join("…" if each is Ellipsis else _annotation(each) for each in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inside}]"
    return str(getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return "its own defaults"
    if value is None:
        return "none"
    if isinstance(value, dict) and any(isinstance(each, BaseModel) for each in value.values()):
        return ", ".join(f"`{name}: {_kind(each)}`" for name, each in value.items())
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def presets() -> Lines:
    """What each preset writes into `learner:`."""
    from mmrl_ray.algorithms.registry import PRESETS

    yield from ("| `algorithm` | defaults that it sets |", "|---|---|")
    for name, values in PRESETS.items():
        told = ", ".join(f"`{key}: {value}`" for key, value in _flat(values))
        yield f"| `{name}` | {told} |"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value).lower() if isinstance(value, bool) else value
