"""What several commands take, and how they read and print configs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
