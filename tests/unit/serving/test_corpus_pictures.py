"""The corpus against the decoder and the edges alone; `test_corpus.py` sends it to the gateway."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from mmrl_ray.data.image_structure import MAX_SCANS
from mmrl_ray.data.images import decode_image
from mmrl_ray.errors import ImageError
from mmrl_ray.serving.images import decode_data_uri
from tests.corpus import pictures, uris


@pytest.mark.parametrize("name", pictures.BAD)
def test_bad_pictures_are_image_errors(name: str) -> None:
    with pytest.raises(ImageError) as raised:
        decode_image(pictures.BAD[name]())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", pictures.ODD)
def test_odd_pictures_are_pictures(name: str) -> None:
    image = decode_image(pictures.ODD[name]())
    assert (image.mode, image.size) == ("RGB", pictures.SMALL)
    assert np.abs(np.asarray(image).astype(int) - [255, 0, 0]).max() <= 6


def test_scans_are_counted_to_the_last_one_allowed() -> None:
    """A grey progressive JPEG of Pillow's has 6 scans, and one more for each repetition."""
    most = MAX_SCANS - 6
    assert decode_image(pictures.many_scans(most, 32)).size == (32, 32)
    with pytest.raises(ImageError, match="more than 40 scans"):
        decode_image(pictures.many_scans(most + 1, 32))


@pytest.mark.parametrize("name", uris.BAD)
def test_bad_uris_are_image_errors(name: str) -> None:
    with pytest.raises(ImageError):
        decode_data_uri(uris.BAD[name]())


def test_the_good_uri_is_good() -> None:
    assert base64.b64encode(decode_data_uri(uris.GOOD)).decode() in uris.GOOD


@pytest.mark.parametrize("name", uris.ODD)
def test_data_uris_as_clients_write_them(name: str) -> None:
    uri, data = uris.ODD[name]
    assert decode_data_uri(uri) == data
