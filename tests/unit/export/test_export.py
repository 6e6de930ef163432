"""`mmrl export` against plain transformers and PEFT, and what it refuses to call done."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config
from mmrl_ray.data.samples import Sample, read_split
from mmrl_ray.errors import ConfigError, DataError, ExportError, RunError
from mmrl_ray.export import export as export_module
from mmrl_ray.export.export import export
from mmrl_ray.learner.checkpoints import save_adapter_folder
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.model_folder import write_model
from mmrl_ray.policy.tokens import load_processor
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.training import warm_start as warm_start_module
from mmrl_ray.training.warm_start import keep_base, warm_start
from tests.support.tiny_models import FAMILIES, build_family, make_samples
from tests.unit.export.conftest import MakeWorld, checkpoint, felt_adapter

GREEDY = GenerationConfig(do_sample=False, max_new_tokens=8)


def plain(folder: str | Path, **settings: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **settings).eval()


def inputs_of(folder: Path, sample: Sample) -> Any:
    """By the folder's own processor and template."""
    processor = load_processor(str(folder), AutoConfig.from_pretrained(folder))
    content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.open(io.BytesIO(sample.images[0]))
    return processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)


@torch.no_grad()
def says(model: Any, inputs: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt, and greedy tokens."""
    tokens = model.generate(**inputs, generation_config=GREEDY)
    return model(**inputs).logits, tokens[0, inputs["input_ids"].shape[1] :].tolist()


def by_peft(base: str, adapter: Path, **settings: Any) -> Any:
    return PeftModel.from_pretrained(plain(base, **settings), str(adapter)).eval()


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def no_path_of_here(folder: Path, root: Path) -> None:
    for file in folder.rglob("*"):
        assert str(root).encode() not in file.read_bytes(), file


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_the_adapter_on_its_base_in_plain_transformers(family: str, make_world: MakeWorld) -> None:
    world = make_world(family)
    out = world.export_to()
    check = export(world.target, out, merged=True)
    assert check.kept == pytest.approx(1.0, abs=1e-3)
    assert check.largest <= check.bound < 0.1 * check.effect, "the adapter is felt"
    merged, adapted = plain(out), by_peft(world.cfg.model.path, world.run.local_path("adapter"))
    for sample in make_samples():
        inputs = inputs_of(out, sample)
        (logits, tokens), (expected, expected_tokens) = says(merged, inputs), says(adapted, inputs)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert tokens == expected_tokens
    before, after = load_file(f"{world.cfg.model.path}/model.safetensors"), load_file(out / "model.safetensors")
    old_names = {name.replace("vision_tower.vision_model.", "vision_tower.") for name in after}
    assert old_names == set(before)
    assert any(".vision_model." in name for name in after) == (family in ("llava", "gemma3", "smolvlm"))
    assert ("lm_head" in str(list(after))) == (family != "gemma3"), "tied embeddings stay one"
    no_path_of_here(out, world.root)
    assert left_in(out.parent) == ["out"]


def test_sums_are_rounded_once(make_world: MakeWorld) -> None:
    """Against W + s·BA in float64: a merge in bfloat16 would round the base and the update, too."""
    world = make_world()
    out = world.export_to()
    assert export(world.target, out, merged=True, dtype="bfloat16").dtype == "bfloat16"
    base, adapter = (
        load_file(f"{world.cfg.model.path}/model.safetensors"),
        load_file(world.run.local_path("adapter") / "adapter_model.safetensors"),
    )
    found = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    adapted = {
        name.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight"): name
        for name in adapter
        if name.endswith(".lora_A.weight")
    }
    assert len(adapted) == 14
    for layer, name in adapted.items():
        stored = f"{layer.replace('language_model.', 'language_model.model.', 1)}.weight"
        update = 2.0 * adapter[name.replace("lora_A", "lora_B")].double() @ adapter[name].double()
        expected = (base[stored].double() + update).float().bfloat16()
        assert (found[stored] == expected).float().mean() > 0.999, "float32's own rounding apart"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert plain(out).dtype == torch.bfloat16


def test_an_update_that_16_bits_round_away_is_refused(make_world: MakeWorld) -> None:
    world = make_world(scale=3e-3)
    file = f"{world.cfg.model.path}/model.safetensors"
    on_the_grid = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(on_the_grid, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"only \d+% of what the adapter changes .* --dtype float32"):
        export(world.target, world.export_to(), merged=True, dtype="bfloat16")
    assert left_in(world.export_to().parent) == []
    export(world.target, world.export_to(), merged=True, dtype="float32")


def _without_adapter(policy: Policy, folder: Path) -> None:
    bare = load_policy(policy_section(policy), device="cpu")
    write_model(bare, folder)


def policy_section(policy: Policy) -> Any:
    from mmrl_ray.config.sections import ModelSection

    return ModelSection(path=policy.path, dtype="float32")


def _slightly_off(policy: Policy, folder: Path) -> None:
    with torch.no_grad():
        policy.decoder.layers[-1].self_attn.o_proj.weight.mul_(1.02)  # type: ignore[index,union-attr,operator]
    write_model(policy, folder)


@pytest.mark.parametrize("fault", [_without_adapter, _slightly_off])
def test_what_is_not_the_policy_is_not_called_done(
    fault: Any, make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    monkeypatch.setattr(export_module, "write_model", fault)
    with pytest.raises(ExportError, match=r"not the run's policy: log-probs in float32 differ by [\d.]+ nats"):
        export(world.target, world.export_to(), merged=True)
    assert left_in(world.export_to().parent) == []


def test_an_adapter_is_one_for_plain_peft_on_the_base_that_it_names(make_world: MakeWorld) -> None:
    world = make_world()
    out = world.export_to()
    check = export(world.target, out)
    assert (check.largest, check.kept) == (0.0, None)
    named = json.loads((out / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == world.cfg.model.path
    inputs = inputs_of(Path(world.cfg.model.path), make_samples()[0])
    (logits, tokens) = says(by_peft(named["base_model_name_or_path"], out), inputs)
    expected, expected_tokens = says(world.policy.model, inputs)
    torch.testing.assert_close(logits, expected)
    assert tokens == expected_tokens
    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert str(world.root) not in card.content
    assert "`base`" in card.content


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """(id, commit) of a model in a cache of the Hub, as a download leaves it."""
    commit, cache = "c0ffee" + "0" * 34, tmp_path / "cache"
    snapshot = cache / "models--someone--tiny" / "snapshots" / commit
    build_family("llava", snapshot)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "someone/tiny", commit


def test_a_base_of_the_hub_is_named_by_id_and_commit(on_hub: tuple[str, str], make_world: MakeWorld) -> None:
    name, commit = on_hub
    world = make_world(path=name)
    export(world.target, world.export_to("adapter"))
    config = json.loads((world.export_to("adapter") / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (name, commit)
    export(world.target, world.export_to("merged"), merged=True)
    for folder, relation in (("adapter", "adapter"), ("merged", "finetune")):
        card = ModelCard.load(world.export_to(folder) / "README.md")
        assert (card.data.base_model, card.data.license) == (name, "apache-2.0")
        assert card.data.base_model_relation == relation
        assert commit in card.content
        no_path_of_here(world.export_to(folder), world.root)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_merged_warm_start_holds_both(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"patch_size": 32, "hidden": 32, "layers": 2, "vision_hidden": 32, "vision_layers": 1}
    monkeypatch.setattr(warm_start_module, "TINY_LLAVA", small)
    cfg = Config.model_validate(
        {
            "run": {"name": "run", "root": str(tmp_path / "runs")},
            "model": {"path": "builtin:tiny-llava", "dtype": "float32"},
            "data": {
                "train": str(tmp_path / "train"),
                "eval": str(tmp_path / "eval"),
                "prompt": "describe it",
                "scenes": {"train": 12, "eval": 6, "image_size": 32},
            },
            "sft": {
                "mode": mode,
                "steps": 20,
                "batch_size": 4,
                "lr": 1e-2,
                "warmup_steps": 0,
                "cache": str(tmp_path / "c"),
            },
            "rollout": {"max_new_tokens": 9},
            "learner": {"steps": 1},
        }
    )
    run = RunDir.create(cfg.run.root, "run")
    run.write_text("config.yaml", dump_config(cfg))
    base, _ = keep_base(cfg, run, warm_start(cfg))
    shutil.rmtree(tmp_path / "c")
    policy = load_policy(cfg.model.model_copy(update={"path": base}), device="cpu")
    felt_adapter(policy, cfg)
    save_adapter_folder(run, "adapter", policy, 1)
    out = tmp_path / "out"
    export(run.location, out, merged=True)
    inputs = inputs_of(out, read_split(cfg.data.eval or "", prompt=cfg.data.prompt, limit=1)[0])
    found, _ = says(plain(out), inputs)
    torch.testing.assert_close(found, says(policy.model, inputs)[0], rtol=1e-3, atol=1e-3)
    card = ModelCard.load(out / "README.md").content
    assert f"a supervised warm start on the references ({mode}, 20 steps): both are in these weights" in card
    no_path_of_here(out, tmp_path)
    with pytest.raises(ConfigError, match=r"on this machine alone.*--merged"):
        export(run.location, tmp_path / "other", push_to="me/mine")


def test_a_run_that_did_not_finish_gives_its_newest_checkpoint_and_says_so(
    make_world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(finished=False)
    with pytest.raises(RunError, match="no adapter and no checkpoint yet"):
        export(world.target, world.export_to())
    checkpoint(world, 2)
    with torch.no_grad():
        for parameter in world.policy.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    checkpoint(world, 3)
    for which, step in ((None, 3), ("last", 3), ("2", 2)):
        out = world.export_to(f"of-{which}")
        export(world.target, out, checkpoint=which)
        assert f"the run is not finished: this is its checkpoint of step {step}" in capsys.readouterr().err
        assert f"> The run is not finished: this is its checkpoint of step {step}." in (out / "README.md").read_text()
        kept = load_file(world.run.local_path(f"checkpoints/step-{step:06d}") / "adapter_model.safetensors")
        assert all(torch.equal(t, kept[n]) for n, t in load_file(out / "adapter_model.safetensors").items())


def summary() -> Mapping[str, Any]:
    def side(value: float) -> dict[str, Any]:
        measure = {"value": value, "low": value - 0.1, "high": value + 0.1}
        return {"samples": 3, "measures": {"cider_d": measure, "reward": measure, "reward/a/b": measure}}

    difference = {"cider_d": {"value": 0.25, "low": 0.125, "high": 0.375, "intervals_apart": False}}
    return {"eval": {"before": side(0.5), "after": side(0.75), "difference": difference}, "versions": {"peft": "1.2"}}


def test_a_card_has_the_figures_of_its_own_checkpoint_and_metadata_that_the_hub_reads(make_world: MakeWorld) -> None:
    world = make_world()
    world.run.write_json("summary.json", summary())
    checkpoint(world, 2)
    export(world.target, world.export_to(), merged=True)
    card = ModelCard.load(world.export_to() / "README.md")
    results = {each.metric_type: each for each in card.data.eval_results or []}
    assert results.keys() == {"cider_d", "reward"}
    assert results["cider_d"].metric_value == 0.75
    assert results["cider_d"].metric_args == {"interval": 0.95, "low": 0.65, "high": 0.85}
    assert (
        "| `cider_d` | 0.5000 [0.4000, 0.6000] | 0.7500 [0.6500, 0.8500] | +0.2500 [+0.1250, +0.3750] |" in card.content
    )
    assert "reward/a/b" not in card.content
    assert card.data.pipeline_tag == "image-text-to-text"
    assert {"grpo", "image-captioning"} <= set(card.data.tags or ())
    for words in (
        "peft 1.2",
        "3 held-out samples",
        "train: held out",
        "lr:",
        "`describe the image .`",
        "adapter moves",
    ):
        assert words in card.content, words
    export(world.target, world.export_to("earlier"), checkpoint="2")
    card = ModelCard.load(world.export_to("earlier") / "README.md")
    assert card.data.eval_results is None
    assert "was not evaluated" in card.content
    interval = {"value": 0.625, "low": 0.5, "high": 0.75}
    line = {"step": 2, "best": 2, "eval/cider_d": 0.625, "eval/x": 1.0, "intervals": {"cider_d": interval}}
    world.run.append_line("eval/steps.jsonl", line)
    export(world.target, world.export_to("measured"), checkpoint="best")
    card = ModelCard.load(world.export_to("measured") / "README.md")
    assert [(each.metric_type, each.metric_value) for each in card.data.eval_results or []] == [("cider_d", 0.625)]
    assert "| `cider_d` | 0.5000 [0.4000, 0.6000] | 0.6250 [0.5000, 0.7500] |  |" in card.content


def test_settings_of_the_processor_become_the_export_s_own(make_world: MakeWorld) -> None:
    world = make_world("smolvlm", processor={"do_image_splitting": False})
    check = export(world.target, world.export_to(), merged=True)
    assert check.settings == {}
    base, out = Path(world.cfg.model.path), world.export_to()
    with_tiles, without = (inputs_of(folder, make_samples()[1])["input_ids"].shape[1] for folder in (base, out))
    assert without < with_tiles


def test_generation_settings_are_the_base_s_even_odd_ones_and_turns_end(make_world: MakeWorld) -> None:
    """transformers itself refuses to write such a file."""
    world = make_world()
    file = Path(world.cfg.model.path) / "generation_config.json"
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1}))
    export(world.target, world.export_to(), merged=True)
    found = json.loads((world.export_to() / "generation_config.json").read_text())
    assert (found["temperature"], found["repetition_penalty"]) == (0.7, 1.1)
    assert found["eos_token_id"] == list(world.policy.eos_token_ids)


def test_bad_input(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world()
    taken = world.export_to()
    taken.mkdir(parents=True)
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        export(world.target, taken)
    assert left_in(taken) == ["mine.txt"]
    with pytest.raises(ConfigError, match="no run folder"):
        export(world.cfg.model.path, world.export_to("a"))
    shutil.rmtree(world.root / "held out")
    with pytest.raises(DataError, match=r"nothing to compare .* --data"):
        export(world.target, world.export_to("a"))
    assert left_in(taken.parent) == ["out"]


@pytest.mark.parametrize("merged", [True, False])
def test_a_run_on_a_quantised_base_is_exported_on_the_base_as_it_was(make_world: MakeWorld, merged: bool) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'mmrl_ray[bitsandbytes]'")
    world = make_world("smolvlm", quantization={"kind": "bitsandbytes-4bit"})
    out = world.export_to()
    check = export(world.target, out, merged=merged)
    assert check.unquantized is not None
    assert check.largest <= check.bound < check.unquantized.largest  # of weights alone, and of what 4 bits lose
    config = json.loads((out / ("config.json" if merged else "adapter_config.json")).read_text())
    assert "quantization_config" not in config
    told = check.unquantized.told(check.samples)
    assert "the run learnt on 4-bit weights by bitsandbytes (nf4, double quantisation)" in told
    assert told in (out / "README.md").read_text()
    base = str(world.root / "base")
    plain = AutoModelForImageTextToText.from_pretrained(out if merged else base, dtype=torch.float32)
    if not merged:
        plain = PeftModel.from_pretrained(plain, str(out)).merge_and_unload()
    mine = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    mine = PeftModel.from_pretrained(mine, str(world.run.local_path("adapter"))).merge_and_unload()
    weights = dict(mine.named_parameters())
    assert all(torch.allclose(p, weights[name], atol=1e-6) for name, p in plain.named_parameters())
