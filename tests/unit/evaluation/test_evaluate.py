"""`mmrl evaluate` and `mmrl caption` on a run folder, an unfinished one and a bare model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mmrl_ray
from mmrl_ray.analysis.correlation import modality_correlation
from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config
from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data.images import encode_png
from mmrl_ray.data.samples import iter_references, read_split, write_parquet
from mmrl_ray.errors import ConfigError, DataError, ImageError, RunError
from mmrl_ray.evaluation.captioning import caption_images, image_bytes
from mmrl_ray.evaluation.evaluate import evaluate_target, present
from mmrl_ray.evaluation.explain import explain, explain_image
from mmrl_ray.evaluation.model_source import open_target
from mmrl_ray.evaluation.samples import caption_samples
from mmrl_ray.evaluation.scores import Evaluation, score_captions
from mmrl_ray.experience.carriers import CaptionState
from mmrl_ray.learner.checkpoints import LearnerState, save_checkpoint
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.policy.heads import LearningHeads, save_value_heads
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_parameters, add_adapter, save_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.run_dir import STATISTICS, RunDir
from mmrl_ray.training import warm_start as warm_start_module
from mmrl_ray.training.warm_start import warm_start
from tests.support.tiny_models import build_family
from tests.unit.cli.program import mmrl


def evaluate(target: str, *, out: Path | None = None, as_json: bool = False, **options: Any) -> Evaluation:
    """As `mmrl evaluate` does."""
    found = evaluate_target(target, **options)
    present(found, out=out, as_json=as_json)
    return found.evaluation


SMALL = {"patch_size": 32, "hidden": 32, "layers": 2, "vision_hidden": 32, "vision_layers": 1}


@dataclass
class World:
    root: Path
    cfg: Config
    run: RunDir
    base: str
    adapted: Policy


def trained_policy(cfg: Config, base: str) -> Policy:
    """The base with an adapter that changes what it says."""
    policy = load_policy(ModelSection(path=base, dtype="float32"), device="cpu")
    add_adapter(policy, cfg.model.lora, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.model):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start_module, "TINY_LLAVA", SMALL)
        cfg = Config.model_validate(
            {
                "run": {"name": "run", "root": str(root / "runs")},
                "model": {"path": "builtin:tiny-llava", "dtype": "float32"},
                "data": {
                    "train": str(root / "train"),
                    "eval": str(root / "eval"),
                    "prompt": "describe it",
                    "scenes": {"train": 12, "eval": 6, "image_size": 32},
                },
                "sft": {
                    "steps": 30,
                    "batch_size": 8,
                    "lr": 3e-3,
                    "warmup_steps": 0,
                    "train_vision": True,
                    "cache": str(root / "cache"),
                },
                "rollout": {"max_new_tokens": 9},
                "learner": {"steps": 1},
            }
        )
        base = warm_start(cfg)
        run = RunDir.create(root / "runs", "run")
        run.write_text("config.yaml", dump_config(cfg))
        run.write_text(STATISTICS, CorpusStatistics.from_references(iter_references(cfg.data.train)).to_json())
        adapted = trained_policy(cfg, base)
        save_adapter(adapted.model, run.local_path("adapter"))
        yield World(root, cfg, run, base, adapted)
    torch.set_num_threads(threads)


def hf_greedy(policy: Policy, image: Path | bytes, prompt: str, tokens: int) -> str:
    """What plain transformers says, from the picture to the text."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = policy.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    picture = Image.open(image) if isinstance(image, Path) else image
    inputs = policy.processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)
    banned = [[token] for token in policy.image_token_ids]
    out = policy.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, bad_words_ids=banned)
    return policy.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture
def pictures(world: World, tmp_path: Path) -> list[Path]:
    paths = []
    for sample in read_split(world.cfg.data.eval or "", prompt="", limit=2):
        paths.append(tmp_path / f"{sample.id}.png")
        paths[-1].write_bytes(sample.images[0])
    return paths


def test_a_run_captions_as_transformers_does_with_base_and_adapter(world: World, pictures: list[Path]) -> None:
    expected = [hf_greedy(world.adapted, path, "describe it", 9) for path in pictures]
    assert caption_images(world.run.location, pictures) == [[text] for text in expected]
    plain = load_policy(ModelSection(path=world.base, dtype="float32"), device="cpu")
    bare = hf_greedy(plain, pictures[0], "describe it", 9)
    assert caption_images(world.base, pictures[:1], prompt="describe it", max_new_tokens=9) == [[bare]]
    assert bare != expected[0]


def test_captions_obey_the_checkpoints_generation_config_and_evaluations_measure_the_policy(
    world: World, pictures: list[Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(world.base, tmp_path / "model"))
    policy = load_policy(ModelSection(path=world.base, dtype="float32"), device="cpu")
    plain = hf_greedy(policy, pictures[0], "it", 9)
    file = model / "generation_config.json"
    suppressed = policy.tokenizer.convert_tokens_to_ids(plain.split())[:2]
    file.write_text(json.dumps({**json.loads(file.read_text()), "suppress_tokens": suppressed}))
    ruled = hf_greedy(load_policy(ModelSection(path=str(model), dtype="float32"), device="cpu"), pictures[0], "it", 9)
    assert ruled != plain
    assert caption_images(str(model), pictures[:1], prompt="it", max_new_tokens=9) == [[ruled]]
    assert world.cfg.data.eval is not None
    found = evaluate(str(model), data=world.cfg.data.eval, prompt="it", limit=1, max_new_tokens=9)
    assert found.captions[0].caption == plain


def test_the_command_prints_one_line_an_image(world: World, pictures: list[Path]) -> None:
    lines = mmrl("caption", "--run", world.run.location, *pictures).stdout.splitlines()
    assert [line.split(": ", 1)[0] for line in lines] == [str(path) for path in pictures]
    alone = mmrl("caption", "--model", world.base, "--prompt", "describe it", pictures[0]).stdout
    assert str(pictures[0]) not in alone


def test_captions_are_drawn_as_many_as_asked_for_and_nothing_else_is_shown(world: World, pictures: list[Path]) -> None:
    greedy = caption_images(world.run.location, pictures)
    shown = mmrl("caption", "--run", world.run.location, "-n", 3, "--temperature", 0, *pictures)
    assert shown.stderr == ""  # neither bars nor warnings of libraries
    lines = [f"{path}: {text}" for path, (text,) in zip(pictures, greedy, strict=True) for _ in range(3)]
    assert shown.stdout.splitlines() == lines
    (drawn,) = caption_images(world.run.location, pictures[:1], n=40, temperature=2.0)
    assert len(drawn) == 40
    assert len(set(drawn)) > 20
    assert len(mmrl("caption", "--run", world.run.location, "-n", 2, pictures[0]).stdout.splitlines()) == 2


def test_files_that_are_no_images_are_named(world: World, pictures: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "rows.json"
    broken.write_text('{"image": 1}')
    with pytest.raises(ImageError, match=r"rows\.json: .*instead of an image"):
        caption_images(world.run.location, [pictures[0], broken])
    with pytest.raises(DataError, match=r"gone\.png cannot be read: No such file"):
        caption_images("no/such/model", [tmp_path / "gone.png"])
    with pytest.raises(ConfigError, match="no such run folder"):
        caption_images(str(tmp_path / "missing"), pictures)


def test_batches_do_not_change_captions(world: World) -> None:
    samples = read_split(world.cfg.data.eval or "", prompt="describe it")
    whole = caption_samples(world.adapted, samples, max_new_tokens=9)
    seen: list[tuple[int, int]] = []
    cut = caption_samples(
        world.adapted, samples, max_new_tokens=9, batch_size=4, progress=lambda done, of, _: seen.append((done, of))
    )
    assert cut == whole
    assert seen == [(4, 6), (6, 6)]


def test_evaluating_a_run_uses_its_own_statistics(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    found = evaluate(world.run.location, out=out)
    samples = read_split(world.cfg.data.eval or "", prompt="describe it")
    statistics = CorpusStatistics.from_references(iter_references(world.cfg.data.train))
    captions = caption_samples(world.adapted, samples, max_new_tokens=9)
    expected = score_captions(samples, captions, build_reward(world.cfg.reward, statistics), statistics)
    assert found == expected
    document = json.loads(out.read_text())
    assert document["measures"] == expected.to_json()["measures"]
    assert [c["caption"] for c in document["captions"]] == captions
    assert list(document["correlations"]) == ["image", "text", "combined"]
    assert document["correlations"]["text"] == {"rho": None, "p_value": None}, "one prompt for all"
    states: list[CaptionState] = []
    caption_samples(world.adapted, samples, max_new_tokens=9, states=states)
    actions = torch.stack([state.action for state in states])
    image = torch.stack([state.modalities["image"] for state in states])
    if actions.std(dim=0).any():
        assert document["correlations"]["image"]["rho"] == pytest.approx(abs(modality_correlation(actions, image)))
    printed = capsys.readouterr().out
    assert "of the run's training references" in printed
    assert f"{expected.measures['cider_d'].mean:.4f}" in printed
    assert "one side does not vary" in printed
    evaluate(world.run.location, limit=2, out=out, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())


def test_rows_of_one_id_and_broken_ones_and_those_trained_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [replace(each, id="x") for each in read_split(world.cfg.data.eval or "", prompt="describe it")]
    (known,) = read_split(world.cfg.data.train, prompt="", limit=1)
    write_parquet(tmp_path / "d", [replace(rows[0], id="torn", images=(b"?",)), *rows, known])
    out = tmp_path / "e.json"
    found = evaluate(world.run.location, data=str(tmp_path / "d"), out=out)
    assert [each.sample_id for each in found.captions] == ["x"] * 6 + [known.id]
    assert len({each.place for each in found.captions}) == 7
    document = json.loads(out.read_text())
    plain = document["correlations"]["image"]
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "captions and their modalities: 7 samples" in printed
    evaluate(world.run.location, data=str(tmp_path / "d"), limit=1, out=out)
    one = json.loads(out.read_text())
    assert plain["rho"] is not None or len({each.caption for each in found.captions}) == 1
    assert one["measures"]["reward"]["low"] is None
    assert "n/a" in capsys.readouterr().out
    (left_out,) = (note for note in document["notes"] if "left out" in note)
    assert left_out.startswith("1 samples left out (torn): part-00000-of-00001.parquet row 0: ")
    assert any(f"1 of 7 held-out pictures (14%) are trained on: {known.id};" in note for note in document["notes"])
    assert "are trained on" in printed
    evaluate(world.run.location, data=world.cfg.data.train, limit=2, out=out)
    assert any("is what the run was trained on" in note for note in json.loads(out.read_text())["notes"])


def test_explaining_a_caption(
    world: World, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = caption_images(world.run.location, pictures[:1])[0][0].strip()
    out = tmp_path / "heat.png"
    explain(world.run.location, pictures[0], out=out)
    printed = capsys.readouterr().out
    assert f"caption: {said}" in printed
    assert f"heat map: {out}" in printed
    assert Image.open(out).format == "PNG"
    other = explain_image(world.run.location, pictures[0], caption="a red circle .", prompt="describe it")
    assert other.caption == "a red circle ."
    assert sum(other.importance.share.values()) == pytest.approx(1.0)
    assert f"image: share {other.importance.share['image']:.3f}" not in printed
    with pytest.raises(DataError, match="special token"):
        explain_image(world.run.location, pictures[0], caption="a <image>")
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        explain_image("no/such/model", tmp_path / "gone.png")
    with pytest.raises(RunError, match="choose another --out"):
        explain(world.run.location, pictures[0], out=Path("/proc/none.png"))


def test_a_picture_in_tiles_has_shares_and_no_heat_map(
    tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    explain(str(build_family("smolvlm", tmp_path / "model")), pictures[0], caption="a red circle")
    printed = capsys.readouterr().out
    assert "image: share 0." in printed
    assert "no heat map: the places of this model's image tokens are not known: the processor cuts" in printed


def test_evaluating_a_model_says_whose_statistics_it_uses(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = evaluate(world.base, data=world.cfg.data.eval, limit=3, out=tmp_path)
    assert len(evaluation.captions) == 3
    document = json.loads((tmp_path / f"evaluation-{Path(world.base).name}.json").read_text())
    assert document["samples"] == 3
    assert any("not comparable" in note for note in document["notes"])
    assert "not comparable" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(ConfigError, match="--data"):
        evaluate(world.base)
    with pytest.raises(RunError, match="cannot be written"):
        evaluate(world.base, data=world.cfg.data.eval, limit=1, out=Path("/proc/none.json"))


def test_an_unfinished_run_stands_for_its_newest_checkpoint(world: World) -> None:
    run = RunDir.create(world.root / "runs", "half")
    run.write_text("config.yaml", dump_config(world.cfg))
    with pytest.raises(RunError, match="no adapter and no checkpoint"):
        open_target(run.location)
    state = LearnerState({"rng/torch": torch.zeros(1)}, {})
    save_checkpoint(run, 3, policy=world.adapted, learner=state, controller={}, keep=1)
    opened = open_target(run.location)
    assert opened.notes == ("the run is not finished: this is its checkpoint of step 3",)
    assert opened.statistics is None
    assert not any(p.requires_grad for p in opened.policy.model.parameters())


@pytest.fixture
def valued(world: World, tmp_path: Path) -> RunDir:
    """The run of the world, with value heads beside its adapter; its own β is 2."""
    run = RunDir.create(tmp_path, "valued")
    run.write_text("config.yaml", world.run.read_text("config.yaml"))
    run.write_text(STATISTICS, world.run.read_text(STATISTICS))
    save_adapter(world.adapted.model, run.local_path("adapter"))
    heads = LearningHeads(world.adapted.hidden_size, world.adapted.vocab_size, 8, beta=2.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_value_heads(heads, run.local_path("adapter"), whole=False)
    return run


def test_a_run_with_values_is_decoded_by_them_and_beta_0_is_the_plain_policy(
    world: World, valued: RunDir, pictures: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plain = caption_images(world.run.location, pictures)
    assert caption_images(valued.location, pictures, beta=0.0) == plain
    by_values = caption_images(valued.location, pictures)
    assert by_values == caption_images(valued.location, pictures, beta=2.0)
    assert by_values != plain
    file = tmp_path / "e.json"
    found = {}
    for beta in (None, 0.0):
        evaluate(valued.location, beta=beta, out=file)
        told = json.loads(file.read_text())
        assert f"decoded with log π + {2 if beta is None else 0}·(Q − V)" in told["notes"]
        found[beta] = [each["caption"] for each in told["captions"]]
    assert found[None] != found[0.0]
    capsys.readouterr()
    with pytest.raises(ConfigError, match="--beta 1 needs value heads, and run is no run of algorithm: ilql"):
        evaluate(world.run.location, beta=1.0)
    assert caption_images(world.run.location, pictures, beta=0.0) == plain
    explained = explain_image(valued.location, pictures[0])
    assert explained.caption == by_values[0][0].strip()


def test_python_captions_paths_bytes_and_pictures_alike(
    world: World, pictures: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = [text for (text,) in caption_images(world.run.location, pictures)]
    capfd.readouterr()
    opened = Image.open(pictures[1])
    opened.load()
    run = world.run.location
    assert mmrl_ray.caption(run, [pictures[0].read_bytes(), opened, str(pictures[0])]) == [*expected, expected[0]]
    assert mmrl_ray.caption(Path(run), pictures[0]) == expected[0]
    assert mmrl_ray.caption(run, opened, n=2, temperature=0) == [expected[1]] * 2
    assert mmrl_ray.caption(run, pictures, n=1) == [[text] for text in expected]
    assert mmrl_ray.caption(run, []) == []
    assert capfd.readouterr() == ("", "")
    turned = opened.transpose(Image.Transpose.ROTATE_90)  # as cameras do, with a mark which way is up
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert image_bytes(Image.open(tmp_path / "turned.png")) == encode_png(opened)
    for wrong, error, told in (
        (b"{}", ImageError, "image 0 of those given: "),
        (3, DataError, "image 0 of those given is a int: give a path"),
    ):
        with pytest.raises(error, match=told):
            mmrl_ray.caption(run, [wrong])  # type: ignore[list-item]


def test_python_evaluates_in_silence_and_shows_when_asked(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    found = mmrl_ray.evaluate(world.run.location)
    assert capsys.readouterr().out == ""
    expected = evaluate(world.run.location)
    printed = capsys.readouterr().out
    assert found.evaluation == expected
    interval = expected.measures["cider_d"]
    assert found.table.loc["cider_d"].tolist() == [interval.mean, interval.low, interval.high]
    rows = found.captions()
    assert rows["caption"].tolist() == [each.caption for each in expected.captions]
    samples = read_split(world.cfg.data.eval or "", prompt="")
    assert [each.data for each in rows["picture"]] == [sample.images[0] for sample in samples]
    assert "of the run&#x27;s training references" in found._repr_html_()
    mmrl_ray.evaluate(world.run.location, show=True)
    assert capsys.readouterr().out == printed
    with pytest.raises(ConfigError, match="no such run folder"):
        mmrl_ray.evaluate("runs/nowhere")
