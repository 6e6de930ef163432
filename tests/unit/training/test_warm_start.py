"""The supervised warm start on a handful of scenes: it learns, is exact by seed, and is kept whole or not at all."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmrl_ray.config import Config
from mmrl_ray.config.sections import ModelSection, ScenesSection
from mmrl_ray.config.sft import SftSection
from mmrl_ray.data.samples import iter_samples, write_parquet
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.errors import DataError, ModelError, NonFiniteError, QuarantineError, RunError
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_caption, encode_prompts
from mmrl_ray.policy.scoring.prefix import Scores, score_completions
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.training import sft as sft_module
from mmrl_ray.training import sft_data
from mmrl_ray.training import warm_start as warm_start_module
from mmrl_ray.training.sft import train_supervised
from mmrl_ray.training.sft_data import Batches, draw_target
from mmrl_ray.training.warm_start import (
    FACTS,
    base_for_use,
    base_of_run,
    keep_base,
    same_base,
    warm_start,
    warm_start_blindness,
    warm_start_facts,
    warm_start_left_out,
)

SMALL = {"patch_size": 32, "hidden": 32, "layers": 2, "vision_hidden": 32, "vision_layers": 1}
_, SCENES = generate_scenes(ScenesSection(train=1, eval=8, image_size=32))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # the default cache is relative
    monkeypatch.setattr(warm_start_module, "TINY_LLAVA", SMALL)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(root: Path, *, seed: int = 0, sft: dict[str, Any] | None = None, **sections: Any) -> Config:
    settings = {"steps": 4, "batch_size": 4, "warmup_steps": 0, "train_vision": True, "cache": str(root / "cache")}
    return Config.model_validate(
        {
            "run": {"name": "test", "seed": seed},
            "model": {"path": "builtin:tiny-llava", "dtype": "float32"},
            "data": {
                "train": str(root / "train"),
                "eval": str(root / "eval"),
                "scenes": {"train": 12, "eval": 2, "image_size": 32},
            },
            "sft": {**settings, **(sft or {})},
            "learner": {"steps": 1},
            **sections,
        }
    )


def loaded(folder: str) -> Policy:
    return load_policy(ModelSection(path=folder, dtype="float32"), device="cpu")


def test_training_lowers_the_loss_and_leaves_an_ordinary_folder(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float, float]] = []
    cfg = config(tmp_path, sft={"steps": 40, "batch_size": 8, "captions_per_image": 2, "lr": 3e-3})
    folder = warm_start(cfg, progress=lambda done, of, f: seen.append((done, of, f["loss"], f["lr"])))
    facts = warm_start_facts(folder)
    assert facts["loss_last"] < 0.75 * facts["loss_first"]
    assert [done for done, *_ in seen] == [1, 10, 20, 30, 40]
    assert seen[0][3] == pytest.approx(3e-3)
    assert seen[-1][3] < 1e-4
    assert type(AutoModelForImageTextToText.from_pretrained(folder)).__name__ == "LlavaForConditionalGeneration"
    assert AutoProcessor.from_pretrained(folder).chat_template


def test_the_first_loss_is_the_cross_entropy_of_the_caption_tokens(tmp_path: Path) -> None:
    cfg = config(tmp_path, sft={"steps": 1, "batch_size": 3, "lr": 1e-9})
    facts = warm_start_facts(warm_start(cfg))
    untrained = loaded(warm_start(config(tmp_path, sft=None).model_copy(update={"sft": None})))
    # The same draws, by the documented seeds; scored by transformers' own loss, prompt tokens labelled -100.
    policy = loaded(untrained.path)
    assert cfg.sft is not None
    _, pairs = Batches(policy, cfg, sft_module.derive_seed(0, "sft")).next(cfg.sft)
    total, count = 0.0, 0
    for prompt, (caption,) in pairs:
        ids = torch.cat([prompt.input_ids, caption])[None]
        labels = ids.clone()
        labels[:, : prompt.input_ids.numel()] = -100
        with torch.no_grad():
            logits = policy.model(input_ids=ids, pixel_values=prompt.model_inputs["pixel_values"]).logits.float()
        logits[..., list(policy.image_token_ids)] = float("-inf")
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        total, count = total + loss.item(), count + caption.numel()
    assert facts["loss_first"] == pytest.approx(total / count, rel=1e-5)


def test_seeds_and_settings_name_the_result(tmp_path: Path) -> None:
    first = warm_start(config(tmp_path))
    weights = load_file(Path(first) / "model.safetensors")
    other_cache = config(tmp_path, sft={"cache": str(tmp_path / "elsewhere")})
    second = warm_start(other_cache)
    assert Path(first).name == Path(second).name
    again = load_file(Path(second) / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    names = {
        Path(warm_start(cfg)).name
        for cfg in (
            config(tmp_path, seed=1),
            config(tmp_path, sft={"lr": 2e-3}),
            config(tmp_path).model_copy(update={"sft": None}),
        )
    }
    assert len(names | {Path(first).name}) == 4


def test_micro_batches_do_not_change_the_gradient(tmp_path: Path) -> None:
    one = warm_start_facts(warm_start(config(tmp_path)))
    cut = config(tmp_path, learner={"steps": 1, "micro_batch_tokens": 1}, sft={"cache": str(tmp_path / "cut")})
    other = warm_start(cut)
    assert warm_start_facts(other)["loss_last"] == pytest.approx(one["loss_last"], rel=1e-5)


def test_a_run_whose_data_and_base_are_gone_says_that_they_are_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = str(tmp_path / "scenes" / "train")
    data = {"train": train, "prompt": "say", "scenes": {"train": 8, "eval": 2, "image_size": 32}}
    cfg = config(tmp_path, data=data)
    run = RunDir.create(tmp_path / "runs", "test")  # of a time when bases were not kept
    folder = base_for_use(cfg, run)
    capsys.readouterr()
    assert base_for_use(cfg, run) == folder
    assert capsys.readouterr() == ("", "")  # all is there
    shutil.rmtree(tmp_path / "scenes")
    shutil.rmtree(tmp_path / "cache")
    assert base_for_use(cfg, run) == folder
    again = capsys.readouterr()
    assert again.out == ""  # where captions go
    told = " ".join(again.err.split())
    assert f"test: {train} is not there any more: the scenes are drawn anew" in told
    assert "it is made anew, with 4 steps of warm start" in told
    assert "warm start 4/4" in told


def test_the_second_call_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path)
    folder = warm_start(cfg)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(warm_start_module, "train_supervised", never)
    monkeypatch.setattr(warm_start_module, "load_policy", never)
    assert warm_start(cfg) == folder
    # A folder without its facts was never finished.
    (Path(folder) / FACTS).unlink()
    with pytest.raises(AssertionError, match="trained again"):
        warm_start(cfg)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    cfg = config(tmp_path)

    def broken_save(policy: Policy, folder: Path, *base: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(warm_start_module, "_save", broken_save)
    with pytest.raises((KeyboardInterrupt, RunError)) as caught:
        warm_start(cfg)
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
        assert "sft.cache" in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_lora_is_merged_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    start = warm_start(config(tmp_path).model_copy(update={"sft": None}))
    cfg = config(tmp_path, model={"path": start, "dtype": "float32"}, sft={"mode": "lora", "train_vision": False})
    before = load_file(Path(start) / "model.safetensors")
    after = load_file(Path(warm_start(cfg)) / "model.safetensors")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("language_model" in name and "proj" in name for name in changed)


def test_full_without_train_vision_leaves_the_tower_and_uses_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = warm_start(config(tmp_path).model_copy(update={"sft": None}))
    cfg = config(tmp_path, model={"path": start, "dtype": "float32"}, sft={"train_vision": False, "steps": 6})
    encoded: list[int] = []
    real = sft_module.vision_features

    def counted(policy: Policy, prompts: Any, cache: Any = None) -> Any:
        misses = cache.misses
        result = real(policy, prompts, cache)
        encoded.append(cache.misses - misses)
        return result

    made: list[str] = []

    def listed(policy: Policy, samples: Any) -> Any:
        made.extend(sample.id for sample in samples)
        return encode_prompts(policy, samples)

    monkeypatch.setattr(sft_module, "vision_features", counted)
    monkeypatch.setattr(sft_data, "encode_prompts", listed)
    before = load_file(Path(start) / "model.safetensors")
    after = load_file(Path(warm_start(cfg)) / "model.safetensors")
    frozen = [name for name in before if "vision_tower" in name or "projector" in name]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["language_model.model.norm.weight"], after["language_model.model.norm.weight"])
    assert sum(encoded) == 12  # images of the split, in two epochs of three steps
    assert len(made) == len(set(made)) == 12, "nor is a prompt made again"
    monkeypatch.setattr(sft_data, "_KEPT_PROMPTS", 0)
    anew = cfg.model_copy(update={"sft": cfg.sft.model_copy(update={"cache": str(tmp_path / "anew")})})
    without = load_file(Path(warm_start(anew)) / "model.safetensors")
    assert len(made) == 12 + 24, "without room"
    assert all(torch.equal(after[name], without[name]) for name in after)


def test_targets_follow_the_weights_and_what_a_row_has() -> None:
    sample = SCENES[0]
    sft = SftSection(steps=1, warmup_steps=0, terse=0.5, partial=0.3, full=0.2)
    rng = random.Random(0)
    kinds = Counter()
    for _ in range(3000):
        text = draw_target(sample, sft, rng)
        kinds["terse" if text in sample.metadata["terse"] else "full" if text in sample.references else "partial"] += 1
    assert kinds["terse"] / 3000 == pytest.approx(0.5, abs=0.04)
    assert kinds["full"] / 3000 == pytest.approx(0.2, abs=0.04)
    plain = replace(sample, metadata={})
    assert {draw_target(plain, sft, rng) for _ in range(50)} == set(sample.references)
    with pytest.raises(DataError, match="has no caption to train on"):
        draw_target(replace(plain, references=()), sft, rng)


def test_a_loss_that_is_nan_stops_with_step_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = score_completions
    calls: list[int] = []

    def poisoned(*args: Any, **kwargs: Any) -> Scores:
        calls.append(1)
        scores = real(*args, **kwargs)
        return replace(scores, logprobs=scores.logprobs * float("nan")) if len(calls) == 2 else scores

    monkeypatch.setattr(sft_module, "score_completions", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 1: loss is nan on samples train-\d+, .* and 1 more"):
        warm_start(config(tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_rows_that_cannot_be_used_are_left_out_and_told(tmp_path: Path) -> None:
    """A broken picture and a prompt with the image's own token; the second's id is that of a good row."""
    rows = [replace(each, id="same", prompt="describe it") for each in SCENES]
    rows[2] = replace(rows[2], images=(b"no picture",))
    rows[5] = replace(rows[5], prompt="see <image>")
    rows[6] = replace(rows[6], references=())
    write_parquet(tmp_path / "own", rows)
    data = {"train": str(tmp_path / "own")}
    cfg = config(tmp_path, data=data, sft={"steps": 6})
    folder = warm_start(cfg)
    found = {record.where[-5:]: record.reason for record in warm_start_left_out(folder)}
    assert found["row 2"].startswith("text instead of an image")
    assert found["row 5"].startswith("DataError: prompt of sample 'same' contains the special token '<image>'")
    assert found["row 6"].startswith("DataError: sample 'same' has no caption to train on")
    assert len(found) == len(warm_start_left_out(folder)) == 3
    assert warm_start_left_out(tmp_path) == ()
    with pytest.raises(QuarantineError, match=f"First of {tmp_path / 'own'}"):
        warm_start(config(tmp_path, data={**data, "max_quarantined": 2}, sft={"steps": 6, "lr": 1e-5}))
    # The same of all rows is no matter of rows, however many may be left out.
    write_parquet(tmp_path / "all", [replace(each, prompt="see <image>") for each in rows])
    with pytest.raises(ModelError, match=r"the first samples all failed with the same error.*special token '<image>'"):
        warm_start(config(tmp_path, data={"train": str(tmp_path / "all")}))


def test_a_checkpoint_without_sft_is_taken_as_it_is(tmp_path: Path) -> None:
    cfg = config(tmp_path, model={"path": "owner/model"}).model_copy(update={"sft": None})
    assert warm_start(cfg) == "owner/model"
    with pytest.raises(ModelError, match="no built-in model 'builtin:giant'"):
        warm_start(config(tmp_path, model={"path": "builtin:giant"}))
    with pytest.raises(ModelError, match="is no folder"):
        warm_start(config(tmp_path, model={"path": str(tmp_path / "missing")}))


def test_a_tiny_model_knows_the_words_of_other_data(tmp_path: Path) -> None:
    warm_start(config(tmp_path))  # writes the scenes
    data = {"train": str(tmp_path / "train"), "prompt": "Say zebra:"}
    policy = loaded(warm_start(config(tmp_path, data=data)))
    unknown = policy.tokenizer.unk_token_id
    sample = next(iter_samples(tmp_path / "train", prompt="Say zebra:"))
    ids = [encode_prompts(policy, [sample])[0].input_ids, *(encode_caption(policy, r) for r in sample.references)]
    assert all(unknown not in each.tolist() for each in ids)


def test_facts_say_what_it_was_made_from(tmp_path: Path) -> None:
    folder = warm_start(config(tmp_path, seed=3))
    facts = json.loads((Path(folder) / FACTS).read_text())
    assert facts["made_from"]["seed"] == 3
    assert facts["made_from"]["sft"]["steps"] == 4
    assert facts["steps"] == 4
    assert warm_start_facts(build_tiny_llava(tmp_path / "plain", vocabulary=["a"], **SMALL)) == {}


def test_train_supervised_leaves_nothing_trainable(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    policy = loaded(warm_start(cfg))
    assert cfg.sft is not None
    losses = train_supervised(policy, cfg, cfg.sft.model_copy(update={"steps": 2})).losses
    assert len(losses) == 2
    assert not any(p.requires_grad for p in policy.model.parameters())


def test_a_step_that_does_not_fit_is_begun_anew_with_less_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Four images, of which two fit; memory runs out when some of the gradient has been made."""
    cfg = config(tmp_path, sft={"steps": 2, "train_vision": False})
    assert cfg.sft is not None
    folder = warm_start(cfg)
    score, taken, most = sft_module.score_completions, list[int](), [99]

    def small(policy: Policy, prompts: Any, *arguments: Any, **settings: Any) -> Any:
        taken.append(len(prompts))
        scores = score(policy, prompts, *arguments, **settings)
        if len(prompts) > most[0]:
            scores.logprobs.sum().backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return scores

    monkeypatch.setattr(sft_module, "score_completions", small)
    losses, weights = [], []
    for most[0] in (99, 2):
        policy = loaded(folder)
        losses.append(train_supervised(policy, cfg, cfg.sft).losses)
        weights.append(torch.cat([p.flatten() for p in policy.decoder.parameters()]))
    assert taken[:2] == [4, 4]
    assert taken[2] == 4
    assert max(taken[3:]) <= 2
    assert sum(taken[3:]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
    assert "warm start step 0: 4 images at once do not fit" in caplog.text
    most[0] = 0
    with pytest.raises(RunError, match=r"warm start step 0: one image with 1 captions does not fit the device's"):
        train_supervised(loaded(folder), cfg, cfg.sft)


def test_a_warm_start_that_does_not_look_is_told_each_time_it_is_used(tmp_path: Path) -> None:
    """A language model that learns faster than the frozen tower's features mean anything to it."""
    scenes = {"train": 40, "eval": 24, "image_size": 32}
    places = {"train": str(tmp_path / "train"), "eval": str(tmp_path / "eval"), "scenes": scenes}
    blind = config(tmp_path, sft={"steps": 30, "lr": 3e-3, "train_vision": False}, data=places)
    for _ in range(2):  # made, and then found in the cache
        found = warm_start_blindness(warm_start(blind))
        assert found is not None
        assert (found.pictures, found.share) == (24, 1.0)
    without = config(tmp_path, data=places).model_copy(update={"sft": None})
    assert warm_start_blindness(warm_start(without)) is None


class _Stopper:
    """A user who presses Ctrl-C when so many steps are done."""

    def __init__(self, *steps: int) -> None:
        self._steps = list(steps)

    def __call__(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        if self._steps and done >= self._steps[0]:
            self._steps.pop(0)
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "sft", [{"train_vision": True}, {"train_vision": False}, {"train_vision": False, "mode": "lora"}]
)
def test_one_that_is_stopped_goes_on_to_the_very_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sft: dict[str, Any]
) -> None:
    monkeypatch.setattr(sft_module, "_TELL_S", 0.0)  # a look at every step
    settings = {"steps": 9, "captions_per_image": 2, "terse": 0.5, "warmup_steps": 2, **sft}
    start = warm_start(config(tmp_path).model_copy(update={"sft": None}))
    broken = tmp_path / "rows"  # one row has no caption to train on
    samples = list(iter_samples(tmp_path / "train", prompt="what is it ?"))
    write_parquet(broken, [*samples[:5], replace(samples[5], references=(), metadata={}), *samples[6:]])
    sections = {"model": {"path": start, "dtype": "float32"}, "data": {"train": str(broken), "max_quarantined": 1}}
    straight = config(tmp_path, sft={**settings, "cache": str(tmp_path / "straight")}, **sections)
    cfg = config(tmp_path, sft={**settings, "cache": str(tmp_path / "stopped")}, **sections)
    expected = Path(warm_start(straight))
    stopper = _Stopper(2, 7)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            warm_start(cfg, progress=stopper)
    steps: list[int] = []
    found = Path(warm_start(cfg, progress=lambda done, total, figures: steps.append(done)))
    assert steps[0] >= 7, "what was done is not done again"
    mine, theirs = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    facts, whole = warm_start_facts(found), warm_start_facts(expected)
    for name in ("steps", "loss_first", "loss_last", "left_out"):
        assert facts[name] == whole[name]
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [found.name], "nothing is left behind"


def test_what_a_stopped_warm_start_goes_on_from_lies_in_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft_module, "_TELL_S", 0.0)
    cfg = config(tmp_path, sft={"steps": 6})
    run = RunDir.create(tmp_path / "runs", "r1")
    with pytest.raises(KeyboardInterrupt):
        warm_start(cfg, progress=_Stopper(2))  # `mmrl sft`, which has no run
    with pytest.raises(KeyboardInterrupt):
        base_of_run(cfg, run, progress=_Stopper(4), owned=True)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "runs" / "r1").rename(tmp_path / "moved")
    run, steps = RunDir.at(tmp_path / "moved"), []
    made = base_of_run(cfg, run, progress=lambda done, total, figures: steps.append(done), owned=True)
    assert steps[0] >= 4, "what was done is not done again"
    assert run.list() == []
    weights = load_file(Path(made) / "model.safetensors")
    shutil.rmtree(tmp_path / "cache")
    straight = load_file(Path(warm_start(cfg)) / "model.safetensors")
    assert all(torch.equal(straight[name], value) for name, value in weights.items())


def test_a_run_keeps_its_base_when_the_cache_is_gone_and_it_is_moved(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    run = RunDir.create(tmp_path / "runs", "r1")
    made = base_of_run(cfg, run)
    path, size = keep_base(cfg, run, made)
    assert size == sum(file.stat().st_size for file in Path(made).iterdir())
    assert os.stat(Path(path) / FACTS).st_ino == os.stat(Path(made) / FACTS).st_ino, "a link takes no room"
    weights = load_file(Path(made) / "model.safetensors")
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "runs" / "r1").rename(tmp_path / "moved")
    again = base_of_run(cfg, RunDir.at(tmp_path / "moved"))
    assert Path(again).parent == tmp_path / "moved"
    kept = load_file(Path(again) / "model.safetensors")
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    assert not (tmp_path / "cache").exists(), "nothing is trained anew"
    assert same_base(again, again)


def test_a_base_that_lies_elsewhere_comes_back_into_the_cache(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    run = RunDir.create("far", "r1", filesystem=remote)
    made = base_of_run(cfg, run)
    assert keep_base(cfg, run, made)[0] == made
    weights = load_file(Path(made) / "model.safetensors")
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "train")
    again = base_of_run(cfg, run)
    assert again == made
    assert all(torch.equal(weights[k], v) for k, v in load_file(Path(again) / "model.safetensors").items())
