"""What several commands take, and how they read and print configs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mmrl_ray.config import Config

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; may be repeated.", show_default=False),
]
Beta = Annotated[
    float | None,
    typer.Option(
        "--beta",
        min=0.0,
        help="Of log π + β(Q − V), of a run of algorithm: ilql; its own by default, 0 is the plain policy.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.", show_default=False)]


def load(path: Path, overrides: list[str] | None) -> Config:
    """The config in a file, with overrides."""
    from mmrl_ray.config.load import load_config

    return load_config(path, overrides or ())


def show(text: str, language: str) -> None:
    """Prints it: coloured on a terminal, plain elsewhere."""
    if not sys.stdout.isatty():
        typer.echo(text.rstrip("\n"))
        return
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(text, language, background_color="default", word_wrap=True))


def show_json(value: Any) -> None:
    """Prints it indented; NaN is null."""
    from mmrl_ray.run_dir import to_json

    typer.echo(json.dumps(to_json(value), indent=2, ensure_ascii=False, allow_nan=False))


def show_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of texts, the first of them heads, in columns that are as wide as they have to be."""
    from mmrl_ray.telemetry.terminal import visible

    shown = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())
