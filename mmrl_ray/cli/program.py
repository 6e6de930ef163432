"""The `mmrl` program: its groups of commands, how every command ends, and the options that several take."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from mmrl_ray import __version__
from mmrl_ray.api.host import own_process
from mmrl_ray.errors import ConfigError, Interrupted, MMRLError
from mmrl_ray.telemetry.logs import logs_json

if TYPE_CHECKING:
    from mmrl_ray.config import Config

# Boxes and colours on a terminal, plain lines elsewhere; typer decides once for help and usage errors.
_MARKUP: Literal["rich"] | None = "rich" if sys.stdout.isatty() and sys.stderr.isatty() else None

app = typer.Typer(
    name="mmrl",
    pretty_exceptions_enable=False,
    rich_markup_mode=_MARKUP,
)


def _group(name: str, about: str, parent: typer.Typer = app) -> typer.Typer:
    """A group of commands, in the order in which help lists them."""
    group = typer.Typer(name=name, help=about, no_args_is_help=True, rich_markup_mode=_MARKUP)
    parent.add_typer(group)
    return group


runs_app = _group("runs", "Runs there are.")
config_app = _group("config", "Look at configs.")
data_app = _group("data", "Make datasets.")
import_app = _group("import", "Bring a dataset in as Parquet shards.", data_app)
keys_app = _group("keys", "Who may call the gateway.")
preferences_app = _group("preferences", "Which of two captions people like better.")
reward_app = _group("reward", "Learned rewards.")
jobs_app = _group("jobs", "Runs on a cluster.")
engine_app = _group("engine", "Engines that have an environment of their own.")
deploy_app = _group("deploy", "Run on Kubernetes.")
logger = logging.getLogger(__name__)

_DEBUG = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", show_default=False)]

_FULL = (errno.ENOSPC, errno.EDQUOT)
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
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="best|last|N",
        help="Which of a run's checkpoints, N of a step; by default the best of a run with eval.every, else the last.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.", show_default=False)]


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


def command(group: typer.Typer, name: str, *, failure: int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command that ends every expected failure with one line and an exit code; adds `--debug` to it.

    A command that has a `debug` parameter itself is told, too. `failure` is the exit code of what the user did not
    write wrong.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        told = "debug" in signature.parameters

        @functools.wraps(function)
        def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
            guarded(functools.partial(function, *args, **kwargs, **({"debug": debug} if told else {})), debug, failure)

        parameters = {**signature.parameters}
        parameters["debug"] = inspect.Parameter(
            "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DEBUG
        )
        run.__signature__ = signature.replace(parameters=[*parameters.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {key: parameter.annotation for key, parameter in parameters.items()}
        return group.command(name)(run)

    return register


def guarded(function: Callable[[], None], debug: bool, failure: int = 1) -> None:
    """The one place where exceptions become exit codes. A bug (any other exception) keeps its traceback."""
    try:
        with own_process():
            function()
    except KeyboardInterrupt as error:
        _fail(error, "interrupted", 130, debug)
    except Interrupted as error:
        _fail(error, str(error) or "interrupted", 130, debug)
    except OSError as error:
        if isinstance(error, MMRLError) or error.errno not in _FULL:
            _fail_or_raise(error, debug, failure)
        where = f" while writing {error.filename}" if error.filename else ""
        _fail(error, f"the disk is full{where}: make room, then go on with --resume", 1, debug)
    except Exception as error:  # noqa: BLE001  # boundary: what is no expected failure is raised again
        _fail_or_raise(error, debug, failure)


def _fail_or_raise(error: Exception, debug: bool, failure: int) -> NoReturn:
    # Ray raises an actor's error as a RayTaskError whose text is the remote traceback; its cause is the error itself.
    cause = getattr(error, "cause", None)
    known = cause if isinstance(cause, MMRLError) else error
    if isinstance(known, Interrupted):
        _fail(error, str(known) or "interrupted", 130, debug)
    if not isinstance(known, MMRLError):
        raise error
    _fail(error, str(known), 2 if isinstance(known, ConfigError) else failure, debug)


def _fail(error: BaseException, message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    if logs_json():
        logger.error(message, exc_info=error)
        raise typer.Exit(code)
    from mmrl_ray.telemetry.terminal import visible

    for line in message.splitlines() or [type(error).__name__]:
        typer.echo(f"{typer.style('error:', fg='red')} {visible(line)}", err=True)
    raise typer.Exit(code)


def load(path: Path, overrides: list[str] | None, *, given: Mapping[str, Any] | None = None) -> Config:
    """The config in a file, with overrides; `given` are sections that it need not have."""
    from mmrl_ray.config.load import load_config

    return load_config(path, overrides or (), given=given)


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
    from mmrl_ray.run_records.run_dir import to_json

    typer.echo(json.dumps(to_json(value), indent=2, ensure_ascii=False, allow_nan=False))


def show_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of texts, the first of them heads, in columns that are as wide as they have to be."""
    from mmrl_ray.telemetry.terminal import visible

    shown = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())
