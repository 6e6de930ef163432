"""Commands around a served model: start the gateway, caption and score through it."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mmrl_ray.cli.groups import app
from mmrl_ray.cli.guard import command
from mmrl_ray.cli.options import AsJson, Beta, Overrides, show_json
from mmrl_ray.errors import ConfigError

_AT_A_TIME = 16
_URL = typer.Option("--url", help="A gateway; its key comes from MMRL_API_KEY.")


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
    from mmrl_ray.runs.serve import serve as run

    run(
        targets,
        address=address,
        host=host,
        port=port,
        insecure=insecure,
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
) -> None:
    """Print one caption an image, or several."""
    if url is not None:
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
    from mmrl_ray.runs.captioning import caption as make
    from mmrl_ray.runs.interrupts import StopOnInterrupt

    with StopOnInterrupt():
        make(images, run=run, model=model, prompt=prompt, beta=beta, n=n, temperature=temperature)


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
    from mmrl_ray.telemetry.terminal import visible

    pool = ThreadPoolExecutor(_AT_A_TIME)
    with Client(url) as client:
        ask = functools.partial(client.caption, model=model, prompt=prompt, n=n, temperature=temperature)
        try:
            for path, made in zip(images, pool.map(ask, images), strict=True):
                for caption in made.captions:
                    text = caption.text.strip()
                    typer.echo(
                        text if len(images) == n == 1 else visible(text if len(images) == 1 else f"{path}: {text}")
                    )
        finally:
            pool.shutdown(cancel_futures=True)
