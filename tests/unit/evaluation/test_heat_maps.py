"""Where image tokens lie in the picture, found by changing the picture; and the heat map, looked at pixel by pixel."""

from __future__ import annotations

import functools
import io
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

from mmrl_ray.data.samples import Sample
from mmrl_ray.evaluation.explain import ImageGrid, heat_map_png, image_grid
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import vision_features
from tests.support.tiny_models import load_family

WIDTH, HEIGHT = 112, 128


@functools.cache
def family(name: str) -> Policy:
    with tempfile.TemporaryDirectory() as folder:
        return load_family(name, folder)


def sample(pixels: np.ndarray, *more: np.ndarray) -> Sample:
    files = []
    for each in (pixels, *more):
        buffer = io.BytesIO()
        Image.fromarray(each.astype(np.uint8)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return Sample("picture", tuple(files), "describe the image .")


def tokens_of(policy: Policy, pixels: np.ndarray) -> torch.Tensor:
    (features,) = vision_features(policy, encode_prompts(policy, [sample(pixels)]))
    return features.tokens


@pytest.mark.parametrize(
    ("name", "rows", "columns"), [("llava", 3, 3), ("qwen2_5_vl", 4, 3), ("qwen3_vl", 4, 4), ("internvl", 2, 2),
                                  ("gemma3", 2, 2)]
)  # fmt: skip
def test_a_change_in_a_cell_moves_the_token_of_that_cell_most(name: str, rows: int, columns: int) -> None:
    policy = family(name)
    rng = np.random.default_rng(0)
    plain = np.full((HEIGHT, WIDTH, 3), 120)
    given = sample(plain)
    grid = image_grid(policy, encode_prompts(policy, [given])[0], given.images)
    assert isinstance(grid, ImageGrid), grid
    assert (grid.rows, grid.columns) == (rows, columns)
    before = tokens_of(policy, plain)
    for row in range(rows):
        for column in range(columns):
            moved = torch.zeros(len(before))
            for _ in range(6):
                changed = plain.copy()
                top, bottom = row * HEIGHT // rows, (row + 1) * HEIGHT // rows
                left, right = column * WIDTH // columns, (column + 1) * WIDTH // columns
                changed[top:bottom, left:right] = 255 * (rng.random((bottom - top, right - left, 3)) > 0.5)
                moved += (tokens_of(policy, changed) - before).norm(dim=1)
            assert int(moved.argmax()) == row * columns + column, moved


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_view_is_the_picture_that_the_model_saw(name: str) -> None:
    policy = family(name)
    quarters = np.zeros((HEIGHT, WIDTH, 3))
    quarters[: HEIGHT // 2, : WIDTH // 2] = (250, 10, 10)
    quarters[HEIGHT // 2 :, WIDTH // 2 :] = (10, 10, 250)
    given = sample(quarters)
    grid = image_grid(policy, encode_prompts(policy, [given])[0], given.images)
    assert isinstance(grid, ImageGrid)
    seen = np.asarray(grid.view).astype(int)
    high, wide = seen.shape[:2]
    assert np.abs(seen[high // 8, wide // 8] - (250, 10, 10)).max() < 12
    assert np.abs(seen[-high // 8, -wide // 8] - (10, 10, 250)).max() < 12
    assert np.abs(seen[high // 8, -wide // 8]).max() < 12


def test_where_the_places_are_not_known_it_says_why() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3))
    tiles = family("smolvlm")
    given = sample(noise)
    said = image_grid(tiles, encode_prompts(tiles, [given])[0], given.images)
    assert isinstance(said, str)
    assert "tiles (pixels of shape [1, 5, 3, 32, 32], 20 image tokens)" in said
    policy = family("llava")
    two = sample(noise, noise)
    assert image_grid(policy, encode_prompts(policy, [two])[0], two.images) == "the prompt has 2 pictures"


def test_the_heat_lies_where_the_weights_are() -> None:
    view = Image.new("RGB", (60, 40), (128, 128, 128))
    weights = torch.zeros(6)
    weights[4] = 2.0  # second row, middle
    png = heat_map_png(ImageGrid(2, 3, view), weights, title="a $5 caption", facts=["image: share 0.5"])
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    none = heat_map_png(ImageGrid(2, 3, view), torch.zeros(6), title="a $5 caption", facts=["image: share 0.5"])
    without = np.asarray(Image.open(io.BytesIO(none)).convert("RGB")).astype(int)
    assert picture.shape == without.shape
    right = (
        picture[:, picture.shape[1] // 2 : -picture.shape[1] // 8]
        - without[:, picture.shape[1] // 2 : -picture.shape[1] // 8]
    )
    ys, xs = np.nonzero(np.abs(right).sum(axis=2) > 60)
    assert len(ys) > 100
    # Cells are 20 x 20 pixels of the picture: what differs is square.
    assert np.ptp(ys) == pytest.approx(np.ptp(xs), rel=0.15)
    with pytest.raises(ValueError, match=r"2 x 3 tokens have one weight each, got shape \[5\]"):
        heat_map_png(ImageGrid(2, 3, view), torch.zeros(5), title="")
