"""Reference pages out of the program itself: config keys, commands, routes, metrics, events, schemas, functions.

`conf.py` calls `write_all` before Sphinx reads anything; the pages under `reference/` include what it writes.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import typer
from generate_config import Lines, cell, config_reference, presets, prose


def write_all(folder: Path) -> None:
    """Every generated page, written only where it changed, so that Sphinx reads no page twice."""
    folder.mkdir(exist_ok=True)
    pages = {
        "config": config_reference,
        "presets": presets,
        "cli": commands,
        "http": routes,
        "metrics": metrics,
        "figures": figures,
        "events": events,
        "schemas": schemas,
        "python": functions,
    }
    for name, make in pages.items():
        text, path = "\n".join(make()) + "\n", folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# -- the program -------------------------------------------------------------------------------------------------------


def commands() -> Lines:
    """Each command with its arguments and options, groups before what is in them."""
    from mmrl_ray.cli import app

    program: Any = typer.main.get_command(app)
    yield from _command(program, "mmrl", None)


def _command(command: Any, name: str, parent: Any) -> Lines:
    context = command.context_class(command, info_name=name.rsplit(" ", 1)[-1], parent=parent)
    children = getattr(command, "commands", {})
    if parent is not None:
        yield from (f"{'##' if name.count(' ') == 1 else '###'} `{name}`", "")
    yield from (prose(command.help), "")
    if not children:
        yield from ("```text", f"{name} {' '.join(command.collect_usage_pieces(context))}", "```", "")
    records = [each.get_help_record(context) for each in command.params if "--help" not in each.opts]
    rows = [
        f"| `{label}` | {cell(prose(told))} |" for label, told in filter(None, records) if "completion" not in label
    ]
    if rows:
        yield from ("| argument or option | meaning |", "|---|---|", *(_bars_in_code(row) for row in rows), "")
    for label, child in children.items():
        if not child.hidden:
            yield from _command(child, f"{name} {label}", context)


def _bars_in_code(row: str) -> str:
    """A bar inside code would end the cell, too."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("|", "\\|"), row, count=1)


# -- HTTP --------------------------------------------------------------------------------------------------------------


def routes() -> Lines:
    """The gateway's OpenAPI document: routes with their bodies, then the bodies' fields."""
    from mmrl_ray.config.serving import FineTuningSection, ServingSection
    from mmrl_ray.serving.app import GatewayDeps, make_app

    service: Any = object()  # no route is called
    recipe = {"model": {"path": "m"}, "learner": {"steps": 1}}
    tuning = FineTuningSection.model_validate({"models": {"m": recipe}, "datasets": {"d": "d"}, "root": "runs"})
    settings = ServingSection(runs_root="runs", fine_tuning=tuning)
    deps = GatewayDeps(service, service, None, settings, insecure=True, preferences=service, jobs=service)
    document = make_app(deps).openapi()
    for path, methods in sorted(document["paths"].items()):
        for method, route in methods.items():
            yield from (
                f"## `{method.upper()} {path}`",
                "",
                prose(route.get("description") or route.get("summary")),
                "",
            )
            for each in route.get("parameters", []):
                told = prose(each.get("description", "")) or _schema_type(each.get("schema", {}))
                yield f"- `{each['name']}` (in the {each['in']}): {told}"
            for kind, body in route.get("requestBody", {}).get("content", {}).items():
                yield f"- takes `{kind}`: {_schema_type(body['schema'])}"
            for code, answer in route.get("responses", {}).items():
                for kind, body in answer.get("content", {}).items():
                    if code != "default":
                        yield f"- answers {code} `{kind}`: {_schema_type(body.get('schema', {}))}"
            yield ""
    yield from ("## Objects", "")
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield from (f"(http-{name.lower()})=", f"### {name}", "", prose(schema.get("description")), "")
        if "properties" not in schema:
            continue
        yield from ("| field | type | default | |", "|---|---|---|---|")
        for field, each in schema["properties"].items():
            default = (
                "required"
                if field in schema.get("required", ())
                else f"`{each['default']}`"
                if "default" in each
                else ""
            )
            meaning = cell(prose(each.get("description")))
            yield f"| `{field}` | {cell(_schema_type(each))} | {cell(default)} | {meaning} |"
        yield ""


def _schema_type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#http-{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(_schema_type(each) for each in schema[key])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{each}`" for each in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_schema_type(schema.get('items', {}))}"
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        return "form of " + ", ".join(f"`{name}`" for name in schema["properties"])
    return str(schema.get("type", "anything"))


# -- what a run tells --------------------------------------------------------------------------------------------------


def metrics() -> Lines:
    """The table that processes export by and the dashboard asks by."""
    from mmrl_ray.telemetry import table

    yield from ("| name in Prometheus | kind | labels | |", "|---|---|---|---|")
    for each in vars(table).values():
        if isinstance(each, table.Metric):
            names = "<br>".join(f"`{name}`" for name in sorted(each.series))
            labels = ", ".join(f"`{label}`" for label in each.labels)
            yield f"| {names} | {each.kind} | {labels} | {cell(each.text)} |"


def figures() -> Lines:
    """Figures of `metrics.jsonl`, by the report's curves."""
    from mmrl_ray.report.charts import PANELS

    yield from ("| figure (`…/` is a family) | curve of the report | unit |", "|---|---|---|")
    for panel in PANELS:
        names = ", ".join(f"`{name}{'…' if name.endswith('/') else ''}`" for name in panel.names)
        yield f"| {names} | {cell(panel.title)} | {panel.unit} |"


def events() -> Lines:
    """Kinds of events, as the report puts them in words."""
    from mmrl_ray.report.facts import EVENT_WORDS

    yield from ("| `kind` | |", "|---|---|")
    yield from (f"| `{kind}` | {words} |" for kind, words in EVENT_WORDS.items())


def schemas() -> Lines:
    """Columns of each Parquet file, with the comment that stands beside them in the code."""
    from mmrl_ray.data.row import sample_schema
    from mmrl_ray.evaluation.records import EVAL_SCHEMA, STATE_SCHEMA
    from mmrl_ray.experience.schema import ROLLOUT_SCHEMA
    from mmrl_ray.preferences.schema import PREFERENCE_SCHEMA

    found = {
        "Datasets: `data.train`, `data.eval`": (sample_schema(several_images=False), "mmrl_ray.data.row"),
        "Rollout log: `rollouts/*.parquet`": (ROLLOUT_SCHEMA, "mmrl_ray.experience.schema"),
        "Evaluations: `eval/*.parquet`": (EVAL_SCHEMA, "mmrl_ray.evaluation.records"),
        "States: `analysis/*.parquet`": (STATE_SCHEMA, "mmrl_ray.evaluation.records"),
        "Preferences": (PREFERENCE_SCHEMA, "mmrl_ray.preferences.schema"),
    }
    for title, (schema, module) in found.items():
        yield from (f"## {title}", "", *_columns(schema, importlib.import_module(module)), "")


def _columns(schema: pa.Schema, module: types.ModuleType) -> Lines:
    source = inspect.getsource(module)
    remarks = dict(re.findall(r'pa\.field\("(\w+)",.*?\),\s+# (.+)', source))
    yield from ("| column | type | null | |", "|---|---|---|---|")
    for field in schema:
        null = "yes" if field.nullable else ""
        yield f"| `{field.name}` | `{field.type}` | {null} | {cell(remarks.get(field.name, ''))} |"


# -- Python ------------------------------------------------------------------------------------------------------------

PUBLIC: dict[str, Sequence[str]] = {
    "Runs": ("mmrl_ray.api.training", "mmrl_ray.api.run", "mmrl_ray.api.inference"),
    "Losses and advantages": (
        "mmrl_ray.losses.advantages",
        "mmrl_ray.losses.aggregation",
        "mmrl_ray.losses.policy_gradient",
        "mmrl_ray.losses.regularizers",
        "mmrl_ray.losses.td",
        "mmrl_ray.losses.uncertainty",
        "mmrl_ray.losses.dpo",
        "mmrl_ray.losses.ilql",
        "mmrl_ray.losses.schedule",
    ),
    "Fusions": ("mmrl_ray.reward_model.fusion",),
    "Rewards": ("mmrl_ray.rewards.base", "mmrl_ray.rewards.captioning", "mmrl_ray.rewards.multimodal"),
    "Measures": (
        "mmrl_ray.metrics.overlap",
        "mmrl_ray.metrics.statistics",
    ),
    "Exploration": ("mmrl_ray.algorithms.dqn.exploration",),
    "Analysis": ("mmrl_ray.analysis.attribution", "mmrl_ray.analysis.pca", "mmrl_ray.analysis.correlation"),
    "Client": ("mmrl_ray.client",),
}
"""What other programs may import. `train`, `load_run`, `evaluate` and `caption` are names of `mmrl_ray`, too."""


def functions() -> Lines:
    """Public names of each module, with their docstrings."""
    for title, modules in PUBLIC.items():
        yield from (f"## {title}", "")
        for name in modules:
            module = importlib.import_module(name)
            yield from (f"### `{name}`", "", prose((module.__doc__ or "").split("\n\n")[0]), "")
            for label, each in _public(module):
                yield from _documented(f"{name}.{label}", each)


def _public(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """What it exports, wherever that is defined; its own names where it does not say."""
    exported = getattr(module, "__all__", None)
    for label, each in vars(module).items():
        own = not label.startswith("_") and getattr(each, "__module__", None) == module.__name__
        described = inspect.isfunction(each) or (inspect.isclass(each) and each.__doc__)
        if described and (own if exported is None else label in exported):
            yield label, each


def _documented(path: str, each: Any, depth: int = 0) -> Lines:
    fence = ":" * (6 - depth)
    kind = ("class" if inspect.isclass(each) else "method") if depth or inspect.isclass(each) else "function"
    yield from (f"{fence}{{py:{kind}}} {path}{_signature(each)}", "", *_markdown(inspect.getdoc(each) or ""), "")
    if inspect.isclass(each) and not dataclasses.is_dataclass(each):
        for label, method in vars(each).items():
            if inspect.isfunction(method) and not label.startswith("_") and method.__doc__:
                yield from _documented(label, method, depth + 1)
    yield from (fence, "")


def _signature(each: Any) -> str:
    try:
        told = str(inspect.signature(each))
    except (TypeError, ValueError):
        return ""
    return re.sub(r"<[^>]*>", "…", told.replace("'", "")).replace("\n", " ")


def _markdown(doc: str) -> Lines:
    """A docstring with its `Args:` and the like as lists."""
    indented = False
    for line in doc.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Yields|Example|Attributes):", line):
            indented = True
            yield from ("", f"**{line[:-1]}**", "")
        elif indented and (entry := re.match(r"    (\w[\w, ]*): (.*)", line)):
            yield f"- `{entry[1]}`: {entry[2]}"
        elif indented and line.startswith("    "):
            yield f"  {line.strip()}"
        else:
            indented = indented and not line.strip()
            yield line
