"""`examples/photographs`: its reward against sums written out in NumPy, its connector against a singular value
decomposition."""

from __future__ import annotations

import importlib
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from mmrl_ray.data.samples import Sample
from mmrl_ray.data.writing import write_parquet
from tests.support.fake_services import png

FOLDER = Path(__file__).parents[2] / "examples" / "photographs"
PICTURES = [
    ("a brown dog runs on grass", "a dog on grass", "the dog runs"),
    ("a white dog runs on grass", "a dog in a field of grass"),
    ("a man climbs a rock", "a climber on a rock"),
    ("a brown dog with a red ball in its mouth", "a dog holds a red ball"),
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_a_caption_earns_by_how_much_more_it_says_of_its_own_picture_than_of_others(
    example: Any, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "data", [Sample(str(i), (png(),), "", tuple(t)) for i, t in enumerate(PICTURES)])
    captions = ["a brown dog runs on grass", "a dog holds a red ball", "a man", "zebras", "a dog on a red rock"]
    states = [*PICTURES[:1], PICTURES[3], PICTURES[2], PICTURES[0], ("a dog on a red rock", "a rock")]

    def terms(text: str) -> list[str]:
        words = re.findall(r"[a-z]+", text)
        return words + [f"{a} {b}" for a, b in pairwise(words)]

    documents = [terms(" ".join(text)) for text in PICTURES]
    known = sorted({t for d in documents for t in d if sum(t in other for other in documents) > 1})

    def vector(found: list[str]) -> np.ndarray:
        weights = [
            (1 + np.log(found.count(t))) * np.log(len(documents) / sum(t in d for d in documents))
            if t in found
            else 0.0
            for t in known
        ]
        made = np.array(weights)
        return made / (np.linalg.norm(made) or 1.0)

    expected = []
    for caption, state in zip(captions, states, strict=True):
        said = vector(terms(caption))
        others = [said @ vector(d) for d, text in zip(documents, PICTURES, strict=True) if text != state]
        expected.append(said @ vector(terms(" ".join(state))) - np.mean(sorted(others)[-2:]))
    found = example("own_picture").told_apart(captions, states, data=str(tmp_path / "data"), nearest=2)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found[3] == 0, "nobody has said that"


def test_the_connector_is_the_principal_components(example: Any) -> None:
    captioner = example("captioner")
    width, hidden = 400, captioner.HIDDEN
    scales = torch.linspace(2, 0.1, width)
    features = torch.randn(2000, width, generator=torch.Generator().manual_seed(0)) * scales + 3
    connector = SimpleNamespace(linear_1=nn.Linear(width, hidden), linear_2=nn.Linear(hidden, hidden))
    model = SimpleNamespace(model=SimpleNamespace(multi_modal_projector=connector))
    kept = captioner.set_connector(model, features)
    with torch.no_grad():
        made = connector.linear_2(gelu(connector.linear_1(features))).double().numpy()
    centred = features.double().numpy() - features.double().numpy().mean(0)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    spread = values / np.sqrt(len(centred))
    assert kept == pytest.approx((spread[:hidden] ** 2).sum() / (spread**2).sum(), rel=0.02)
    # The last components are as good as any of their neighbourhood: the first tell whether it is them.
    for place in range(20):
        right = centred @ vectors[place] / np.sqrt(spread[place] * spread[0])
        assert abs(np.corrcoef(made[:, place], right)[0, 1]) > 0.99
        assert made[:, place].std() == pytest.approx(right.std(), rel=0.02)
