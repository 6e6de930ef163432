"""The program and its groups of commands, which the other modules fill."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from mmrl_ray import __version__

# Boxes and colours on a terminal, plain lines elsewhere; typer decides once for help and usage errors.
_MARKUP: Literal["rich"] | None = "rich" if sys.stdout.isatty() and sys.stderr.isatty() else None

app = typer.Typer(
    name="mmrl",
    pretty_exceptions_enable=False,
    rich_markup_mode=_MARKUP,
)
runs_app = typer.Typer(name="runs", help="Runs there are.", no_args_is_help=True, rich_markup_mode=_MARKUP)
config_app = typer.Typer(name="config", help="Look at configs.", no_args_is_help=True, rich_markup_mode=_MARKUP)
data_app = typer.Typer(name="data", help="Make datasets.", no_args_is_help=True, rich_markup_mode=_MARKUP)
import_app = typer.Typer(
    name="import", help="Bring a dataset in as Parquet shards.", no_args_is_help=True, rich_markup_mode=_MARKUP
)
keys_app = typer.Typer(name="keys", help="Who may call the gateway.", no_args_is_help=True, rich_markup_mode=_MARKUP)
preferences_app = typer.Typer(
    name="preferences", help="Which of two captions people like better.", no_args_is_help=True, rich_markup_mode=_MARKUP
)
reward_app = typer.Typer(name="reward", help="Learned rewards.", no_args_is_help=True, rich_markup_mode=_MARKUP)
jobs_app = typer.Typer(name="jobs", help="Runs on a cluster.", no_args_is_help=True, rich_markup_mode=_MARKUP)
deploy_app = typer.Typer(name="deploy", help="Run on Kubernetes.", no_args_is_help=True, rich_markup_mode=_MARKUP)
data_app.add_typer(import_app)
app.add_typer(runs_app)
app.add_typer(config_app)
app.add_typer(data_app)
app.add_typer(keys_app)
app.add_typer(preferences_app)
app.add_typer(reward_app)
app.add_typer(jobs_app)
app.add_typer(deploy_app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmrl {__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Reinforcement-learning fine-tuning of vision-language models on Ray."""
