"""The model card of an export, `README.md`: what it is, how it was made, how good it is, and metadata for the Hub.

Everything in it is read from the run's folder. Places are named by their last part: a path of this machine says nothing
to others, and may say too much. Figures are those of the very checkpoint that is exported, with 95 % bootstrap
intervals; where it was never measured, there are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from mmrl_ray.config import Config
from mmrl_ray.config.paths import is_hub_id, place_name, without_places
from mmrl_ray.config.problems import dump_yaml
from mmrl_ray.data.samples import dataset_fingerprint
from mmrl_ray.errors import DataError
from mmrl_ray.run_records.checkpoint_choice import Chosen, evaluation_lines
from mmrl_ray.run_records.run_dir import ADAPTER_FOLDER, LAST_ADAPTER_FOLDER, MANIFEST, RunDir

CARD = "README.md"
_SUMMARY = "summary.json"
_LAST = f"{LAST_ADAPTER_FOLDER}/{MANIFEST}"
_SECTIONS = ("algorithm", "model", "data", "sft", "rollout", "reward", "learner")
"""Of a config: how the policy came to be. The others say where and on what."""
_PACKAGES = ("mmrl_ray", "torch", "transformers", "peft")

Measure = Mapping[str, Any]
"""`value`, `low`, `high`; the last two may be None."""


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter lies on."""

    path: str
    """A folder, or an id of the Hub."""
    written: str
    """`model.path` of the run's config."""
    revision: str | None
    """Of the Hub's: the commit, or where that is not known what was asked for."""
    dtype: str
    """Of its weights' files."""
    warm_start: Mapping[str, Any] | None = None
    """What its warm start says of itself, where it had one."""

    @property
    def is_on_hub(self) -> bool:
        """Whether anybody can have it."""
        return not Path(self.path).is_dir()

    @property
    def hub_id(self) -> str | None:
        """What it was, or was made of, on the Hub."""
        return self.written if is_hub_id(self.written) else None


@dataclass(frozen=True, slots=True)
class Exported:
    """What a card tells of."""

    run: RunDir
    cfg: Config
    chosen: Chosen
    base: Base
    check: str
    """How the export was compared with the run's policy."""
    merged: bool
    dtype: str
    """Of a merged model's weights."""
    has_heads: bool = False
    """Whether the run decodes by values, too."""
    settings: Mapping[str, Any] | None = None
    """Of the processor, for whoever calls it."""


def write_card(folder: Path, exported: Exported, metadata: ModelCardData) -> None:
    """Writes `README.md` into the folder of an export."""
    body = "\n".join(_body(exported))
    (folder / CARD).write_text(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n", encoding="utf-8")


def measures_of(run: RunDir, chosen: Chosen) -> tuple[dict[str, Measure], dict[str, Measure], dict[str, Measure], int]:
    """Measures before training and of the exported checkpoint, their paired differences, and how many samples.

    The evaluation after training is of the last checkpoint; any other has what was measured of it on the way.
    """
    summary = run.read_json(_SUMMARY) if run.exists(_SUMMARY) else {}
    sides = summary.get("eval") or {}
    before = _measures(sides.get("before"))
    count = int((sides.get("before") or sides.get("after") or {}).get("samples") or 0)
    of_last = run.read_json(_LAST).get("step") if run.exists(_LAST) else None
    is_last = chosen.folder in (ADAPTER_FOLDER, LAST_ADAPTER_FOLDER) and of_last in (None, chosen.step)
    if is_last and sides.get("after"):
        return before, _measures(sides["after"]), _measures({"measures": sides.get("difference") or {}}), count
    for line in reversed(evaluation_lines(run)):
        if line.get("step") == chosen.step and chosen.step is not None:
            return before, dict(_of_line(line)), {}, count
    return before, {}, {}, count


def _measures(side: Mapping[str, Any] | None) -> dict[str, Measure]:
    found = (side or {}).get("measures") or {}
    return {
        name: measure
        for name, measure in found.items()
        if name.count("/") <= 1 and isinstance(measure, Mapping) and measure.get("value") is not None
    }


def _of_line(line: Mapping[str, Any]) -> Iterator[tuple[str, Measure]]:
    """Measures of an evaluation on the way."""
    intervals = line.get("intervals") or {}
    for key, value in line.items():
        name = key.removeprefix("eval/")
        if name != key and name.count("/") <= 1 and isinstance(value, int | float):
            yield name, intervals.get(name) or {"value": value}


def license_of(base: Base) -> dict[str, Any]:
    """The base's own, by which the export is bound; nothing where its card does not say, or cannot be had."""
    with suppress(Exception):  # another's file, on another's server
        if Path(base.path).is_dir():
            file = Path(base.path) / CARD
        else:
            file = Path(hf_hub_download(base.path, CARD, revision=base.revision))
        data = ModelCard.load(file, ignore_metadata_errors=True).data
        names = ("license", "license_name", "license_link")
        return {name: value for name in names if (value := getattr(data, name, None)) is not None}
    return {}


def _body(exported: Exported) -> Iterator[str]:
    run, cfg, base, chosen = exported.run, exported.cfg, exported.base, exported.chosen
    what = (
        f"A whole model with weights in {exported.dtype}, its adapter merged in."
        if exported.merged
        else "A LoRA adapter in PEFT's layout."
    )
    yield f"# {run.name}\n"
    yield (
        f"{_base_words(base)}, fine-tuned by reinforcement learning (`{cfg.algorithm}`) to caption images, with "
        f"mmrl_ray. {what}\n"
    )
    for note in chosen.notes:
        yield f"> {note[0].upper()}{note[1:]}.\n"
    yield "## Use\n"
    yield from _use(exported)
    yield "\n## Base\n"
    yield f"{_base_words(base)}."
    if base.warm_start is not None and cfg.sft is not None:
        kept = "both are in these weights" if exported.merged else "this adapter lies on its result"
        yield (
            f"Before reinforcement learning it had a supervised warm start on the references ({cfg.sft.mode}, "
            f"{cfg.sft.total_steps:,} steps): {kept}."
        )
    if "license" not in license_of(base):
        yield "Its licence, which binds this model too, is not known here."
    yield "\n## Data\n"
    yield f"- Trained on `{place_name(cfg.data.train)}`{_fingerprint(cfg.data.train)}."
    if cfg.data.eval is not None:
        yield f"- Held out: `{place_name(cfg.data.eval)}`{_fingerprint(cfg.data.eval)}."
    yield f"- Prompt: `{cfg.data.prompt}`"
    yield "\n## Training\n"
    yield from _training(exported)
    yield "\n## Metrics\n"
    yield from _table(exported)
    yield "\n## This export\n"
    yield f"{exported.check[0].upper()}{exported.check[1:]}."
    if exported.has_heads:
        yield (
            "\nThe run can also decode by log π + β(Q − V) with its value heads; a plain loader decodes by π, which is "
            "what was compared."
        )
    yield "\n## Configuration\n"
    yield f"```yaml\n{dump_yaml(_config(cfg)).rstrip()}\n```"
    yield "\n## Limits\n"
    yield (
        "Captions may be wrong or biased, as those of the base model and of the data are; they were optimised for the "
        "reward above, which is not the same as being right."
    )


def _use(exported: Exported) -> Iterator[str]:
    base, prompt = exported.base, exported.cfg.data.prompt
    settings = "".join(f", {key}={value!r}" for key, value in (exported.settings or {}).items())
    yield "```python"
    yield "from transformers import AutoModelForImageTextToText, AutoProcessor"
    if exported.merged:
        yield f'\nmodel = AutoModelForImageTextToText.from_pretrained(PATH, dtype="{exported.dtype}")'
        yield "processor = AutoProcessor.from_pretrained(PATH)"
    else:
        revision = f", revision={base.revision!r}" if base.is_on_hub and base.revision else ""
        named = f'"{base.path}"{revision}' if base.is_on_hub else "BASE"
        yield "from peft import PeftModel"
        yield f"\nbase = AutoModelForImageTextToText.from_pretrained({named})"
        yield "model = PeftModel.from_pretrained(base, PATH)"
        yield f"processor = AutoProcessor.from_pretrained({named})"
    yield f'content = [{{"type": "image"}}, {{"type": "text", "text": {prompt!r}}}]'
    yield 'turns = [{"role": "user", "content": content}]'
    yield "text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)"
    yield (
        "inputs = processor(text=text, images=image, add_special_tokens=False, "
        f'return_tensors="pt"{settings}).to(model.device, model.dtype)'
    )
    yield f"tokens = model.generate(**inputs, do_sample=False, max_new_tokens={exported.cfg.rollout.max_new_tokens})"
    yield 'print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    yield "```"
    section = exported.cfg.model.lora
    rank = max(8, section.largest_rank)
    lora = f"`vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules {exported.run.name}=PATH`"
    if exported.merged or not section.beyond_vllm:
        yield f"\nvLLM loads the folder, too: {'`vllm serve PATH`' if exported.merged else lora}."
    else:
        yield f"\nvLLM has no such adapters ({', '.join(section.beyond_vllm)}): export the merged model for it."


def _base_words(base: Base) -> str:
    if base.hub_id is not None:
        at = f" at revision `{base.revision}`" if base.revision and base.is_on_hub else ""
        return f"[{base.hub_id}](https://huggingface.co/{base.hub_id}){at}"
    return f"`{place_name(base.written)}`"


def _fingerprint(place: str) -> str:
    with suppress(DataError):  # gone, or on storage that cannot be reached now
        return f" (fingerprint `{dataset_fingerprint(place)[:16]}`)"
    return ""


def _training(exported: Exported) -> Iterator[str]:
    cfg, chosen, run = exported.cfg, exported.chosen, exported.run
    of = f"step {chosen.step:,} of {cfg.learner.steps:,}" if chosen.step is not None else f"{cfg.learner.steps:,} steps"
    yield f"- Algorithm `{cfg.algorithm}`, loss `{cfg.learner.loss}`, {of}, seed {cfg.run.seed}"
    lora, base = cfg.model.lora, cfg.model.quantization
    kinds = [name for name in ("rslora", "dora", "rank_pattern", "alpha_pattern") if getattr(lora, name)]
    kind = f" ({', '.join(kinds)})" if kinds else ""
    saved = f"; trained whole: {', '.join(lora.modules_to_save)}" if lora.modules_to_save else ""
    yield f"- LoRA rank {lora.r}, alpha {lora.alpha:g}{kind}{saved}"
    if base is not None:
        yield f"- Learnt on {base.told} of the base"
    weights = {name: cfg.reward.weights.get(name, 1.0) for name in cfg.reward.parts}
    parts = ", ".join(f"{weight:g} × `{name}`" for name, weight in weights.items())
    yield f"- Reward: {parts}"
    summary = run.read_json(_SUMMARY) if run.exists(_SUMMARY) else {}
    versions = summary.get("versions") or {}
    if told := ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions):
        yield f"- Versions: {told}"


def _table(exported: Exported) -> Iterator[str]:
    before, after, difference, count = measures_of(exported.run, exported.chosen)
    if not after:
        yield "This checkpoint was not evaluated on held-out data."
        return
    yield f"Greedy captions of {count} held-out samples, with 95 % bootstrap intervals.\n"
    yield "| measure | before | this model | difference, paired |"
    yield "|---|---|---|---|"
    for name, measure in after.items():
        cells = (_cell(before.get(name)), _cell(measure), _cell(difference.get(name), sign="+"))
        yield f"| `{name}` | {' | '.join(cells)} |"


def _cell(measure: Measure | None, sign: str = "") -> str:
    if measure is None:
        return ""
    text = f"{float(measure['value']):{sign}.4f}"
    if measure.get("low") is None or measure.get("high") is None:
        return text
    return f"{text} [{float(measure['low']):{sign}.4f}, {float(measure['high']):{sign}.4f}]"


def _config(cfg: Config) -> dict[str, Any]:
    whole = without_places(cfg).model_dump(mode="json", exclude_none=True)
    return {name: whole[name] for name in _SECTIONS if name in whole}
