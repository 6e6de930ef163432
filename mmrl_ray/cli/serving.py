"""Commands around serving: start the gateway, caption and score through it, manage its keys, render manifests."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mmrl_ray.cli.program import (
    AsJson,
    Beta,
    Checkpoint,
    ConfigFile,
    Overrides,
    app,
    command,
    deploy_app,
    keys_app,
    show_columns,
    show_json,
)
from mmrl_ray.errors import ConfigError

if TYPE_CHECKING:
    from mmrl_ray.serving.keys import KeyRecord, KeyRole, KeyStore

_AT_A_TIME = 16
_URL = typer.Option("--url", help="A gateway; its key comes from MMRL_API_KEY.")
_DATABASE = Annotated[
    str | None,
    typer.Option("--database", metavar="URL", help="Where the keys are, for SQLAlchemy; the gateway's default else."),
]


@command(app, "serve")
def serve(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET…", help="A serve config, a model, or run folders: adapters served beside their base."
        ),
    ],
    address: Annotated[str | None, typer.Option("--address", help="A Ray to serve on; a new local one else.")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Where the gateway listens.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65_535, help="And on which port.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No keys; on a loopback address only.")] = False,
    checkpoint: Checkpoint = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the Serve config file, and do nothing.")
    ] = False,
    set_: Overrides = None,
) -> None:
    """Serve a policy and its reward behind an OpenAI-compatible HTTP gateway."""
    from mmrl_ray.config.paths import refuse_unknown

    for target in targets:  # before anything that takes seconds to import
        if Path(target).suffix not in (".yaml", ".yml"):
            refuse_unknown(target)
    from mmrl_ray.training.serve import serve as run

    run(
        targets,
        address=address,
        host=host,
        port=port,
        insecure=insecure,
        checkpoint=checkpoint,
        print_config=print_config,
        overrides=set_ or (),
    )


@command(app, "caption")
def caption(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="PNG, JPEG, WebP or GIF files.")],
    run: Annotated[str | None, typer.Option("--run", help="A run folder: its base and its trained adapter.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A model folder or hub id instead; with --url a served model's id.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What to ask; the run's own by default.")] = None,
    url: Annotated[str | None, _URL] = None,
    beta: Beta = None,
    n: Annotated[int, typer.Option("-n", min=1, max=256, help="Captions an image, a line each.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, max=2.0, help="0 is greedy; by default 0 for one caption, 1 for more."),
    ] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Print one caption an image, or several."""
    if url is not None:
        if checkpoint is not None:
            raise ConfigError("--checkpoint is of a run on this machine; a server is told by its own --checkpoint")
        if beta is not None:
            raise ConfigError("--beta is of a run on this machine; a served adapter has the beta of its own run")
        if run is not None:
            raise ConfigError("give either --url URL, with --model ID if it serves several, or --run RUN")
        _caption_by(url, images, model, prompt, n, temperature)
        return
    if (run is None) == (model is None):
        raise ConfigError("give --run RUN, --model MODEL or --url URL")
    from mmrl_ray.config.paths import refuse_no_run, refuse_unknown

    if run is not None:
        refuse_no_run(run)
    else:
        refuse_unknown(model or "")
    from mmrl_ray.api.inference import caption as make
    from mmrl_ray.training.interrupts import StopOnInterrupt

    with StopOnInterrupt():
        target = run or model or ""
        made = make(target, images, prompt=prompt, beta=beta, n=n, temperature=temperature, checkpoint=checkpoint)
    for path, texts in zip(images, made, strict=True):
        _print_captions(path, texts, is_alone=len(images) == 1)


def _print_captions(path: Path, texts: Sequence[str], *, is_alone: bool) -> None:
    """One a line, after the picture's file where there are several."""
    from mmrl_ray.telemetry.terminal import visible

    for text in map(str.strip, texts):
        if is_alone and len(texts) == 1:
            typer.echo(text)
        else:
            typer.echo(visible(text if is_alone else f"{path}: {text}"))


@command(app, "score")
def score(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG, WebP or GIF file.")],
    captions: Annotated[list[str], typer.Argument(metavar="CAPTION…", help="What to score.")],
    url: Annotated[str, _URL],
    references: Annotated[
        list[str] | None, typer.Option("--reference", help="A right caption; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the reward of each caption of an image, and its parts."""
    from mmrl_ray.client import Client
    from mmrl_ray.telemetry.terminal import visible

    with Client(url) as client:
        rewards = client.rewards(image, captions, references=references or ()).rewards
    if as_json:
        show_json([{"caption": text, **asdict(reward)} for text, reward in zip(captions, rewards, strict=True)])
        return
    for caption, reward in zip(captions, rewards, strict=True):
        if reward.total is None:
            typer.echo(f"no reward  {caption}  ({reward.error})")
            continue
        parts = "  ".join(f"{name}={value:.4f}" for name, value in reward.parts.items())
        sigma = "" if reward.sigma is None else f" ± {reward.sigma:.4f}"
        typer.echo(visible(f"{reward.total:.4f}{sigma}  {caption}  ({parts})"))


def _caption_by(
    url: str, images: list[Path], model: str | None, prompt: str | None, n: int, temperature: float | None
) -> None:
    """Asks for several captions at a time: the policy decodes them together."""
    from mmrl_ray.client import Client

    pool = ThreadPoolExecutor(_AT_A_TIME)
    with Client(url) as client:
        ask = functools.partial(client.caption, model=model, prompt=prompt, n=n, temperature=temperature)
        try:
            for path, made in zip(images, pool.map(ask, images), strict=True):
                _print_captions(path, [caption.text for caption in made.captions], is_alone=len(images) == 1)
        finally:
            pool.shutdown(cancel_futures=True)


@command(keys_app, "create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; for the list.")],
    roles: Annotated[
        list[str] | None, typer.Option("--role", help="infer (by default), feedback or admin; may be repeated.")
    ] = None,
    days: Annotated[int | None, typer.Option("--days", min=1, max=36_500, help="It ends after so many days.")] = None,
    database: _DATABASE = None,
) -> None:
    """Make a key and print it, this one time."""
    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    key, record = _store(database).create(name, cast("list[KeyRole]", roles or ["infer"]), expires)
    typer.echo(f"{record.id}: key of {record.name} ({_roles(record)}); it is not shown again", err=True)
    typer.echo(key)


@command(keys_app, "list")
def show(database: _DATABASE = None, as_json: AsJson = False) -> None:
    """List the keys that were made, but for what is secret in them."""
    now = datetime.now(UTC)
    found = _store(database).list()
    if as_json:
        show_json([_facts(record) for record in found])
        return
    rows = [("ID", "BEGINS", "NAME", "ROLES", "CREATED", "ENDS")]
    rows += [(r.id, f"{r.prefix}…", r.name, _roles(r), f"{r.created:%Y-%m-%d}", _end(r, now)) for r in found]
    show_columns(rows)


@command(keys_app, "revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `mmrl keys list` shows it.")],
    database: _DATABASE = None,
) -> None:
    """End a key for good."""
    from mmrl_ray.serving.keys import CACHE_S

    record = _store(database).revoke(key_id)
    typer.echo(f"{record.id}: key of {record.name} is revoked; gateways refuse it within {CACHE_S:g} s")


def _store(database: str | None) -> KeyStore:
    from mmrl_ray.serving.keys import KeyStore, default_database

    return KeyStore(database or default_database())


def _facts(record: KeyRecord) -> dict[str, Any]:
    times = {name: getattr(record, name) for name in ("created", "expires", "revoked")}
    facts = {"id": record.id, "prefix": record.prefix, "name": record.name, "roles": sorted(record.roles)}
    return facts | {name: None if time is None else time.isoformat() for name, time in times.items()}


def _roles(record: KeyRecord) -> str:
    return ",".join(sorted(record.roles))


def _end(record: KeyRecord, now: datetime) -> str:
    if record.revoked is not None:
        return f"revoked {record.revoked:%Y-%m-%d}"
    if record.expires is None:
        return "never"
    return f"{'expired ' if record.expires <= now else ''}{record.expires:%Y-%m-%d}"


class _Kind(StrEnum):
    rayjob = "rayjob"
    rayservice = "rayservice"
    raycluster = "raycluster"


@command(deploy_app, "render")
def render(
    config: ConfigFile,
    kind: Annotated[
        _Kind, typer.Option("--kind", help="A run as a job, what it serves, or a cluster for submitted jobs.")
    ] = _Kind.rayjob,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; printed otherwise.", show_default=False)
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write the Kubernetes manifests (KubeRay) of a config of `mmrl train` or `mmrl serve`."""
    from mmrl_ray.config.load import load_any_config
    from mmrl_ray.deploy.manifests import dump, render

    made_by = ["mmrl", "deploy", "render", str(config), "--kind", kind.value]
    made_by += [word for override in set_ or () for word in ("--set", override)]
    text = f"# {shlex.join(made_by)}\n{dump(render(load_any_config(config, set_ or ()), kind.value))}"
    if out is None:
        typer.echo(text, nl=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    typer.echo(str(out))
