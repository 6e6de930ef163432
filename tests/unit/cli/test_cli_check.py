"""`mmrl check`: what it tells of a model, and exit code 2 where sampler, learner and transformers do not agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmrl_ray.policy.generation.sampling import RowSampler
from tests.support.tiny_models import build_family, image_bytes
from tests.unit.cli.program import mmrl


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family("qwen3_vl", tmp_path_factory.mktemp("models") / "a [b]name[/x]")


@pytest.fixture
def broken_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that leaves out what the model does to its logits."""
    right = RowSampler.sample

    def scaled(self: RowSampler, logits: Any, *args: Any) -> Any:
        return right(self, 3.0 * logits, *args)

    monkeypatch.setattr(RowSampler, "sample", scaled)


def test_a_good_model_is_described_and_passes(qwen: Path, tmp_path: Path) -> None:
    picture = tmp_path / "photo.png"
    picture.write_bytes(image_bytes(96, 64))
    done = mmrl("check", qwen, "--image", picture, "--json", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["agree"] is True
    assert found["error"] is None
    assert (found["family"], found["architecture"]) == ("qwen3_vl", "Qwen3VLForConditionalGeneration")
    # Patches of 16, merged by two on either axis: 3 × 2 tokens.
    assert found["picture"]["size"] == "96x64"
    assert found["picture"]["image_tokens"] == 6
    assert (found["end_of_turn"], found["stops_at"]) == ("</s>", ["</s>"])
    assert found["path"] == "shared_prefix"
    assert set(found["paths"]) == {"naive", "shared_prefix", "packed"}
    for gaps in found["paths"].values():
        assert gaps["trouble"] is None
        assert max(gaps["to_model"], gaps["to_sampler"], gaps["causality"]) <= found["largest_gap"] + 1e-5 < 3e-5
    assert found["paths"]["shared_prefix"]["gradient"] < 1e-5
    assert found["lora"] == {
        "layers": 14,
        "names": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "left_out": {},
    }
    assert 0 < found["memory"]["weights"] < found["memory"]["learner"]


def language_parameters(model: Path) -> int:
    tensors = load_file(model / "model.safetensors")
    return sum(tensor.numel() for name, tensor in tensors.items() if "language_model" in name)


def test_the_table_says_names_as_they_are(qwen: Path) -> None:
    done = mmrl("check", qwen, "--set", r"model.lora.targets=.*language_model.*\.q_proj")
    assert done.exit_code == 0, done.output
    assert f"model      {qwen}\n" in done.stdout
    assert "sampler, learner and transformers agree" in done.stdout
    assert "on 2 layers: q_proj; leaves out Linear " in done.stdout
    # 2 layers' 16 × 32 of the language model's weights.
    share = 2 * 16 * 32 / language_parameters(qwen)
    assert f"Linear k_proj ({share:.1%})" in done.stdout


@pytest.mark.usefixtures("broken_sampler")
def test_a_sampler_of_its_own_is_an_error_with_every_figure(qwen: Path) -> None:
    done = mmrl("check", qwen, "--json")
    assert done.exit_code == 2
    found = json.loads(done.stdout)
    assert found["agree"] is False
    assert found["sampler"]["to_model"] > 0.1 > found["bound"]
    assert found["paths"]["naive"]["to_model"] < 1e-5
    (line,) = done.stderr.splitlines()
    assert line == f"error: {found['error']}"
    assert f"model '{qwen}' (qwen3_vl) does not pass the start-up comparison: the sampler differs from" in line


def test_what_is_refused_is_one_line_and_still_one_json_object(tmp_path: Path) -> None:
    done = mmrl("check", tmp_path / "gone", "--json")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: model folder '{tmp_path}/gone' does not exist")
    assert json.loads(done.stdout) == {
        "model": f"{tmp_path}/gone",
        "agree": False,
        "error": done.stderr.removeprefix("error: ").rstrip("\n"),
    }


def test_a_picture_that_is_not_there_and_a_wrong_setting(qwen: Path, tmp_path: Path) -> None:
    gone = tmp_path / "no.png"
    for arguments, said in (
        (["--image", gone], f"error: image {gone} cannot be read: No such file or directory\n"),
        (["--set", "model.lora.rank=4"], "error: --set model.lora.rank: unknown key (value 4)"),
    ):
        done = mmrl("check", qwen, *arguments)
        assert done.exit_code == 2
        assert done.stdout == ""
        assert done.stderr.startswith(said)


def test_a_config_names_the_model(config: Path) -> None:
    done = mmrl("check", config, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["model"], found["family"], found["agree"]) == ("builtin:tiny-llava", "llava", True)


def test_a_prompt_that_is_too_long_is_not_the_models_fault(qwen: Path) -> None:
    done = mmrl("check", qwen, "--prompt", "a " * 600)
    assert done.exit_code == 2
    assert "error: prompt of " in done.stderr
    assert "exceeds the model's context of" in done.stderr


def test_a_built_in_model_is_checked_with_its_run(qwen: Path) -> None:
    done = mmrl("check", "builtin:tiny-llava")
    assert done.exit_code == 2
    assert "check that run's YAML config" in done.stderr


def test_ends_without_a_name_are_told_by_number(qwen: Path, tmp_path: Path) -> None:
    """A vocabulary that was padded has more tokens than the tokenizer knows."""
    folder = shutil.copytree(qwen, tmp_path / "padded")
    config = json.loads((folder / "config.json").read_text())
    vocabulary = config["text_config"]["vocab_size"]
    config["text_config"]["vocab_size"] = vocabulary + 8
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [2, vocabulary + 1]}))
    done = mmrl("check", folder)
    assert done.exit_code == 0, done.output
    assert f"sampling stops at </s>, token {vocabulary + 1}\n" in done.stdout
