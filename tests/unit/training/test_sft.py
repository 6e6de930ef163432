"""Supervised training by parts and in stages, against loops of plain transformers; looks, resume, what it writes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, ResNetConfig

from mmrl_ray.config import Config
from mmrl_ray.config.load import parse_config
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.config.sft import SftSection
from mmrl_ray.data.samples import iter_references, iter_samples, write_parquet
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.errors import ConfigError, DataError, ModelError
from mmrl_ray.evaluation.evaluate import evaluate_target
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parts import model_parts
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import vision_features
from mmrl_ray.training import sft as sft_module
from mmrl_ray.training import sft_state
from mmrl_ray.training import warm_start as warm_start_module
from mmrl_ray.training.sft import Trained, train_supervised
from mmrl_ray.training.sft_data import Batches, Pair, Visit, draw_target
from mmrl_ray.training.sft_state import Checkpoint
from mmrl_ray.training.warm_start import LOG, warm_start, warm_start_facts
from tests.support.families import BUILDERS
from tests.support.families.common import spread
from tests.support.tiny_models import build_family, section_of

STAGES = [
    {"train": ["projector"], "steps": 2, "lr": 3e-3},
    {"train": ["projector", "language"], "steps": 3, "lr": {"projector": 1e-3, "language": 2e-4}, "batch_size": 3},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA and two splits of scenes, whose captions are of unequal length."""
    root = tmp_path_factory.mktemp("sft")
    train, held_out = generate_scenes(ScenesSection(train=10, eval=8, image_size=32))
    write_parquet(root / "train", train)
    write_parquet(root / "eval", held_out)
    build_family("llava", root / "model")
    return root


def config(place: Path, cache: Path, sft: Mapping[str, Any], *, seed: int = 0, **sections: Any) -> Config:
    whole: dict[str, Any] = {
        "run": {"name": "test", "seed": seed},
        "model": {"path": str(place / "model"), "dtype": "float32", "lora": {"r": 2}},
        "data": {"train": str(place / "train"), "eval": str(place / "eval"), "prompt": "describe the image ."},
        "rollout": {"max_new_tokens": 8},
        "learner": {"steps": 1},
        "sft": {"batch_size": 4, "warmup_steps": 0, "cache": str(cache), **sft},
    }
    return Config.model_validate(whole | sections)


def policy_of(cfg: Config) -> Policy:
    torch.set_num_threads(1)
    return load_policy(cfg.model, device="cpu")


def trained(cfg: Config, policy: Policy | None = None, **how: Any) -> tuple[Policy, Trained]:
    policy, sft = policy or policy_of(cfg), cfg.sft
    assert sft is not None
    return policy, train_supervised(policy, cfg, sft, **how)


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.hf_model.state_dict().items()}


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def test_stages_and_rates_are_those_of_a_plain_loop_in_float64(place: Path, tmp_path: Path) -> None:
    """One caption a micro-batch here; there the sum over all caption tokens of a step, divided once."""
    cfg = config(place, tmp_path, {"stages": STAGES, "micro_batch_tokens": 1, "max_grad_norm": 0.5})
    policy = policy_of(cfg)
    before = weights_of(policy)
    _, found = trained(cfg, policy)
    assert cfg.sft is not None
    model = AutoModelForImageTextToText.from_pretrained(cfg.model.path).double().eval()
    batches = Batches(policy, cfg, sft_module.derive_seed(0, "sft"))
    parts = {"projector": "multi_modal_projector", "language": "language_model"}
    losses = []
    for stage in cfg.sft.phases:
        model.requires_grad_(False)
        groups = []
        for part in stage.parts:
            own = [
                p for n, p in model.named_parameters() if parts[part] in n or (part == "language" and "lm_head" in n)
            ]
            groups.append({"params": [p.requires_grad_(True) for p in own], "lr": stage.rate(part)})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=stage.total_steps)
        for _ in range(stage.total_steps):
            _, pairs = batches.next(stage)
            loss = plain_loss(model, pairs, policy.image_token_ids)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 0.5)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    assert found.losses == pytest.approx(losses, rel=1e-5)
    after = weights_of(policy)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(after[name].double(), value, rtol=1e-4, atol=2e-6, msg=name)
    kept = {name for name in before if torch.equal(after[name], before[name])}
    assert kept == {name for name in before if "vision_tower" in name}
    assert [line["stage"] for line in found.steps] == [1, 1, 2, 2, 2]
    assert found.steps[2]["lr/language"] == pytest.approx(2e-4)


def plain_loss(model: Any, pairs: list[Pair], forbidden: tuple[int, ...]) -> torch.Tensor:
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for prompt, captions in pairs:
        for caption in captions:
            ids = torch.cat([prompt.input_ids, caption])[None]
            pixels = prompt.model_inputs["pixel_values"].to(model.dtype)
            logits = model(input_ids=ids, pixel_values=pixels).logits[0, -caption.numel() - 1 : -1].double()
            logits[:, list(forbidden)] = float("-inf")
            total = total + torch.nn.functional.cross_entropy(logits, caption, reduction="sum")
            tokens += caption.numel()
    return total / tokens


def test_a_tower_with_batch_normalisation_keeps_its_statistics(place: Path, tmp_path: Path) -> None:
    """FastVLM takes any tower; this one is a ResNet. What one picture gives does not depend on its neighbours."""
    parts = BUILDERS["fast_vlm"]()
    tower = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    tower = ResNetConfig.from_dict({**tower.to_dict(), "downsample_in_first_stage": False, "hidden_size": 32})
    config_of = type(parts.config)
    parts = replace(parts, config=config_of.from_dict({**parts.config.to_dict(), "vision_config": tower.to_dict()}))
    torch.manual_seed(0)
    model = parts.model_class(parts.config)
    spread(model)
    for name, buffer in model.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    tokenizer = parts.processor.tokenizer
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(tmp_path / "resnet")
    parts.processor.save_pretrained(tmp_path / "resnet")
    section = section_of("fast_vlm", tmp_path / "resnet")
    sft = {"steps": 2, "train": ["vision", "projector", "language"], "lr": 1e-3}
    cfg = config(place, tmp_path / "cache", sft).model_copy(update={"model": section})
    policy = policy_of(cfg)
    before = weights_of(policy)
    trained(cfg, policy)
    after = weights_of(policy)
    kept = [name for name in before if "running_" in name or "num_batches" in name]
    assert len(kept) >= 9
    assert all(torch.equal(before[name], after[name]) for name in kept)
    norm = next(name for name in before if name.endswith("normalization.weight"))
    assert not torch.equal(before[norm], after[norm]), "its scale trains"
    prompts = encode_prompts(policy, list(iter_samples(place / "train", prompt="describe the image ."))[:3])
    together, (alone,) = vision_features(policy, prompts), vision_features(policy, prompts[:1])
    torch.testing.assert_close(together[0].tokens, alone.tokens)


def test_an_adapter_beside_a_projector_that_trains_whole(place: Path, tmp_path: Path) -> None:
    cfg = config(place, tmp_path, {"steps": 2, "mode": "lora", "train": ["projector", "language"], "lr": 1e-2})
    policy = policy_of(cfg)
    before = weights_of(policy)
    trained(cfg, policy)
    changed = {name for name, value in weights_of(policy).items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in changed} == {"multi_modal_projector", "language_model"}
    assert all("_proj" in name or "linear_" in name for name in changed), "no norm and no embedding"


# -- captions ----------------------------------------------------------------------------------------------------------


def test_captions_in_turn_all_come_before_one_comes_again() -> None:
    _, (sample, other, *_) = generate_scenes(ScenesSection(train=1, eval=2, image_size=32))
    texts = tuple(f"caption {n}" for n in range(5))
    sample, other = replace(sample, references=texts, place="a"), replace(other, references=texts, place="b")
    sft = SftSection(steps=1, warmup_steps=0, captions="in_turn", captions_per_image=2, batch_size=2)
    said: dict[str, list[str]] = {"a": [], "b": []}
    for epoch in range(5):
        for each in (sample, other):
            said[each.place] += [draw_target(each, sft, random.Random(0), Visit(epoch, 2, n, 7)) for n in range(2)]
    for order in said.values():
        assert Counter(order[:5]) == Counter(order[5:]) == Counter(texts)
    assert said["a"] != said["b"]
    assert said["a"][:5] != said["a"][5:]


# -- looks -------------------------------------------------------------------------------------------------------------


def test_a_look_measures_what_plain_code_does_and_changes_nothing(place: Path, tmp_path: Path) -> None:
    sft = {"steps": 4, "train": ["projector", "language"], "eval_every": 2, "micro_batch_tokens": 40}
    said: list[str] = []
    cfg = config(place, tmp_path, sft, eval={"metrics": ["bleu_4", "caption/distinct"]})
    policy, found = trained(cfg, say=said.append)
    assert [look["step"] for look in found.looks] == [0, 2, 4]
    blind, without = trained(config(place, tmp_path, {**sft, "eval_every": None}))
    assert without.looks == []
    assert without.losses == found.losses
    seen, unseen = weights_of(policy), weights_of(blind)
    assert all(torch.equal(seen[name], unseen[name]) for name in seen)
    last = found.looks[-1]
    assert said[-1].startswith(f"held-out pictures after 4 of 4 steps: loss {last['loss']:.4g}  cider_d ")
    folder = Path(warm_start(cfg))
    # In another process, by plain transformers alone; and the measures by `mmrl evaluate` of that folder.
    told = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), str(place / "eval")], capture_output=True, text=True, check=True
    )
    assert float(told.stdout) == pytest.approx(last["loss"], rel=1e-4)
    again = evaluate_target(str(folder), data=str(place / "eval"), prompt=cfg.data.prompt, max_new_tokens=8)
    for name in ("bleu_4", "caption/distinct"):
        assert last[name] == pytest.approx(again.measures[name].mean)
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == found.losses
    assert [line["held_out"]["step"] for line in lines if "held_out" in line] == [0, 2, 4]
    assert warm_start_facts(folder)["held_out"] == found.looks


PLAIN = """
import io, sys, torch, pyarrow.parquet as pq
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, data = sys.argv[1:]
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
assert model.generation_config.eos_token_id is not None
end, total, tokens = model.generation_config.eos_token_id, 0.0, 0
end = end if isinstance(end, list) else [end]
for row in pq.read_table(data).to_pylist():
    turn = [{"type": "image"}, {"type": "text", "text": "describe the image ."}]
    text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    picture = Image.open(io.BytesIO(row["image"]["bytes"]))
    prompt = processor(images=picture, text=text, return_tensors="pt")
    for reference in row["references"]:
        ids = processor.tokenizer(reference, add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([ids, torch.tensor([end[:1]])], dim=1)
        whole = torch.cat([prompt["input_ids"], ids], dim=1)
        with torch.no_grad():
            logits = model(input_ids=whole, pixel_values=prompt["pixel_values"]).logits[0, -ids.shape[1] - 1 : -1]
        logits[:, model.config.image_token_id] = float("-inf")
        total += torch.nn.functional.cross_entropy(logits, ids[0], reduction="sum").item()
        tokens += ids.shape[1]
print(total / tokens)
"""


# -- going on ----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """The process is gone: nothing is written any more."""


def test_one_that_is_killed_goes_on_to_the_very_same_weights(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within each stage, behind the newest checkpoint, and while it looks at held-out pictures."""
    stages = [
        {"train": ["vision", "projector"], "steps": 3},
        {"mode": "lora", "train": ["projector", "language"], "steps": 3, "lr": {"projector": 1e-3, "language": 1e-2}},
        {"train": ["language"], "steps": 3, "captions_per_image": 2},
    ]
    sft = {"stages": stages, "eval_every": 2, "captions": "in_turn", "warmup_steps": 1}
    cfg = config(place, tmp_path, sft)
    straight, whole = trained(cfg)
    file = tmp_path / "one.partial.pt"
    step, look = sft_module._step, sft_module.HeldOut.look
    left = [2, 5, 5, 8]  # steps before which it is killed; each checkpoint is of an earlier one
    kills_in_looks = [4]

    def killed(*args: Any) -> Any:
        if left and args[-1] == left[0]:
            left.pop(0)
            raise Killed
        return step(*args)

    def killed_look(self: Any, *args: Any) -> Any:
        if kills_in_looks and running[0].steps and len(running[0].steps) == kills_in_looks[0]:
            kills_in_looks.pop()
            raise Killed
        return look(self, *args)

    running: list[Trained] = []
    begin = Trained.__init__

    def noted(self: Trained, *args: Any, **named: Any) -> None:
        begin(self, *args, **named)
        running.insert(0, self)

    monkeypatch.setattr(Trained, "__init__", noted)
    monkeypatch.setattr(sft_module, "_step", killed)
    monkeypatch.setattr(sft_module.HeldOut, "look", killed_look)
    monkeypatch.setattr(Checkpoint, "is_due", lambda self, asked: len(running[0].steps) % 2 == 1)
    attempts = 0
    while True:
        attempts += 1
        try:
            policy, found = trained(cfg, checkpoint=Checkpoint(file))
            break
        except Killed:
            assert attempts < 9
    assert (attempts, left, kills_in_looks) == (6, [], [])
    assert found.steps == whole.steps
    assert found.looks == whole.looks
    mine, theirs = weights_of(policy), weights_of(straight)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_other_settings_begin_anew_and_say_so(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_state, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(sft_state, "_SAVING_SHARE", 0.0)
    monkeypatch.setattr(sft_module, "_TELL_S", 0.0)

    def kill(done: int, total: int, figures: Mapping[str, float]) -> None:
        if done == 2:
            raise Killed

    sft = {"steps": 3, "lr": 1e-3}
    with pytest.raises(Killed):
        warm_start(config(place, tmp_path, sft), progress=kill)
    said: list[str] = []
    steps: list[int] = []
    for other in ({"lr": 2e-3}, {"eval_samples": 3}):  # the weights do not depend on the second
        cfg = config(place, tmp_path, {**sft, **other})
        warm_start(cfg, progress=lambda done, of, figures: steps.append(done), say=said.append)
    first, second = steps[: steps.index(3) + 1], steps[steps.index(3) + 1 :]
    assert (first[0], second[0]) == (0, 1), "what was done is not done again"
    (line,) = said
    assert "the warm start begins anew: " in line
    assert "(sft.lr: 0.001 → 0.002)" in line
    torch.save({"parameters": []}, tmp_path / "old.pt")
    assert Checkpoint(tmp_path / "old.pt").load() is None, "of an earlier version"


# -- settings ----------------------------------------------------------------------------------------------------------


def test_configs_of_before_have_the_key_that_they_had() -> None:
    old = SftSection(steps=320, batch_size=64, captions_per_image=2, warmup_steps=20, train_vision=True, terse=0.3)
    assert old.identity == {
        **{"mode": "full", "train_vision": True, "steps": 320, "batch_size": 64, "captions_per_image": 2, "lr": 1e-3},
        **{"lr_min": 0.0, "warmup_steps": 20, "weight_decay": 0.0, "max_grad_norm": 1.0},
        **{"terse": 0.3, "partial": 0.0, "full": 1.0},
    }
    new = old.model_copy(update={"train_vision": False, "train": ["vision", "language", "projector"]})
    assert new.identity == old.identity
    assert SftSection(steps=20, train=["language"]).identity == SftSection(steps=20, eval_every=3).identity
    assert SftSection(steps=20, train=["projector"]).identity != SftSection(steps=20).identity


BASE = "run: {name: a}\nmodel: {path: m}\ndata: {train: t}\nlearner: {steps: 1}\n"


@pytest.mark.parametrize(
    ("sft", "told"),
    [
        ("{}", "sft: steps is missing: write how many, or stages with steps of their own"),
        ("{steps: 0}", "sft.steps: input should be greater than or equal to 1, not 0"),
        ("{steps: 20, lr: -1}", "sft.lr: input should be greater than 0, not -1"),
        ("{steps: 20, lr: {language: -1}}", "sft.lr.language: input should be greater than 0, not -1"),
        ("{steps: 20, lr: {projector: 1.0}}", "lr has no rate for language: write one for each part of train"),
        ("{steps: 20, lr: {projector: 1.0}}", "lr has a rate for projector, which does not train"),
        ("{steps: 20, stages: [{steps: 20}]}", "both steps and stages: each stage has steps of its own"),
        ("{stages: [{steps: 20}, {steps: 0}]}", "sft.stages[1].steps: input should be greater than or equal to 1"),
        ("{stages: [{steps: 20}, {steps: 5}]}", "sft: stage 2: warmup_steps=10 must be below steps=5"),
        ("{stages: [{steps: 20, mode: lora, train: [vision]}]}", "stage 1: mode: lora puts an adapter on the language"),
        ("{steps: 20, train: [vision], train_vision: true}", "say the same thing twice: write train alone"),
        ("{steps: 20, train: [vision, vision]}", "train=vision, vision names a part twice"),
        ("{steps: 20, eval_every: 5}", "sft.eval_every=5 looks at held-out pictures, and there are none"),
    ],
)
def test_settings_that_do_not_fit_are_told(sft: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f"{BASE}sft: {sft}\n", "c.yaml")
    assert told in str(caught.value)


def test_what_a_model_does_not_have_is_told_before_the_first_step(place: Path, tmp_path: Path) -> None:
    stages = [{"steps": 2, "train": ["projector"]}, {"steps": 2, "train": ["connector", "language"]}]
    with pytest.raises(
        ModelError, match=r"train of stage 2 names connector, of .*; its parts are projector \([\d,]+\), language \("
    ):
        trained(config(place, tmp_path, {"stages": stages}))
    rows = list(iter_samples(place / "eval", prompt="what ?"))
    write_parquet(tmp_path / "bare", [rows[0], replace(rows[1], references=())])
    data = {"train": str(place / "train"), "eval": str(tmp_path / "bare")}
    with pytest.raises(DataError, match="has no references to measure by"):
        trained(config(place, tmp_path, {"steps": 2, "eval_every": 1}, data=data))


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_family_has_a_tower_a_projector_and_a_language_model(name: str) -> None:
    made = BUILDERS[name]()
    with torch.device("meta"):
        model = made.model_class(made.config)
    parts = model_parts(model)
    assert list(parts) == ["projector", "language", "vision"]
    ids = [id(p) for named in parts.values() for p in named.values()]
    assert len(ids) == len(set(ids))
    left = [n for n, p in model.named_parameters() if id(p) not in set(ids)]
    assert all("generation_" in each or "vqmodel" in each for each in left), left


# -- a model of the Hub ------------------------------------------------------------------------------------------------


def test_another_revision_of_a_hub_id_is_another_warm_start(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("next", "b" * 40)):
        (repo / "refs" / name).write_text(commit)
        build_family("llava", repo / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cfg = config(place, tmp_path / "cache", {"steps": 1}, model={"path": "someone/tiny", "dtype": "float32"})
    keys = [Path(warm_start(cfg)).name]
    first = load_policy(cfg.model, device="cpu").revision_key
    (repo / "refs" / "main").write_text("b" * 40)  # the branch moves
    keys.append(Path(warm_start(cfg)).name)
    assert load_policy(cfg.model, device="cpu").revision_key != first
    assert len(set(keys)) == 2
    (facts,) = (warm_start_facts(tmp_path / "cache" / key)["made_from"]["model"] for key in keys[1:])
    assert facts["commit"] == "b" * 40
    folder = tmp_path / "cache" / keys[0]
    assert {"chat_template.jinja", "generation_config.json", "processor_config.json", "tokenizer.json"} <= {
        file.name for file in folder.iterdir()
    }
    assert next(iter_references(place / "train"))
    assert warm_start_module.same_base(str(folder), str(folder))
