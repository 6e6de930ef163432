"""`mmrl check`: the start-up comparison by hand, before anybody builds on a model, and what a run would make of it.

A picture and a few words go the way of every sample; sampler, learner (each path, with the adapter on) and
transformers' own forward say what they think of the same completions (`policy/parity.py`).
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from mmrl_ray.config import Config
from mmrl_ray.config.load import load_config, parse_config
from mmrl_ray.data.images import decode_image, encode_png
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, MMRLError
from mmrl_ray.evaluation.captioning import read_image
from mmrl_ray.planning.estimate import batch_plan, learner_memory, rollout_memory
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.lora.targets import left_out, resolve_targets
from mmrl_ray.policy.memory import model_shape
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import Comparison, compare, disagreement
from mmrl_ray.policy.prompts import check_context, encode_prompts
from mmrl_ray.run_records.run_dir import to_json
from mmrl_ray.telemetry.terminal import PlainTable
from mmrl_ray.tracking.places import places_of
from mmrl_ray.training.warm_start import model_folder

_SIZE = (320, 240)
_SMALLER = (96, 64)
_OTHER_PROMPT = "What is in this picture? Say it in one short sentence."
_BUILTIN = "builtin:"
# No run is made of it: what stands here is what a config cannot do without.
_NO_RUN = "run: {{name: check}}\nmodel: {{path: {path}}}\ndata: {{train: none}}\nlearner: {{steps: 1}}\n"


@dataclass
class Checked:
    """What was found out about a model."""

    facts: dict[str, Any] = field(default_factory=dict)
    """JSON-able, in the order in which it is told."""
    error: MMRLError | None = None
    """Why the model is not to be used."""


def check(
    model: str,
    *,
    image: Path | None = None,
    prompt: str | None = None,
    as_json: bool = False,
    overrides: list[str] | None = None,
    console: Console | None = None,
) -> None:
    """Prints what `check_model` finds, as a table or as one JSON object.

    Raises:
        ConfigError: a config or an override is wrong.
        DataError, ImageError: the picture cannot be used.
        MMRLError: the model cannot be used, or sampler, learner and transformers do not agree.
    """
    picture = None if image is None else read_image(image)  # before the model is loaded: a typo answers at once
    cfg = check_config(model, overrides or [])
    found = check_model(cfg, picture, prompt=prompt)
    if is_run_config(model):
        found.facts["tracking"] = {place.tracker: place.told for place in places_of(cfg)}
    if as_json:
        told = {**found.facts, "error": None if found.error is None else str(found.error)}
        print(json.dumps(to_json(told), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _show(found.facts, console or Console(highlight=False))
    if found.error is not None:
        raise found.error


def check_config(model: str, overrides: list[str]) -> Config:
    """The config of a model: a run's where `model` is a YAML file, else that of a run with all defaults.

    Raises:
        ConfigError: as `load_config`; or the model is a built-in one, which there is only with a run's data.
    """
    if model.startswith(_BUILTIN):
        raise ConfigError(
            f"{model} takes its words from the training references of a run: check that run's YAML config"
        )
    if is_run_config(model):
        return load_config(model, overrides)
    return parse_config(_NO_RUN.format(path=json.dumps(model)), model, overrides)


def is_run_config(model: str) -> bool:
    """Whether it names a run's YAML file, and not a model."""
    return Path(model).suffix in (".yaml", ".yml") and not Path(model).is_dir()


def check_model(cfg: Config, picture: bytes | None = None, *, prompt: str | None = None) -> Checked:
    """Loads the model of a config, compares, and counts what a run of that config would need.

    Args:
        cfg: model, adapter, precision, temperature and sizes of a run.
        picture: an encoded image; a generated one otherwise.
        prompt: what to ask; by default what the config asks.
    """
    found = Checked(facts={"model": cfg.model.path, "agree": False})
    try:
        with tempfile.TemporaryDirectory(prefix="mmrl-") as scratch:
            path = model_folder(cfg, Path(scratch))
            _look(cfg, path, picture, cfg.data.prompt if prompt is None else prompt, found)
    except MMRLError as error:
        found.error = error
    return found


def _look(cfg: Config, path: str, picture: bytes | None, prompt: str, found: Checked) -> None:
    """Fills in `found` as far as it gets."""
    policy = load_policy(cfg.model.model_copy(update={"path": path}))
    found.facts |= _model_facts(policy)
    shown = picture if picture is not None else _generated(_SIZE)
    # Of another length, so that padding is compared, too.
    samples = [Sample("picture", (shown,), prompt), Sample("other", (_generated(_SMALLER),), _OTHER_PROMPT)]
    prompts = encode_prompts(policy, samples)
    for each in prompts:
        check_context(policy, each, cfg.rollout.max_new_tokens)
    tokens = prompts[0].input_ids.numel()
    image_tokens = int((prompts[0].input_ids == policy.placeholder_id).sum())
    size = decode_image(shown).size
    found.facts["picture"] = {
        "size": f"{size[0]}x{size[1]}",
        "image_tokens": image_tokens,
        "prompt_tokens": tokens,
        "context_length": policy.context_length,
    }
    found.facts["lora"] = _lora_facts(cfg, policy)
    found.facts["memory"] = _memory(cfg, policy, tokens, image_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        add_adapter(policy, cfg.model.lora, cfg.run.seed)
    comparison = compare(policy, prompts, temperature=cfg.rollout.temperature, others=("packed",))
    found.facts |= _figures(comparison)
    found.error = disagreement(policy, comparison)
    found.facts["agree"] = found.error is None


def _model_facts(policy: Policy) -> dict[str, Any]:
    model, processor = policy.hf_model, policy.processor

    def say(token: int) -> str:
        """Ids of a vocabulary that was padded have no name."""
        return policy.tokenizer.convert_ids_to_tokens(token) or f"token {token}"

    return {
        "family": model.config.model_type,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "device": str(policy.device),
        "processor": type(processor).__name__,
        "image_processor": type(processor.image_processor).__name__,
        "end_of_turn": say(policy.end_id),
        "stops_at": [say(token) for token in policy.eos_token_ids],
    }


def _lora_facts(cfg: Config, policy: Policy) -> dict[str, Any]:
    """Which layers the adapter sits on, and the share of the language model's weights in matrices that it leaves out;
    embeddings do not count."""
    targets = resolve_targets(policy.hf_model, cfg.model.lora)
    total = sum(parameter.numel() for parameter in policy.decoder.parameters())
    return {
        "layers": len(targets),
        "names": sorted({name.rsplit(".", 1)[-1] for name in targets}),
        "left_out": {each.kind: each.parameters / total for each in left_out(policy.hf_model, targets)},
    }


def _memory(cfg: Config, policy: Policy, prompt_tokens: int, image_tokens: int) -> dict[str, int]:
    """Bytes of one worker each at its peak, and the sizes of a run that they are for."""
    shape = model_shape(policy.hf_model, cfg.model.lora, policy.dtype)
    plan = batch_plan(cfg, prompt_tokens)
    return {
        "weights": shape.weight_bytes,
        "learner": sum(learner_memory(cfg, shape, plan, prompt_tokens, image_tokens).values()),
        "rollout": sum(rollout_memory(cfg, shape, prompt_tokens, image_tokens).values()),
        "group_size": cfg.rollout.group_size,
        "max_new_tokens": cfg.rollout.max_new_tokens,
    }


def _figures(comparison: Comparison) -> dict[str, Any]:
    """In nats; None where there is nothing to compare."""
    return {
        "path": comparison.path,
        "reason": comparison.reason,
        "vision_features_kept": comparison.inject_vision,
        "bound": comparison.bound,
        "largest_gap": comparison.largest_gap,
        "sampler": {"to_model": comparison.sampler},
        "paths": {
            gap.path: {
                "to_model": gap.to_model,
                "to_sampler": gap.to_sampler,
                "causality": gap.causality,
                "gradient": gap.gradient,
                "trouble": gap.trouble,
            }
            for gap in comparison.gaps
        },
    }


def _generated(size: tuple[int, int]) -> bytes:
    """A PNG of three colours that run into each other: no two patches are alike."""
    gradient = Image.linear_gradient("L").resize(size)
    turned = Image.linear_gradient("L").rotate(90).resize(size)
    return encode_png(Image.merge("RGB", (gradient, turned, Image.radial_gradient("L").resize(size))))


# -- for people --------------------------------------------------------------------------------------------------------


def _show(facts: Mapping[str, Any], console: Console) -> None:
    """Whatever of it there is. Names are a checkpoint's own: none of them is markup."""
    for name, text in _lines(facts):
        console.print(Text(f"{name:<10} {text}"), soft_wrap=True)
    if "paths" not in facts:
        return
    console.print(Text(f"\nlargest |Δ log-prob| in nats, where {facts['bound']:.1e} may be:"), soft_wrap=True)
    console.print(_gaps(facts))
    for name, gap in facts["paths"].items():
        if gap["trouble"] is not None and name != facts["path"]:
            console.print(Text(f"{name} is not used: {gap['trouble']}"), soft_wrap=True)
    console.print(Text(f"path: {facts['path']}, since {facts['reason']}"), soft_wrap=True)
    if facts["agree"]:
        console.print("sampler, learner and transformers agree")


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", str(facts["model"])
    if "family" in facts:
        size = f"{facts['parameters'] / 1e6:,.1f} M parameters, {facts['dtype']} on {facts['device']}"
        yield "family", f"{facts['family']} ({facts['architecture']}), {size}"
        yield "processor", f"{facts['processor']} with {facts['image_processor']}"
        yield "template", f"ends a turn with {facts['end_of_turn']}; sampling stops at {', '.join(facts['stops_at'])}"
    if "picture" in facts:
        of = facts["picture"]
        yield (
            "picture",
            f"{of['size']}: {of['image_tokens']} image tokens, in a prompt of {of['prompt_tokens']} of the model's "
            f"{of['context_length']:,} tokens",
        )
    if "lora" in facts:
        lora = facts["lora"]
        left = ", ".join(f"{kind} ({share:.1%})" for kind, share in lora["left_out"].items())
        yield "LoRA", f"on {lora['layers']} layers: {', '.join(lora['names'])}; leaves out {left or 'nothing'}"
    if "memory" in facts:
        memory = facts["memory"]
        learner, rollout = (f"{memory[kind] / 2**30:.2f} GiB" for kind in ("learner", "rollout"))
        run = f"{memory['group_size']} completions of {memory['max_new_tokens']} tokens a picture"
        yield "memory", f"about {learner} in a learner, {rollout} in a rollout worker, with {run}"
    for tracker, told in facts.get("tracking", {}).items():
        yield "tracking", told if told.startswith("tracking: ") else f"{tracker}: {told}"


def _gaps(facts: Mapping[str, Any]) -> PlainTable:
    columns = ("to transformers", "to the sampler", "causality", "gradient")
    table = PlainTable("", *columns, right=columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_row("sampler", _figure(facts["sampler"]["to_model"]), "", "", "")
    for name, gap in facts["paths"].items():
        table.add_row(name, *(_figure(gap[key]) for key in ("to_model", "to_sampler", "causality", "gradient")))
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.1e}"
