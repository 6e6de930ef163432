"""`mmrl …`: parses the command line, then imports what the command needs.

Nothing heavy is imported at the top: `mmrl --help` and `mmrl config schema` answer at once. Exit codes: 0 done, 1 a
failure, 2 a wrong config or command line, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from mmrl_ray.errors import ConfigError, Interrupted, MMRLError, RunError

if TYPE_CHECKING:
    from mmrl_ray.config import Config
    from mmrl_ray.data.importers import ImportSummary

# Boxes and colours on a terminal, plain lines elsewhere; typer decides once for help and usage errors.
_MARKUP: Literal["rich"] | None = "rich" if sys.stdout.isatty() and sys.stderr.isatty() else None

app = typer.Typer(
    name="mmrl",
    help="Reinforcement-learning fine-tuning of vision-language models on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=_MARKUP,
)
config_app = typer.Typer(name="config", help="Look at configs.", no_args_is_help=True, rich_markup_mode=_MARKUP)
data_app = typer.Typer(name="data", help="Make datasets.", no_args_is_help=True, rich_markup_mode=_MARKUP)
import_app = typer.Typer(
    name="import", help="Bring a dataset in as Parquet shards.", no_args_is_help=True, rich_markup_mode=_MARKUP
)
data_app.add_typer(import_app)
app.add_typer(config_app)
app.add_typer(data_app)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; may be repeated.", show_default=False),
]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", show_default=False)]

_FULL = (errno.ENOSPC, errno.EDQUOT)


def _command(group: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command that ends every expected failure with one line and an exit code; adds `--debug` to it.

    A command that has a `debug` parameter itself is told, too.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        told = "debug" in signature.parameters

        @functools.wraps(function)
        def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
            _guarded(functools.partial(function, *args, **kwargs, **({"debug": debug} if told else {})), debug)

        parameters = {**signature.parameters}
        parameters["debug"] = inspect.Parameter(
            "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DEBUG
        )
        run.__signature__ = signature.replace(parameters=[*parameters.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {key: parameter.annotation for key, parameter in parameters.items()}
        return group.command(name)(run)

    return register


def _guarded(function: Callable[[], None], debug: bool) -> None:
    """The one place where exceptions become exit codes. A bug (any other exception) keeps its traceback."""
    try:
        function()
    except KeyboardInterrupt as error:
        _fail(error, "interrupted", 130, debug)
    except Interrupted as error:
        _fail(error, str(error) or "interrupted", 130, debug)
    except OSError as error:
        if isinstance(error, MMRLError) or error.errno not in _FULL:
            _fail_or_raise(error, debug)
        where = f" while writing {error.filename}" if error.filename else ""
        _fail(error, f"the disk is full{where}: make room, then go on with --resume", 1, debug)
    except Exception as error:  # noqa: BLE001  # boundary: what is no expected failure is raised again
        _fail_or_raise(error, debug)


def _fail_or_raise(error: Exception, debug: bool) -> NoReturn:
    # Ray raises an actor's error as a RayTaskError whose text is the remote traceback; its cause is the error itself.
    cause = getattr(error, "cause", None)
    known = cause if isinstance(cause, MMRLError) else error
    if isinstance(known, Interrupted):
        _fail(error, str(known) or "interrupted", 130, debug)
    if not isinstance(known, MMRLError):
        raise error
    _fail(error, str(known), 2 if isinstance(known, ConfigError) else 1, debug)


def _fail(error: BaseException, message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    for line in message.splitlines() or [type(error).__name__]:
        typer.echo(f"{typer.style('error:', fg='red')} {line}", err=True)
    raise typer.Exit(code)


@_command(app, "train")
def train(
    target: Annotated[str, typer.Argument(metavar="CONFIG|RUN", help="A YAML config, or with --resume a run folder.")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    *,
    debug: bool = False,
) -> None:
    """Fine-tune by reinforcement learning: config in, finished run folder out."""
    cfg = _config_of(target, set_, resume)
    if dry_run:
        from mmrl_ray.runs.dry_run import dry_run as show

        show(cfg, resume=resume)
        return
    from mmrl_ray.runs.train import train as run

    run(cfg, resume=resume, debug=debug)


@_command(app, "sft")
def sft(config: ConfigFile, set_: Overrides = None) -> None:
    """Only the supervised warm start: train on the references, print the folder of the result."""
    cfg = _load(config, set_)
    if cfg.sft is None:
        raise ConfigError(f"{config}: has no `sft:` section: add one with `steps:`")
    from mmrl_ray.runs.progress import RunProgress
    from mmrl_ray.runs.warm_start import warm_start

    with RunProgress() as shown:
        folder = warm_start(cfg, progress=shown.phase("warm start"))
    typer.echo(folder)


@_command(app, "evaluate")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, a model folder or a hub id.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Parquet shards; a run's own held-out split otherwise.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many rows.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the figures and captions here, as JSON.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="For rows that bring none; a run's own else.")] = None,
) -> None:
    """Caption a dataset and score it: BLEU-1 to 4, CIDEr-D, ROUGE-L, reward parts."""
    from mmrl_ray.runs.evaluate import evaluate as run

    run(target, data=data, limit=limit, out=out, prompt=prompt)


@_command(app, "caption")
def caption(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="PNG, JPEG, WebP or GIF files.")],
    run: Annotated[str | None, typer.Option("--run", help="A run folder: its base and its trained adapter.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A model folder or hub id instead.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What to ask; the run's own by default.")] = None,
) -> None:
    """Print one caption an image."""
    if (run is None) == (model is None):
        raise ConfigError("give either --run RUN or --model MODEL")
    from mmrl_ray.runs.captioning import caption as make

    make(images, run=run, model=model, prompt=prompt)


@_command(app, "report")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write a run's report.html again."""
    from mmrl_ray.runs.report import write_report

    typer.echo(str(write_report(run)))


@_command(config_app, "schema")
def config_schema() -> None:
    """Print the JSON Schema of a config."""
    from mmrl_ray.config.load import config_schema as schema

    _show(json.dumps(schema(), indent=2, ensure_ascii=False), "json")


@_command(config_app, "show")
def config_show(config: ConfigFile, set_: Overrides = None) -> None:
    """Print a config with its preset and every default written out."""
    from mmrl_ray.config.load import dump_config

    _show(dump_config(_load(config, set_)), "yaml")


_OUT = Annotated[Path, typer.Option("--out", help="Folder (or one .parquet file) to write; must not exist yet.")]
_EMBED = Annotated[bool, typer.Option("--embed/--no-embed", help="Image bytes in the shards, or files beside them.")]
_BUDGET = Annotated[int, typer.Option("--max-quarantined", min=0, help="Broken images to leave out before giving up.")]


@_command(import_app, "coco")
def import_coco(
    images: Annotated[
        Path, typer.Option("--images", help="Image folder; for Karpathy's splits the one above train2014/.")
    ],
    out: _OUT,
    annotations: Annotated[Path | None, typer.Option("--annotations", help="A captions_*.json file.")] = None,
    karpathy: Annotated[Path | None, typer.Option("--karpathy", help="dataset_coco.json instead.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Of Karpathy's: train+restval (default), val, test.")
    ] = None,
    embed: _EMBED = True,
    max_quarantined: _BUDGET = 20,
) -> None:
    """Import COCO captions."""
    from mmrl_ray.data.importers import import_coco as run

    if (annotations is None) == (karpathy is None):
        raise ConfigError("give either --annotations captions_*.json or --karpathy dataset_coco.json")
    what = functools.partial(run, annotations, images, out, karpathy=karpathy, split=split)
    _import(functools.partial(what, embed=embed, max_quarantined=max_quarantined))


@_command(import_app, "jsonl")
def import_jsonl(
    file: Annotated[Path, typer.Argument(metavar="FILE", help='Lines like {"image": "a.jpg", "captions": ["…"]}.')],
    out: _OUT,
    images: Annotated[
        Path | None, typer.Option("--images", help="What image paths start from; else FILE's folder.")
    ] = None,
    embed: _EMBED = True,
    max_quarantined: _BUDGET = 20,
) -> None:
    """Import JSON lines with image paths."""
    from mmrl_ray.data.importers import import_jsonl as run

    _import(functools.partial(run, file, out, images=images, embed=embed, max_quarantined=max_quarantined))


@_command(data_app, "scenes")
def scenes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that gets train/ and eval/.")],
    train: Annotated[int, typer.Option("--train", min=1, help="Training images.")] = 2000,
    held_out: Annotated[int, typer.Option("--eval", min=1, help="Held-out images.")] = 200,
    image_size: Annotated[int, typer.Option("--image-size", min=32, max=1024, help="Pixels a side.")] = 64,
    max_objects: Annotated[int, typer.Option("--max-objects", min=1, max=3, help="Objects a picture has at most.")] = 3,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Generate the scenes dataset: coloured shapes with five captions each."""
    from mmrl_ray.config.data import ScenesSection
    from mmrl_ray.data.scenes import write_scenes

    section = ScenesSection(train=train, eval=held_out, image_size=image_size, seed=seed, max_objects=max_objects)
    written = write_scenes(section, out / "train", out / "eval")
    typer.echo(f"{out}: {train:,} training and {held_out:,} held-out images{'' if written else ', there already'}")


def _import(run: Callable[..., ImportSummary]) -> None:
    """Runs an importer with live progress; tells what was written and what was left out."""
    from mmrl_ray.runs.progress import RunProgress

    with RunProgress() as shown:
        update = shown.phase("import")
        summary = run(progress=lambda done, total: update(done, total or done + 1, {}))
    typer.echo(f"{summary.out}: {summary.rows:,} images, {summary.references:,} references")
    for record in summary.quarantined:
        typer.echo(f"left out: {record.sample_id} ({record.where}): {record.reason}", err=True)


def _load(path: Path, overrides: list[str] | None) -> Config:
    from mmrl_ray.config.load import load_config

    return load_config(path, overrides or ())


def _config_of(target: str, overrides: list[str] | None, resume: bool) -> Config:
    """The config to train: a file, or the resolved one of the run folder that is resumed, wherever it lies now."""
    if not resume or (Path(target).suffix in (".yaml", ".yml") and not Path(target).is_dir()):
        return _load(Path(target), overrides)
    from mmrl_ray.config.load import parse_config
    from mmrl_ray.run_dir import RunDir

    run = RunDir.at(target)
    cfg = parse_config(run.read_text("config.yaml"), f"{target.rstrip('/')}/config.yaml", overrides or ())
    with contextlib.suppress(RunError):  # its folder was renamed or is reached by another path
        if RunDir.open(cfg.run.root, cfg.run.name).location == run.location:
            return cfg
    root = run.location[: -len(run.name)].rstrip("/")
    return cfg.model_copy(update={"run": cfg.run.model_copy(update={"root": root, "name": run.name})})


def _show(text: str, language: str) -> None:
    """Coloured on a terminal, plain elsewhere."""
    if not sys.stdout.isatty():
        typer.echo(text.rstrip("\n"))
        return
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(text, language, background_color="default", word_wrap=True))


def main() -> None:
    """The `mmrl` program."""
    app()


if __name__ == "__main__":
    main()
