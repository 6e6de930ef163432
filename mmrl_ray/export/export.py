"""`mmrl export`: a run's adapter, or the model with the adapter merged in, for whoever has none of this project.

    run ──▶ base + adapter ──▶ what it says of held-out pictures ─────────────────┐
                 └──▶ files in a folder of a temporary name ──▶ loaded anew ──▶ compared ──▶ card ──▶ DIR ──▶ the Hub

The export is done when the files, loaded anew, are the run's policy; otherwise nothing is left. Both sides compute in
the dtype of the export. Held against each other, on up to `SAMPLES` held-out pictures:

    inputs      what the exported processor makes of picture and prompt: the same numbers
    log-probs   of the run's greedy captions, of captions by people and of random tokens: no two may differ by more than
                the start-up comparison's bound (`parity.TOLERANCES` times the mean |log-prob| of random tokens)
    greedy      tokens: the same, but where the two that differ are as good, within twice that bound
    quantised   a run whose base was quantised (`model.quantization`) is merged into the base as it was before, and held
                against that; how far its own policy is from it is measured and told, and bounds nothing
    update      of merged weights, the share of the adapter that rounding left in them (`merge_rounding_once`): at least
                `LEAST_KEPT`. A comparison in 16 bits would not see that a small update is gone
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig

from mmrl_ray.config import Config
from mmrl_ray.config.load import parse_config
from mmrl_ray.config.paths import RUN_CONFIG, is_hub_id, refuse_no_run, refuse_taken
from mmrl_ray.config.policy import QuantizationSection
from mmrl_ray.data import atomic
from mmrl_ray.data.samples import Quarantine, Sample, read_split
from mmrl_ray.errors import ConfigError, DataError, ExportError, one_line
from mmrl_ray.evaluation.model_source import quieten
from mmrl_ray.export.card import Base, Exported, write_card
from mmrl_ray.export.compare import Check, Said, dtype_name
from mmrl_ray.export.hub import Delivery, metadata
from mmrl_ray.export.merged import dtypes_of, merge_rounding_once, refuse_quantised
from mmrl_ray.policy.checkpoint import commit_of, model_call
from mmrl_ray.policy.heads import HEADS_FILE
from mmrl_ray.policy.load import dtype_of, load_policy
from mmrl_ray.policy.lora.adapter import load_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.model_folder import files_of_base, name_as_before, write_model, write_rest
from mmrl_ray.run_records.checkpoint_choice import Chosen, choose_checkpoint
from mmrl_ray.run_records.run_dir import ADAPTER_FOLDER, CONFIG_FILE, WEIGHTS_FILE, RunDir
from mmrl_ray.telemetry.terminal import RunProgress
from mmrl_ray.training.warm_start import base_for_use, warm_start_facts

EXPORTED_DTYPES = ("float32", "bfloat16", "float16")
SAMPLES = 16
LEAST_KEPT = 0.5


def export(
    target: str,
    out: Path,
    *,
    merged: bool = False,
    dtype: str | None = None,
    checkpoint: str | None = None,
    data: str | None = None,
    push_to: str | None = None,
    private: bool = False,
) -> Check:
    """Writes the policy of a run into the new folder `out`, and delivers it to the Hub where `push_to` names a place.

    Args:
        target: a run folder.
        out: a folder that is not there, or empty.
        merged: the whole model; otherwise the adapter.
        dtype: "float32", "bfloat16" or "float16", of the merged weights and of the comparison; by default that of the
            base's own files.
        checkpoint: `choose_checkpoint`'s.
        data: Parquet shards to compare on; by default the run's held-out split, else what it was trained on.
        push_to: a repository of the Hub, NAME or OWNER/NAME.
        private: whether it is to be private.

    Raises:
        ConfigError: `out` holds something, the run is a value-based one, or the Hub cannot be asked.
        RunError: there is no such checkpoint.
        DataError: there is nothing to compare on.
        ModelError: the base or the adapter cannot be used.
        ExportError: the export is not the run's policy, or cannot be written or delivered.
    """
    refuse_no_run(target)
    out = out.expanduser()
    run = RunDir.at(target)
    cfg = parse_config(run.read_text(RUN_CONFIG), run.full_path(RUN_CONFIG))
    if cfg.agent is not None:
        raise ConfigError(f"{run.name} is a value-based run: it has an agent and no adapter, and nothing to export")
    refuse_taken(out)
    if push_to is not None and not merged and (cfg.sft is not None or not is_hub_id(cfg.model.path)):
        raise ConfigError(
            f"the adapter of {run.name} lies on a model that is on this machine alone, and would be of no use on the "
            "Hub: push the merged model (--merged)"
        )
    chosen = _said_if_unfinished(run, choose_checkpoint(run, checkpoint))
    delivery = None if push_to is None else Delivery.prepared(push_to, private=private)
    quieten()
    with RunProgress() as shown:
        for note in chosen.notes:
            shown.warn(note)
        base = _base_of(cfg, base_for_use(cfg, run, shown))
        samples = _samples(cfg, data, shown)
        with run.local_copy(chosen.folder) as adapter, _scratch(out) as folder:
            maker = _Maker(cfg, base, adapter, dtype or base.dtype, samples, shown)
            check = maker.merged(folder) if merged else maker.adapter(folder)
            told = Exported(
                run,
                cfg,
                chosen,
                base,
                check.told(),
                merged,
                check.dtype,
                has_heads=(adapter / HEADS_FILE).is_file(),
                settings=check.settings,
            )
            write_card(folder, told, metadata(told))
            atomic.commit_folder(folder, out)
        shown.note(check.told())
        if delivery is not None:
            with shown.busy(f"uploading to {delivery.repo}"):
                address = delivery.send(out)
            shown.note(f"pushed to {address}")
    print(out)
    return check


def _said_if_unfinished(run: RunDir, chosen: Chosen) -> Chosen:
    """Also where the checkpoint was asked for by name."""
    if run.exists(f"{ADAPTER_FOLDER}/{CONFIG_FILE}") or chosen.notes:
        return chosen
    return replace(chosen, notes=(f"the run is not finished: this is its checkpoint of step {chosen.step}",))


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes one export of a run's adapter on its base."""

    cfg: Config
    base: Base
    source: Path
    """Of the run's adapter."""
    dtype: str
    samples: Sequence[Sample]
    shown: RunProgress

    def merged(self, folder: Path) -> Check:
        """Fills `folder` with the model."""
        own = self._said_quantized()
        policy = self._policy(self.dtype)
        refuse_quantised(policy)
        said, dtypes = self._said(policy), dtypes_of(policy)
        with self.shown.busy("merging"):
            if self.dtype not in (self.base.dtype, "float32"):  # sums are rounded once, from what the files hold
                del policy
                gc.collect()
                policy = self._policy("float32")
                policy.dtype = dtype_of(self.dtype, policy.device)
            kept = merge_rounding_once(policy, dtypes)
            if not kept >= LEAST_KEPT:
                raise ExportError(
                    f"only {kept:.0%} of what the adapter changes is left in weights of {self.dtype}, whose steps are "
                    f"larger than the changes (at least {LEAST_KEPT:.0%} must be): export with --dtype float32, or the "
                    "adapter alone (without --merged)"
                )
            name_as_before(policy.hf_model)
            write_model(policy, folder)
            files, settings = files_of_base(self.base.path, self.base.revision), dict(self.cfg.model.processor)
            write_rest(policy, files, folder, settings)
            del policy
            gc.collect()
        with self.shown.busy("loading the export, and comparing"):
            again = self._load(str(folder), self.dtype, revision=None, processor={})
            if settings and not said.has_inputs(again, self.samples):
                # The processor takes them in a call and not as its own: who uses it has to give them.
                write_rest(again, files, folder, {})
                again = self._load(str(folder), self.dtype, revision=None)
            else:
                settings = {}
            check = said.compare(again, self.samples, kept=kept, settings=settings)
            return self._with_distance(check, own, again)

    def adapter(self, folder: Path) -> Check:
        """Fills `folder` with the adapter, in PEFT's layout."""
        own = self._said_quantized()
        policy = self._policy(self.dtype)
        said = self._said(policy)
        del policy
        gc.collect()
        for name in (WEIGHTS_FILE, HEADS_FILE):
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)
        config = json.loads((self.source / CONFIG_FILE).read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": self.base.path, "revision": self.base.revision}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        with self.shown.busy("loading the export, and comparing"):
            again = self._load(self.base.path, self.dtype, revision=self.base.revision)
            again.model = PeftModel.from_pretrained(again.hf_model, str(folder)).eval()
            check = said.compare(again, self.samples, settings=dict(self.cfg.model.processor))
            return self._with_distance(check, own, again)

    def _policy(self, dtype: str, quantization: QuantizationSection | None = None) -> Policy:
        """The run's, on its base as it was before it was quantised, or quantised."""
        with self.shown.busy("loading the run's policy"):
            policy = self._load(self.base.path, dtype, quantization=quantization)
            load_adapter(policy, self.source)
        return policy

    def _load(self, path: str, dtype: str, **section: Any) -> Policy:
        section = {"quantization": None, "path": path, "dtype": dtype, **section}
        return load_policy(self.cfg.model.model_copy(update=section))

    def _said_quantized(self) -> Said | None:
        """What the policy says that the run learnt; None where its base was not quantised."""
        quantization = self.cfg.model.quantization
        if quantization is None:
            return None
        said = self._said(self._policy(self.dtype, quantization))
        gc.collect()
        return said

    def _with_distance(self, check: Check, own: Said | None, again: Policy) -> Check:
        quantization = self.cfg.model.quantization
        if own is None or quantization is None:
            return check
        return replace(check, unquantized=own.distance(again, quantization.told))

    def _said(self, policy: Policy) -> Said:
        with self.shown.busy("what the run's policy says"):
            return Said.of(policy, self.samples, self.cfg.rollout.max_new_tokens)


def _base_of(cfg: Config, path: str) -> Base:
    """What the adapter lies on. Of the Hub's, the commit that is here."""
    is_folder = Path(path).is_dir()
    with model_call(path, "its config.json cannot be read"):
        config = AutoConfig.from_pretrained(path, revision=None if is_folder else cfg.model.revision)
    stored = dtype_name(getattr(config, "dtype", None))
    facts = warm_start_facts(path) if is_folder else {}
    return Base(
        path=path,
        written=cfg.model.path,
        revision=None if is_folder else commit_of(path, cfg.model.revision) or cfg.model.revision,
        dtype=stored if stored in EXPORTED_DTYPES else "float32",
        warm_start=None if cfg.sft is None or not facts else facts,
    )


def _samples(cfg: Config, data: str | None, shown: RunProgress) -> list[Sample]:
    """What both are asked: held-out pictures, or where those are gone some that were trained on."""
    troubles = []
    for place in dict.fromkeys([data] if data is not None else filter(None, [cfg.data.eval, cfg.data.train])):
        try:
            quarantine = Quarantine(cfg.data.max_quarantined, source=place)
            found = read_split(place, prompt=cfg.data.prompt, limit=SAMPLES, quarantine=quarantine)
        except DataError as error:
            troubles.append(str(error))
            continue
        if place == cfg.data.train:
            shown.note(f"compared on pictures that were trained on: {'; '.join(troubles) or 'none are held out'}")
        return found
    raise DataError(f"nothing to compare the export on: {'; '.join(troubles)}; name Parquet shards with --data")


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside `out` to become it, gone afterwards otherwise."""
    try:
        with atomic.scratch_folder(out.absolute().parent) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out} cannot be written: {one_line(error)}; make room, or name another --out") from error
