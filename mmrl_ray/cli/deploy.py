"""Commands that put runs and servers onto Kubernetes."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmrl_ray.cli.groups import deploy_app
from mmrl_ray.cli.guard import command
from mmrl_ray.cli.options import ConfigFile, Overrides


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
