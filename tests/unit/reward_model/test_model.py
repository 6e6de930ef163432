"""The learned reward: its σ, its scores over batches and pictures, its folder, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.errors import DataError, ImageError, ModelError
from mmrl_ray.reward_model.fit import Alignment
from mmrl_ray.reward_model.fusion import FUSIONS
from mmrl_ray.reward_model.model import (
    SPEC,
    WEIGHTS,
    HeadOutputs,
    Prior,
    RewardModel,
    Vocabulary,
    load_reward_model,
    read_spec,
    save_reward_model,
)
from mmrl_ray.reward_model.vision_source import Pixels, PolicyVision, RewardModelSpec, source_of
from tests.support.tiny_models import build_family, image_bytes

WORDS = ("a", "red", "blue", "circle", "above", "square")
PICTURES = [(image_bytes(64, 64, seed=i),) for i in range(3)]
CAPTIONS = ["a red circle", "a blue circle above a red square", "a zebra"]
WORD_VECTORS = "members.0.text.words.weight"
CPU = torch.device("cpu")


def spec(**changes: Any) -> RewardModelSpec:
    fields: dict[str, Any] = {
        "fusion": "shared_attention",
        "image_size": 32,
        "width": 16,
        "layers": 1,
        "heads": 3,
        "ensemble": "heads",
        "prior": 0.0,
        "max_words": 8,
        "vocabulary": WORDS,
        "center": 0.5,
        "spread": 0.2,
        "sigma_trained": True,
    }
    return RewardModelSpec(**{**fields, **changes})


def model(**changes: Any) -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(spec(**changes)).eval()


def test_sigma_is_noise_plus_disagreement() -> None:
    """σ² = mean of σ_k² + variance of μ_k, in units of the ratings."""
    rng = np.random.default_rng(0)
    mean, log_variance = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    got = model().double().scores(HeadOutputs(torch.from_numpy(mean), torch.from_numpy(log_variance), None))
    np.testing.assert_allclose(got.mean.numpy(), 0.5 + 0.2 * mean.mean(axis=1), rtol=1e-12)
    spread = ((mean - mean.mean(axis=1, keepdims=True)) ** 2).sum(axis=1) / 3
    np.testing.assert_allclose(got.sigma.numpy() ** 2, 0.04 * (np.exp(log_variance).mean(axis=1) + spread), rtol=1e-12)


@pytest.mark.parametrize("ensemble", ["heads", "members"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_score_depends_on_its_own_picture_and_caption_alone(fusion: str, ensemble: str) -> None:
    scorer, source = model(fusion=fusion, ensemble=ensemble), Pixels(32, 1 << 20)
    order = [(0, 1), (2, 0), (0, 0), (1, 2), (0, 1)]
    together = scorer.score(source, [PICTURES[p] for p, _ in order], [CAPTIONS[c] for _, c in order])
    for i, (p, c) in enumerate(order):
        alone = scorer.score(source, [PICTURES[p]], [CAPTIONS[c]])
        torch.testing.assert_close(alone.mean[0], together.mean[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.sigma[0], together.sigma[i], rtol=1e-5, atol=1e-6)
    assert len({round(x, 5) for x in together.mean.tolist()}) == 4
    assert (together.sigma > 0).all()
    assert (together.weights is not None) == (fusion in ("attention", "weighted_sum"))
    assert scorer.score(source, [], []).mean.shape == (0,)


def test_members_share_nothing() -> None:
    """Each has first weights of its own, and what one says follows from its own weights alone."""
    whole, source = model(ensemble="members", fusion="attention"), Pixels(32, 1 << 20)
    inputs, of = source.inputs(PICTURES, CPU), torch.tensor([0, 1, 2])
    ids = whole.vocabulary.encode(CAPTIONS, 8)
    outputs = whole(inputs, of, ids)
    alone = [member(inputs, of, ids) for member in whole.members]
    for k, own in enumerate(alone):
        assert torch.equal(outputs.mean[:, k : k + 1], own.mean)
        assert torch.equal(outputs.log_variance[:, k : k + 1], own.log_variance)
    torch.testing.assert_close(outputs.weights, sum(own.weights for own in alone) / 3)
    for name, first in whole.members[0].state_dict().items():
        # Scales and biases start from constants.
        assert first.dim() == 1 or not torch.equal(first, whole.members[1].state_dict()[name]), name
    with torch.no_grad():
        for parameter in whole.members[2].parameters():
            parameter.add_(0.1)
    moved = whole(inputs, of, ids).mean != outputs.mean
    assert moved.any(dim=0).tolist() == [False, False, True]


def test_a_prior_is_added_to_the_mean() -> None:
    """By its scale, to the mean alone; a long caption's is no larger than a short one's; nothing of it trains."""
    scorer, source = model(ensemble="members", prior=2.0), Pixels(32, 1 << 20)
    inputs, of = source.inputs(PICTURES, CPU), torch.tensor([0, 1, 2])
    ids = scorer.vocabulary.encode(CAPTIONS, 8)
    with_prior, member = scorer(inputs, of, ids), scorer.members[0]
    added = torch.cat([each.prior(ids) for each in scorer.members], dim=1)
    alone = member.prior(scorer.vocabulary.encode(CAPTIONS[:1], 8))
    torch.testing.assert_close(alone, added[:1, :1])  # whatever the batch was padded to
    assert not any(parameter.requires_grad for parameter in member.prior.parameters())
    for each in scorer.members:
        each.prior.scale = 0.0
    without = scorer(inputs, of, ids)
    torch.testing.assert_close(with_prior.mean - without.mean, added)
    assert torch.equal(with_prior.log_variance, without.log_variance)
    many = torch.randint(2, len(scorer.vocabulary), (500, 8))
    torch.manual_seed(1)
    for length in (2, 8):
        sizes = [Prior(len(scorer.vocabulary), scorer.spec)(many[:, :length]).square().mean() for _ in range(40)]
        assert 1.0 < torch.stack(sizes).mean().sqrt() < 4.0


def test_one_member_is_one_head() -> None:
    one, other = (model(ensemble=name, heads=1).state_dict() for name in ("heads", "members"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_words_in_another_order_are_another_caption() -> None:
    got = model().score(Pixels(32, 1 << 20), [PICTURES[0]] * 2, ["red above blue", "blue above red"])
    assert abs(got.mean[0] - got.mean[1]) > 1e-5


def test_vocabulary() -> None:
    ids = Vocabulary(WORDS).encode(["A red, RED circle!", "zebra", "", "a a a a a a a a a"], 5)
    assert ids.tolist() == [[2, 3, 3, 5, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [2] * 5]


def test_equal_pictures_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmrl_ray.reward_model import vision_source

    decoded: list[bytes] = []
    original = vision_source.decode_image
    monkeypatch.setattr(vision_source, "decode_image", lambda data: decoded.append(data) or original(data))
    source = Pixels(32, 1 << 20)
    for _ in range(2):
        model().score(source, [PICTURES[0], PICTURES[1], PICTURES[0]], CAPTIONS)
    assert decoded == [PICTURES[0][0], PICTURES[1][0]]


def test_pictures_that_it_cannot_take() -> None:
    source = Pixels(32, 1 << 20)
    with pytest.raises(DataError, match="one picture a sample, got 2"):
        source.inputs([PICTURES[0] + PICTURES[1]], CPU)
    with pytest.raises(ImageError):
        source.inputs([(b"no picture",)], CPU)


def test_constant_sigma_without_training_it() -> None:
    plain = model(sigma_trained=False, heads=1)
    assert plain.score(Pixels(32, 1 << 20), PICTURES, CAPTIONS).sigma.tolist() == pytest.approx([0.2] * 3)
    assert not any("log_variances" in name for name in plain.state_dict())


@pytest.mark.parametrize("ensemble", ["heads", "members"])
def test_folder_goes_round(ensemble: str, tmp_path: Path) -> None:
    made, source = model(ensemble=ensemble, prior=2.0 if ensemble == "members" else 0.0), Pixels(32, 1 << 20)
    save_reward_model(made, tmp_path / "reward", {"held_out": {}})
    again = load_reward_model(tmp_path / "reward")
    assert again.spec == made.spec == read_spec(tmp_path / "reward")
    before, after = made.score(source, PICTURES, CAPTIONS), again.score(source, PICTURES, CAPTIONS)
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.sigma, after.sigma)
    assert sorted(p.name for p in (tmp_path / "reward").iterdir()) == [WEIGHTS, "report.json", SPEC]
    assert [p.name for p in tmp_path.iterdir()] == ["reward"]
    with pytest.raises(ModelError, match="exists already"):
        save_reward_model(made, tmp_path / "reward", {})


Damage = Callable[[Path], None]


def edited(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        found = json.loads((folder / SPEC).read_text())
        found.update(changes)
        (folder / SPEC).write_text(json.dumps({k: v for k, v in found.items() if v is not None or k == "vision"}))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return damage


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (shutil.rmtree, "no reward model at"),
        (lambda f: (f / SPEC).unlink(), f"is no reward model: it has no {SPEC}"),
        (lambda f: (f / SPEC).write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / WEIGHTS).unlink(), "cannot be read as safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x" * 100), "cannot be read as safetensors"),
        (edited(format=1), "is of format 1, this program knows format 2"),
        (edited(colour="red"), "colour: Extra inputs are not permitted"),
        (edited(fusion="sum"), "fusion: Input should be"),
        (edited(width=None), "width: Field required"),
        (edited(vision_key="abc"), "must be given together"),
        (edited(width=32), r"but reward_model.json asks for \[32"),
        (edited(heads=2), "has the unknown weight 'members.0.log_variances.2"),
        (edited(ensemble="members"), "lacks 'members.1.fusion"),
        (edited(ensemble="none"), "ensemble: Input should be"),
        (edited(heads=4), "lacks 'members.0.log_variances.3"),
        (weights(lambda w: w[WORD_VECTORS].fill_(float("nan"))), f"{WORD_VECTORS} holds NaN"),
        (weights(lambda w: w.update({WORD_VECTORS: w[WORD_VECTORS].half()})), "torch.float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_folders(damage: Damage, problem: str, tmp_path: Path) -> None:
    save_reward_model(model(), tmp_path / "reward", {})
    damage(tmp_path / "reward")
    with pytest.raises(ModelError, match=problem) as error:
        load_reward_model(tmp_path / "reward")
    assert "\n" not in str(error.value)


def test_features_of_a_policy(tmp_path: Path) -> None:
    """Frozen features through the vision cache; pictures of different token counts are padded."""
    section = ModelSection(path=str(build_family("qwen2_5_vl", tmp_path / "policy")), dtype="float32")
    source = PolicyVision.load(section, 1 << 24)
    features, mask = source.inputs([(image_bytes(64, 64),), (image_bytes(64, 128),)], CPU)
    assert mask.sum(dim=1)[0] < mask.sum(dim=1)[1] == mask.shape[1]
    assert (features[~mask] == 0).all()
    assert features.shape[-1] == source.feature_dim
    key = source.policy.revision_key
    scorer = model(vision=section, vision_key=key, feature_dim=source.feature_dim)
    pictures = [(image_bytes(64, 64),), (image_bytes(64, 128),)]
    got = scorer.score(source, pictures, CAPTIONS[:2])
    alone = scorer.score(source, pictures[:1], CAPTIONS[:1])
    torch.testing.assert_close(got.mean[:1], alone.mean, rtol=1e-4, atol=1e-5)
    save_reward_model(scorer, tmp_path / "reward", {})
    again = load_reward_model(tmp_path / "reward")
    torch.testing.assert_close(again.score(source_of(again.spec, 1 << 24), pictures, CAPTIONS[:2]).mean, got.mean)
    edited(vision_key="another")(tmp_path / "reward")
    with pytest.raises(ModelError, match="trained on the vision features of another"):
        source_of(load_reward_model(tmp_path / "reward").spec, 1 << 24)


def test_alignment_is_the_formula() -> None:
    """The mean over caption tokens of the largest cosine to a picture token, scaled; then both choices."""
    rng = np.random.default_rng(3)
    image, text = rng.normal(size=(3, 4, 5)), rng.normal(size=(5, 6, 5))
    image_mask, text_mask = rng.uniform(size=(3, 4)) < 0.6, rng.uniform(size=(5, 6)) < 0.6
    image_mask[:, 0] = text_mask[:, 0] = True
    torch.manual_seed(0)
    align = Alignment(5).double()
    to_image, to_text = (layer.weight.detach().numpy() for layer in (align.image, align.text))
    expected = np.zeros((5, 3))
    for caption in range(5):
        for picture in range(3):
            words = [to_text @ word for word in text[caption][text_mask[caption]]]
            patches = [to_image @ patch for patch in image[picture][image_mask[picture]]]
            cosines = [[w @ p / np.linalg.norm(w) / np.linalg.norm(p) for p in patches] for w in words]
            expected[caption, picture] = np.mean(np.max(cosines, axis=1)) * np.exp(2.0)
    inputs = [torch.from_numpy(x) for x in (image, image_mask, text, text_mask)]
    np.testing.assert_allclose(align.similarity(*inputs).detach().numpy(), expected, rtol=1e-6)
    of, liked = [2, 0, 2, 2, 1], [True, True, True, False, False]
    terms = []
    for caption in range(3):
        chances = np.exp(expected[caption]) / np.exp(expected[caption]).sum()
        own = np.exp(expected[:, of[caption]])
        rivals = sum(own[other] for other in range(5) if of[other] == of[caption] and not liked[other])
        terms.append(-np.log(chances[of[caption]]) - np.log(own[caption] / (own[caption] + rivals)))
    got = align(*inputs, torch.tensor(of), torch.tensor(liked))
    assert got.item() == pytest.approx(np.mean(terms), rel=1e-6)
