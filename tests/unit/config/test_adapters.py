"""Quantised bases and kinds of adapters in a run's config: what goes together, and what is refused with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mmrl_ray.config.policy import QuantizationSection, TeacherSection
from mmrl_ray.config.schema import Config
from mmrl_ray.config.serving import ServeConfig

FOUR = {"kind": "bitsandbytes-4bit"}


def config(**sections: Any) -> dict[str, Any]:
    return {
        "run": {"name": "a"},
        "model": {"path": "m", **sections.pop("model", {})},
        "data": {"train": "t"},
        "learner": {"steps": 2, **sections.pop("learner", {})},
        **sections,
    }


PAIRS = {
    "algorithm": "dpo",
    "rollout": {"group_size": 2},
    "data": {"train": "t", "preferences": {"store": "sqlite:///p"}},
}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"model": {"quantization": FOUR}, "learner": {"sharding": "fsdp2", "workers": 2}},
            "learner.sharding=fsdp2 splits weights.*set learner.sharding: none",
        ),
        (
            {"model": {"quantization": FOUR}, "rollout": {"engine": {"kind": "vllm"}}},
            "another policy than that of model.quantization: write rollout.engine.kind: local, or rollout.engine."
            "quantization: bitsandbytes",
        ),
        (
            {"model": {"quantization": {"kind": "torchao-int8"}}, "rollout": {"engine": {"kind": "vllm"}}},
            "takes no base of model.quantization.kind=torchao-int8",
        ),
        ({"model": {"quantization": FOUR, "lora": {"dora": True}}}, "needs the norms of the base's weights"),
        (
            {"model": {"quantization": {"kind": "bitsandbytes-8bit", "quant_type": "nf4"}}},
            "quant_type=nf4 is of kind=bitsandbytes-4bit, and this is bitsandbytes-8bit",
        ),
        ({"model": {"lora": {"dropout": 0.1}}}, "on the same weights they would not be 1.*sft.mode: lora.*dpo, ilql"),
        ({"model": {"lora": {"dora": True}}, "learner": {"sharding": "fsdp2", "workers": 2}}, "no learner the whole"),
        ({"model": {"lora": {"dora": True}}, "learner": {"adapter_l2": 0.1}}, "trains magnitudes"),
        (
            {"model": {"lora": {"modules_to_save": ["head"]}}, "serving": {"live_policy": True}},
            "serving.live_policy.*serve the merged export",
        ),
        (
            {"model": {"lora": {"rank_pattern": {"q": 2}, "dora": True}}, "rollout": {"engine": {"kind": "vllm"}}},
            "no place for model.lora.dora and model.lora.rank_pattern",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(config(**sections))


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"quantization": FOUR}, "rollout": {"engine": {"kind": "vllm", "quantization": "bitsandbytes"}}},
        {"model": {"quantization": FOUR, "lora": {"rslora": True}}},
        {"model": {"lora": {"dropout": 0.1}}, "sft": {"mode": "lora", "steps": 20}},
        {"model": {"lora": {"dropout": 0.1}}, **PAIRS},
    ],
)
def test_what_goes_together_is_taken(sections: dict[str, Any]) -> None:
    Config.model_validate(config(**sections))


def test_a_server_and_a_teacher_have_their_own() -> None:
    with pytest.raises(ValidationError, match=r"serving\.policy\.engine\.kind=vllm would sample by the base as it is"):
        ServeConfig.model_validate(
            {"model": {"path": "m", "quantization": FOUR}, "serving": {"policy": {"engine": {"kind": "vllm"}}}}
        )
    teacher = TeacherSection(path="t", quantization=QuantizationSection(kind="torchao-int8"))
    assert teacher.model.quantization == teacher.quantization
    with pytest.raises(ValidationError, match=r"merged into the teacher's weights.*mmrl export --merged"):
        TeacherSection(path="t", adapter="a", quantization=QuantizationSection(kind="torchao-int8"))
