"""How a command ends: every expected failure is one line and an exit code."""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from mmrl_ray.errors import ConfigError, Interrupted, MMRLError
from mmrl_ray.telemetry.logs import logs_json

logger = logging.getLogger(__name__)

_DEBUG = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", show_default=False)]

_FULL = (errno.ENOSPC, errno.EDQUOT)


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
