"""Two learners that read a base in parts: they hold together what `from_pretrained` gives, and each half of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from mmrl_ray.config import Config
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.sections import LoraSection, ModelSection
from mmrl_ray.errors import ConfigError, ModelError
from mmrl_ray.learner.job import LearnerJob
from mmrl_ray.learner.ranks import Ranks, learner_mesh, shard_layers, split_layer
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.learner.train_loop import _Learner
from mmrl_ray.policy import checkpoint
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_state, add_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.run_records.run_dir import RunDir
from tests.support.gloo import Group, processes
from tests.support.tiny_models import build_family
from tests.unit.learner.worlds import WORDS, gradient, make_groups, make_plan, payloads, weights

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with processes(2, tmp_path_factory.mktemp("group")) as made:
        yield made


def answers(found: Sequence[Any]) -> list[Any]:
    for answer in found:
        if isinstance(answer, Exception):
            raise answer
    return list(found)


def load_split(folder: Path, dtype: str = "float32", seen: Callable[[nn.Module], None] | None = None) -> Policy:
    mesh = learner_mesh(CPU)

    def split(layer: nn.Module) -> None:
        if seen is not None:
            seen(layer)
        split_layer(layer, mesh)

    return load_policy(ModelSection(path=str(folder), dtype=cast(Any, dtype)), device=CPU, split=split)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of them, gathered, under each of their names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in named}


def ties(model: nn.Module) -> list[tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(tuple(sorted(same)) for same in names.values() if len(same) > 1)


def compare(folder: Path, dtype: str) -> dict[str, Any]:
    """On each rank: what differs from transformers' own model, and what there is of the layers' weights here."""
    read_first: list[bool] = []
    policy = load_split(folder, dtype, lambda layer: read_first.append(not next(layer.parameters()).is_meta))
    split = policy.hf_model
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    mine, theirs = tensors(split), tensors(whole)
    differ = sorted(mine.keys() ^ theirs.keys())
    differ += [n for n, t in theirs.items() if mine[n].dtype != t.dtype or not torch.equal(mine[n], t)]
    parts = [p for p in split.parameters() if isinstance(p, DTensor)]
    add_adapter(policy, LoraSection(r=4), seed=7)
    adapted = adapter_state(policy.model)
    plain = load_policy(ModelSection(path=str(folder), dtype=cast(Any, dtype)), device=CPU)
    add_adapter(plain, LoraSection(r=4), seed=7)
    differ += [n for n, t in adapter_state(plain.model).items() if not torch.equal(adapted[n], t)]
    return {
        "differ": differ,
        "same": [type(split) is type(whole), ties(split) == ties(whole), split._tied_weights_keys],
        "tied": ties(whole),
        "read_first": read_first,
        "share": sum(p.to_local().nbytes for p in parts) / sum(p.numel() * p.itemsize for p in parts),
        "split": sum(p.numel() for p in parts),
        "layers": sum(p.numel() for n, p in whole.named_parameters() if ".layers." in n and "vis" not in n),
    }


def old_and_tied(folder: Path) -> Path:
    """A LLaVA in two files, its head tied, under the names of old, with buffers that were saved then, of odd sizes."""
    build_family("llava", folder)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.intermediate_size = 33
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    stored = load_file(file)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in stored
    assert not any("lm_head" in name for name in stored)
    stored["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    stored["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    file.unlink()
    names = sorted(stored)
    halves = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for name, inside in halves.items():
        save_file({n: stored[n] for n in inside}, folder / name, metadata={"format": "pt"})
    places = {n: name for name, inside in halves.items() for n in inside}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize(
    ("family", "dtype", "read_first"),
    [
        ("llava", "float32", False),
        ("qwen2_5_vl", "bfloat16", False),
        ("old_and_tied", "bfloat16", False),
        ("qwen3_5_moe", "bfloat16", True),  # its file has experts one by one, which are stacked
    ],
)
def test_the_parts_are_what_from_pretrained_gives(
    group: Group, family: str, dtype: str, read_first: bool, tmp_path: Path
) -> None:
    folder = old_and_tied(tmp_path) if family == "old_and_tied" else build_family(family, tmp_path)
    for found in answers(group.run(compare, folder, dtype)):
        assert found["differ"] == []
        assert found["same"][:2] == [True, True]
        assert bool(found["tied"]) == (family == "old_and_tied")
        assert found["read_first"] == [read_first] * 2
        assert found["split"] == found["layers"]
        assert found["share"] == pytest.approx(0.5, abs=0.02)


class CountedFile:
    """`safe_open`, with the bytes that are taken out of it."""

    taken = 0

    def __init__(self, file: Any, framework: str) -> None:
        self._file = safe_open(file, framework)

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_slice(self, name: str) -> Any:
        return CountedSlice(self._file.get_slice(name))


class CountedSlice:
    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.get_shape())

    def __getitem__(self, part: Any) -> torch.Tensor:
        found: torch.Tensor = self._tensor[part]
        CountedFile.taken += found.nbytes
        return found


def anonymous_bytes() -> int:
    """Of this process in memory, without what is mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def weigh(folder: Path) -> dict[str, int]:
    """On each rank: bytes that were read for its parts, and by how much the process grew; and for the whole model."""
    opened, checkpoint.safe_open = checkpoint.safe_open, cast(Any, CountedFile)
    CountedFile.taken = 0
    try:
        load_split(folder, "bfloat16")  # whatever is set up once is set up
        CountedFile.taken = 0
        before = anonymous_bytes()
        policy = load_split(folder, "bfloat16")
        grown = anonymous_bytes() - before
    finally:
        checkpoint.safe_open = opened
    layers = sum(p.numel() for p in policy.model.parameters() if isinstance(p, DTensor))
    rest = sum(p.numel() for p in policy.model.parameters() if not isinstance(p, DTensor))
    before = anonymous_bytes()
    whole = load_policy(ModelSection(path=str(folder), dtype="bfloat16"), device=CPU)
    return {
        "taken": CountedFile.taken,
        "grown": grown,
        "whole": anonymous_bytes() - before,
        "layers": layers,
        "rest": rest,
        "all": sum(p.numel() for p in whole.model.parameters()),
    }


def test_each_reads_and_keeps_its_part_alone(group: Group, tmp_path: Path) -> None:
    sizes = {"hidden": 512, "layers": 8, "heads": 4, "vision_hidden": 16, "vision_layers": 1, "vision_heads": 2}
    folder = build_tiny_llava(tmp_path / "big", vocabulary=WORDS, image_size=16, patch_size=8, **sizes)
    found = answers(group.run(weigh, folder))
    for rank in found:
        assert rank["layers"] > 25_000_000
        assert rank["layers"] + rank["rest"] == rank["all"]
        assert rank["taken"] == 4 * (rank["layers"] // 2 + rank["rest"]), "bytes of float32 in the file"
        assert rank["whole"] > 0.9 * 2 * rank["all"], "in bfloat16 the model is no longer the file's pages"
        assert rank["grown"] < 0.6 * rank["whole"]


def learn(folder: Path, *, split: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """One step of two passes: the gradient, the adapter behind it, and metrics."""
    section = ModelSection(path=str(folder), dtype="float32")
    groups = make_groups(load_policy(section, device=CPU), noise=0.2)
    policy = load_split(folder) if split else load_policy(section, device=CPU)
    add_adapter(policy, LoraSection(r=4, alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    shard_layers(policy, CPU, learner_mesh(CPU))
    cfg = LearnerSection(steps=4, groups_per_step=3, lr=1e-2, micro_batch_tokens=1, passes=2)
    learner = LearnerStep(policy, cfg, path="packed", ranks=Ranks(), in_lockstep=True)
    metrics = learner.run(make_plan(groups, cfg, world_size=Ranks().size), payloads)
    return gradient(policy), weights(policy), {n: v for n, v in metrics.items() if not n.startswith("seconds/")}


def test_a_step_behind_it_is_the_one_of_a_base_that_was_loaded_whole(group: Group, tiny: Path) -> None:
    parts = answers(group.run(partial(learn, split=True), tiny))
    whole = answers(group.run(partial(learn, split=False), tiny))
    for (gradient_here, weights_here, metrics), (gradient_there, weights_there, expected) in zip(
        parts, whole, strict=True
    ):
        assert bool(gradient_here.any())
        assert torch.equal(gradient_here, gradient_there)
        assert torch.equal(weights_here, weights_there)
        assert metrics == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert torch.equal(parts[0][1], parts[1][1])


def start_learner(folders: Sequence[Path], run: RunDir) -> None:
    """What Ray Train's worker makes, on a node whose folder of the model is its rank's of `folders`."""
    cfg = Config.model_validate(
        {
            "run": {"name": "r"},
            "model": {"path": str(folders[Ranks().rank]), "dtype": "float32"},
            "data": {"train": "unused"},
            "learner": {"steps": 1, "workers": 2, "sharding": "fsdp2"},
        }
    )
    before = torch.get_rng_state()
    try:
        _Learner(LearnerJob(cfg, run, cast(Any, None)), CPU)
    except ModelError:
        # On GPUs drawing a part is a collective, which a rank that misses nothing would not join.
        assert torch.equal(torch.get_rng_state(), before), "what is missing was drawn"
        raise


def break_file(folder: Path, damage: str) -> str:
    """What the error is to say."""
    second = folder / "model-2-of-2.safetensors"
    stored = load_file(second)
    layers = sorted(n for n in stored if ".layers.1." in n and n.endswith("proj.weight"))
    name = next(n for n in layers if "language_model" in n)
    own = name.removeprefix("language_model.model.")
    if damage == "a file is missing":
        second.unlink()
        return second.name
    if damage == "the index names a tensor that is not there":
        del stored[name]
    else:  # one row too few: the first rank's rows are all there
        stored[name] = stored[name][:-1].clone()
    save_file(stored, second, metadata={"format": "pt"})
    return own


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(
    "damage", ["a file is missing", "the index names a tensor that is not there", "a tensor has another shape"]
)
def test_what_one_learner_cannot_read_stops_all_of_them(
    group: Group, damage: str, everywhere: bool, tmp_path: Path
) -> None:
    good = old_and_tied(tmp_path / "good")
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    says = break_file(bad, damage)
    run = RunDir.create(tmp_path, "r")
    found = group.run(start_learner, [bad if everywhere else good, bad], run)
    for error in found:
        assert isinstance(error, ModelError)
        assert str(bad) in str(error)
        assert says in str(error)
    assert answers(group.run(start_learner, [good, good], run)) == [None, None]


def test_a_quantised_base_is_refused(group: Group, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    file = folder / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantised))
    for error in group.run(load_split, folder):
        assert isinstance(error, ConfigError)
        assert f"model '{folder}' is quantised" in str(error)
