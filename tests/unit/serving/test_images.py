"""Data URIs and uploads: what is accepted comes out byte for byte, all else is an `ImageError` of one short line."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrl_ray.data import images as decoder
from mmrl_ray.data.images import DEFAULT_LIMITS, ImageLimits
from mmrl_ray.errors import ImageError
from mmrl_ray.serving.images import check_image, decode_data_uri, is_data_uri
from tests.unit.data.pictures import picture

PNG, JPEG = picture(7, "PNG"), picture(7, "JPEG")


def uri(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("mime", "kind"),
    [
        ("image/png", "PNG"),
        ("image/jpeg", "JPEG"),
        ("image/jpg", "JPEG"),
        ("image/webp", "WEBP"),
        ("image/gif", "GIF"),
        ("IMAGE/PNG", "PNG"),
        ("image/jpeg", "PNG"),
        ("", "JPEG"),
    ],
)
def test_gives_back_the_very_bytes(mime: str, kind: str) -> None:
    data = picture(300, kind)
    assert decode_data_uri(uri(data, mime)) == data
    assert decode_data_uri(uri(data, mime).replace("data:", "DATA:", 1)) == data
    assert check_image(data) is data


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not a data URI"),
        ("data:", "not a data URI"),
        ("data:image/png;base64", "not a data URI"),
        ("https://example.com/a.png", "not a data URI"),
        (f" {uri(PNG)}", "not a data URI"),
        (f"data:{'x' * 300};base64,AAAA", "not a data URI"),
        (uri(PNG).replace(";base64", ""), ";base64 must stand"),
        (uri(PNG).replace(";base64", ";base64;charset=utf-8"), ";base64 must stand"),
        (uri(PNG, "text/plain"), "of type 'text/plain'"),
        (uri(b""), "empty data"),
        (uri(b"<svg/>"), "SVG instead of an image"),
        (uri(PNG[:20]), "broken PNG"),
    ],
)
def test_refuses(text: str, told: str) -> None:
    with pytest.raises(ImageError, match=told) as raised:
        decode_data_uri(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-1],
        lambda text: text + "=",
        lambda text: text + "AAAA",
        lambda text: text[:40] + "*" + text[41:],
        lambda text: text[:40] + "é" + text[41:],
        lambda text: text[:40] + "%3D" + text[43:],
        lambda text: text[:40] + "\ud800" + text[41:],
        lambda text: "=" + text[1:],
    ],
)
def test_base64_is_strict(spoil: object) -> None:
    data = PNG + b"1" * ((1 - len(PNG)) % 3)  # one byte past a multiple of three: padded, so that "AAAA" is excess
    head, text = uri(data).split(",")
    assert text.endswith("==")
    assert decode_data_uri(f"{head},{text}") == data
    with pytest.raises(ImageError, match="no base64"):
        decode_data_uri(f"{head},{spoil(text)}")  # type: ignore[operator]


def test_either_alphabet_line_breaks_and_no_padding() -> None:
    data = PNG + bytes([0xFF, 0xEF, 0xBE] * 4) + b"1" * ((1 - len(PNG)) % 3)  # their base64 is full of / and +
    head, text = uri(data).split(",")
    assert {"+", "/"} & set(text)
    assert text.endswith("==")
    for written in (text.replace("+", "-").replace("/", "_"), text.rstrip("="), f" {text[:76]}\r\n{text[76:]}\n"):
        assert decode_data_uri(f"{head},{written}") == data


def test_size_is_checked_before_base64_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_data_uri(uri(PNG), ImageLimits(max_bytes=len(PNG))) == PNG
    with pytest.raises(ImageError, match=f"at most {len(PNG) - 1} are"):
        decode_data_uri(uri(PNG), ImageLimits(max_bytes=len(PNG) - 1))
    monkeypatch.setattr("binascii.a2b_base64", lambda *a, **k: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="at most 100 are"):
        decode_data_uri(uri(b"x" * 1000), ImageLimits(max_bytes=100))


def test_limits_reach_the_decoder() -> None:
    wide = picture(0, size=(20, 4))
    assert (DEFAULT_LIMITS.max_bytes, DEFAULT_LIMITS.max_pixels) == (decoder.MAX_BYTES, decoder.MAX_PIXELS)
    with pytest.raises(ImageError, match="at most 79 are"):
        check_image(wide, ImageLimits(max_pixels=79))
    with pytest.raises(ImageError, match="at most 19 a side"):
        decode_data_uri(uri(wide), ImageLimits(max_side=19))


@given(st.one_of(st.text(), st.text().map("data:".__add__), st.binary().map(uri)))
def test_whatever_comes_is_refused_in_kind(text: str) -> None:
    with pytest.raises(ImageError):
        decode_data_uri(text)


def test_what_is_a_data_uri() -> None:
    assert is_data_uri("data:,")
    assert is_data_uri("DaTa:image/png")
    assert not is_data_uri("https://data:")
    assert not is_data_uri("")
