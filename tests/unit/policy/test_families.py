"""The start-up comparison on a tiny model of every family: sampler, each learner path and transformers' own `generate`.

The table of docs/reference/families.md is held against what is found here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mmrl_ray.errors import ModelError
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import compare
from mmrl_ray.policy.prompts import encode_prompts
from tests.support.tiny_models import ALL_FAMILIES, make_samples

Load = Callable[..., Policy]
GAP = 1e-5
"""Nats; float32 rounding makes some 1e-6 of these models."""

RECURRENT = ("llava_lfm2", "minicpmv4_6", "minicpmv4_7", "qwen3_5", "qwen3_5_moe")
"""Their states cannot be handed to several completions: naive."""
NOT_PACKED = (*RECURRENT, "llava_llama4", "paligemma2")
"""Attention in chunks, and a model that takes one mask for layers that see different parts of its prompt."""
TOWER_EVERY_TIME = ("granite4_vision", "ovis2")
"""Their forwards take more of the tower than features of tokens."""
REFUSED = {"mistral3": "Torchvision", "ministral3": "Torchvision", "mllama": "cross-attention"}


def in_docs() -> dict[str, str]:
    """Path, or "refused", by family: of the table whose first column is the family."""
    text = (Path(__file__).parents[3] / "docs" / "reference" / "families.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|\n]*\| (shared prefix|naive|refused)[^|\n]*\|", text, re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_sampler_learner_and_transformers_agree(family: str, load: Load) -> None:
    if family in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[family]):
            load(family)
        assert in_docs()[family] == "refused"
        return
    policy = load(family)
    found = compare(policy, encode_prompts(policy, make_samples()[:2]), others=("packed",))
    assert found.troubles == ()
    assert found.largest_gap <= GAP
    assert found.path == ("naive" if family in RECURRENT else "shared_prefix")
    assert found.inject_vision == (family not in TOWER_EVERY_TIME)
    packed = next(gap for gap in found.gaps if gap.path == "packed")
    assert (packed.trouble is not None) == (family in NOT_PACKED)
    if packed.trouble is None:
        assert max(packed.to_model, packed.causality) <= GAP
    assert in_docs()[family] == found.path.replace("_", " ")
