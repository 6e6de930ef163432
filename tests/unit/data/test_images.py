"""The decoder: what it accepts becomes the right RGB, what it refuses is an `ImageError` and nothing else."""

from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from mmrl_ray.data import images
from mmrl_ray.data.images import ImageLimits, decode_image, image_extension, image_format, image_hash
from mmrl_ray.errors import ImageError
from tests.unit.data.pictures import encode, picture, png, png_chunk

PLAIN = {kind: picture(200, kind, (9, 7)) for kind in ("PNG", "JPEG", "WEBP", "GIF")}


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = decode_image(data).getpixel((x, y))
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("kind", PLAIN)
def test_accepts_the_four_formats(kind: str) -> None:
    image = decode_image(PLAIN[kind])
    assert (image.mode, image.size, image.info) == ("RGB", (9, 7), {})
    assert np.allclose(np.asarray(image), [200, 0, 99], atol=4)
    assert image_format(PLAIN[kind]) == kind
    assert image_extension(PLAIN[kind]) == {"JPEG": "jpg"}.get(kind, kind.lower())


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b'{"a": 1}', "JSON"),
        (b"\xef\xbb\xbf [1, 2]", "JSON"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?>\n<!-- x --><svg/>", "SVG"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (encode(Image.new("RGB", (4, 4)), "TIFF"), "TIFF"),
        (encode(Image.new("RGB", (4, 4)), "BMP"), "BMP"),
        (b"SIMPLE  =                    T", "FITS"),
        (b"%PDF-1.7", "PDF"),
        (b"", "empty data"),
        ("schöner Text".encode(), "text"),
        (bytes(range(128, 256)), "unknown data"),
    ],
)
def test_refuses_other_formats_by_name(data: bytes, named: str) -> None:
    with pytest.raises(ImageError, match=f"^{named} instead of an image"):
        decode_image(data)


def test_caps_bytes_before_anything_else() -> None:
    with pytest.raises(ImageError, match=r"11 bytes: at most 10"):
        decode_image(b"\x89PNG\r\n\x1a\nabc", ImageLimits(max_bytes=10))


@pytest.mark.parametrize("kind", PLAIN)
def test_caps_pixels_and_sides(kind: str) -> None:
    with pytest.raises(ImageError, match=r"9x7 pixels: at most 62 are"):
        decode_image(PLAIN[kind], ImageLimits(max_pixels=62))
    with pytest.raises(ImageError, match=r"9x7 pixels: at most 8 a side"):
        decode_image(PLAIN[kind], ImageLimits(max_side=8))
    assert decode_image(PLAIN[kind], ImageLimits(max_pixels=63, max_side=9)).size == (9, 7)


def test_refuses_long_strips_and_empty_pictures() -> None:
    with pytest.raises(ImageError, match="at most 16384 a side"):
        decode_image(png(1, 100_000, 8, 0, b"\0\0" * 100_000))
    with pytest.raises(ImageError, match="at most 200 times the other"):
        decode_image(png(1, 201, 8, 0, b"\0\0" * 201))
    assert decode_image(png(1, 200, 8, 0, b"\0\0" * 200)).size == (1, 200)
    with pytest.raises(ImageError, match="empty"):
        decode_image(png(0, 5, 8, 0, b""))


def webp_header(chunk: bytes, rest: bytes) -> bytes:
    body = b"WEBP" + chunk + struct.pack("<I", len(rest)) + rest
    return b"RIFF" + struct.pack("<I", len(body)) + body + b"\0" * 64


@pytest.mark.parametrize(
    "data",
    [
        webp_header(b"VP8X", b"\0\0\0\0" + (16382).to_bytes(3, "little") * 2),
        webp_header(b"VP8L", b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little")),
        webp_header(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383)),
        png(16383, 16383, 8, 2, b"\0"),
        b"GIF89a" + struct.pack("<HH", 16383, 16383) + b"\0\0\0",
    ],
    ids=["webp-extended", "webp-lossless", "webp-lossy", "png", "gif"],
)
def test_a_bomb_is_refused_by_its_header(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow allocates a WebP's canvas in `open`, so the refusal must come before that."""

    def no_open(*args: object, **kwargs: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(images.Image, "open", no_open)
    with pytest.raises(ImageError, match="16383x16383 pixels: at most 50,000,000"):
        decode_image(data)


def test_a_jpeg_bomb_is_refused() -> None:
    data = bytearray(PLAIN["JPEG"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 16000, 16000)
    with pytest.raises(ImageError):
        decode_image(bytes(data))


def test_a_compressed_text_bomb_is_refused() -> None:
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 50_000_000))
    with pytest.raises(ImageError, match="broken PNG image: "):
        decode_image(png(1, 1, 8, 0, b"\0\0", text))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_applies_the_exif_orientation(kind: str, orientation: int) -> None:
    """The oracle is the EXIF table: where the stored picture's first row and column belong."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # a white mark at the top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],  # shown after a quarter turn clockwise
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    decoded = decode_image(encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **lossless))
    assert np.abs(np.asarray(decoded).astype(int) - upright).max() <= 12


def test_broken_exif_is_no_broken_picture() -> None:
    data = encode(Image.new("RGB", (8, 4), (200, 0, 0)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert decode_image(data).size == (8, 4)


def test_transparency_goes_over_white() -> None:
    half_red = png(2, 1, 8, 6, bytes([0, 255, 0, 0, 128, 0, 0, 0, 0]))
    assert pixel(half_red) == (255, 127, 127)
    assert pixel(half_red, x=1) == (255, 255, 255)
    grey_alpha = png(2, 1, 8, 4, bytes([0, 100, 255, 100, 0]))
    assert (pixel(grey_alpha), pixel(grey_alpha, x=1)) == ((100,) * 3, (255,) * 3)
    palette = png_chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255]))
    with_alpha = png(2, 1, 8, 3, bytes([0, 0, 1]), palette, png_chunk(b"tRNS", b"\xff\x00"))
    assert (pixel(with_alpha), pixel(with_alpha, x=1)) == ((255, 0, 0), (255, 255, 255))
    colour_key = png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]), png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert (pixel(colour_key), pixel(colour_key, x=1)) == ((255, 255, 255), (4, 5, 6))


@pytest.mark.parametrize("value", [0, 128, 129, 255, 256, 32768, 40000, 65535])
def test_scales_16_bit_channels(value: int) -> None:
    """Rounded to the nearest of 255 levels for grey; Pillow itself keeps the high byte of 16-bit colours."""
    sixteen = struct.pack(">H", value)
    assert pixel(png(1, 1, 16, 0, b"\0" + sixteen)) == (round(value / 257),) * 3
    assert pixel(png(1, 1, 16, 2, b"\0" + sixteen * 3)) == (value >> 8,) * 3


def test_16_bit_grey_with_a_transparent_value() -> None:
    data = png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 1000, 40000), png_chunk(b"tRNS", struct.pack(">H", 1000)))
    assert (pixel(data), pixel(data, x=1)) == ((255,) * 3, (156,) * 3)


def test_converts_cmyk_grey_and_bilevel() -> None:
    red = pixel(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.allclose(red, (255, 0, 0), atol=6)
    assert pixel(encode(Image.new("L", (2, 2), 77), "PNG")) == (77, 77, 77)
    assert pixel(encode(Image.new("1", (2, 2), 1), "PNG")) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixel(data) == (255, 0, 0)


def test_a_jpeg_with_further_pictures_is_its_first() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.allclose(pixel(data), (255, 0, 0), atol=4)


@pytest.mark.parametrize("kind", PLAIN)
def test_every_truncation_is_refused_or_whole(kind: str) -> None:
    """A cut may spare all pixels (it took a trailer); otherwise it is refused, never filled with grey."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    data = encode(noise, kind, **({"lossless": True} if kind == "WEBP" else {}))
    whole = np.asarray(decode_image(data))
    refused = 0
    for cut in range(len(data)):
        try:
            decoded = decode_image(data[:cut])
        except ImageError:
            refused += 1
        else:
            assert np.array_equal(np.asarray(decoded), whole)
    assert refused > 0.9 * len(data)


def decode_or_refuse(data: bytes) -> None:
    """An RGB picture or an `ImageError` of one line that is the same every time (it is kept in checkpoints)."""
    reasons = []
    for _ in range(2):
        try:
            decoded = decode_image(data)
        except ImageError as error:
            reasons.append(str(error))
        else:
            assert decoded.mode == "RGB"
    assert len(set(reasons)) <= 1
    assert not any("\n" in reason or " at 0x" in reason for reason in reasons)


@given(st.sampled_from(["", *PLAIN]), st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(kind: str, rest: bytes) -> None:
    head = PLAIN[kind][:12] if kind else b""
    decode_or_refuse(head + rest)


@given(st.sampled_from(sorted(PLAIN)), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8))
def test_flipped_bytes_never_raise_anything_else(kind: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(PLAIN[kind])
    for place, value in flips:
        data[place % len(data)] = value
    decode_or_refuse(bytes(data))


def test_pillows_global_state_is_left_alone() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    for data in (*PLAIN.values(), PLAIN["JPEG"][:100]):
        try:
            decode_image(data)
        except ImageError:
            continue
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_hash_of_one_is_its_sha256_and_of_several_depends_on_order() -> None:
    assert image_hash([b"a"]) == hashlib.sha256(b"a").hexdigest()
    pairs = [[b"a", b"b"], [b"b", b"a"], [b"ab", b""], [b"a"]]
    assert len({image_hash(pair) for pair in pairs}) == len(pairs)
