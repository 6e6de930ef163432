"""The one hardened image decoder: serving, rollouts and data all come through here.

    bytes ──cap──▶ magic bytes ──allow-list──▶ header ──pixel, side, shape caps──▶ decode ──▶ orientation ──▶ RGB

Nothing is allocated for pixels before the header passed its caps, and whatever is wrong with a picture leaves as an
`ImageError`. No global state of Pillow is read for the limits or changed.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
from collections.abc import Sequence
from typing import Literal

import numpy as np

# Imported by name so that Pillow need not import every plugin it has (and every parser with it) to find these.
from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from mmrl_ray.errors import ImageError

ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF"]

MAX_BYTES = 20 * 1024 * 1024
"""Of an encoded picture."""
MAX_PIXELS = 50_000_000
"""Width × height: what a large phone camera makes (150 MB as RGB)."""
MAX_SIDE = 16_384
"""Pixels; also the most that WebP can hold."""
MAX_ASPECT = 200
"""Longer to shorter side: beyond it Qwen-VL's processor raises, and no processor keeps anything readable."""
MAX_SCANS = 40
"""Of a progressive JPEG; encoders write 6 to 20. Each takes as long as the picture is large and may cost 10 bytes: 500
of them in a file of 0.3 MB kept a processor busy for 38 s."""

_EXTENSIONS: dict[ImageFormat, str] = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif"}
_MAX_SEGMENTS = 2000
"""Of a JPEG up to its end: a file of `MAX_BYTES` needs 320 for metadata."""
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""Of a JPEG segment that has a length, or the end; inside of scans nothing looks like one."""
_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What a refused file most likely is, by its first bytes; only to tell the user.
_LOOKS_LIKE = (
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"SIMPLE  =", "FITS"),
    (b"BM", "BMP"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\1\0", "an icon file"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"PAR1", "Parquet"),
)


def decode_image(
    data: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
) -> Image.Image:
    """The picture as 8-bit RGB, upright, transparency over white; of an animation the first frame.

    Accepts PNG, JPEG, WebP and GIF. 16-bit channels are scaled to 8 (not clipped), CMYK and palettes are converted.
    Metadata that cannot be parsed is ignored; pixels that cannot be are an error, and so is a truncated file.

    Raises:
        ImageError: broken, too large (bytes, pixels, a side, or a strip more than `MAX_ASPECT` times longer than it
            is wide), or of a format that is not on the list.
    """
    if len(data) > max_bytes:
        raise ImageError(f"image of {len(data):,} bytes: at most {max_bytes:,} are accepted; make it smaller")
    kind = image_format(data)
    # Pillow allocates a WebP's canvas while opening it, and warns of a large PNG or GIF: ask the header before.
    size = _size_from_header(data, kind)
    if size is not None:
        _check_size(*size, max_pixels=max_pixels, max_side=max_side)
    if kind == "JPEG":
        _check_scans(data)
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            # A JPEG with further pictures in it (phones write those) opens as MPO; its first frame is the JPEG.
            if image.format not in (kind, "MPO"):
                raise ImageError(f"{kind} image opened as {image.format}: refused")
            _check_size(*image.size, max_pixels=max_pixels, max_side=max_side)
            image.load()
            upright = _upright(image)
            rgb = _to_rgb(upright)
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # its own message is the address of a buffer
        raise ImageError(f"broken {kind} image: its header cannot be read") from error
    except Exception as error:
        # The boundary: Pillow raises anything from struct.error to KeyError.
        raise ImageError(f"broken {kind} image: {_one_line(error)}") from error
    rgb.info = {}
    return rgb


def image_format(data: bytes) -> ImageFormat:
    """The format that the first bytes announce.

    Raises:
        ImageError: not one of the accepted formats; the message says what it looks like.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    raise ImageError(f"{_looks_like(data)} instead of an image: PNG, JPEG, WebP and GIF are accepted")


def image_extension(data: bytes) -> str:
    """File-name extension without the dot, by content; raises like `image_format`."""
    return _EXTENSIONS[image_format(data)]


def image_hash(images: Sequence[bytes]) -> str:
    """Hex SHA-256 of one encoded picture (as `sha256sum` prints it), or of the digests of several, in order."""
    digests = [hashlib.sha256(image) for image in images]
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _check_size(width: int, height: int, *, max_pixels: int, max_side: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"image of {width}x{height} pixels is empty")
    if max(width, height) > max_side:
        raise ImageError(f"image of {width}x{height} pixels: at most {max_side} a side are accepted; make it smaller")
    if width * height > max_pixels:
        raise ImageError(f"image of {width}x{height} pixels: at most {max_pixels:,} are accepted; make it smaller")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"image of {width}x{height} pixels: a side may be at most {MAX_ASPECT} times the other")


def _check_scans(data: bytes) -> None:
    """Goes from segment to segment as the decoder does, so that none is missed or taken from a file's attachments."""
    place, scans = 2, 0
    for _ in range(_MAX_SEGMENTS):
        marker = _MARKER.search(data, place)
        if marker is None or marker[0] == b"\xff\xd9":
            return
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise ImageError(f"JPEG image of more than {MAX_SCANS} scans: refused; save it again")
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    raise ImageError(f"JPEG image of more than {_MAX_SEGMENTS:,} segments: refused; save it again")


def _size_from_header(data: bytes, kind: ImageFormat) -> tuple[int, int] | None:
    """(width, height) where they stand at a fixed place; None when they do not or the header is too short."""
    if kind == "PNG" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    if kind == "GIF" and len(data) >= 10:
        return struct.unpack("<HH", data[6:10])
    if kind == "WEBP" and len(data) >= 30:
        chunk = data[12:16]
        if chunk == b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        if chunk == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if chunk == b"VP8 ":
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
    return None


def _upright(image: Image.Image) -> Image.Image:
    """Turned the way its EXIF orientation says."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        transpose = _TRANSPOSES.get(orientation)
    except Exception:  # noqa: BLE001 - metadata from outside; a photograph with broken EXIF is still a photograph
        return image
    return image if transpose is None else image.transpose(transpose)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _scale_16_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture as 8-bit L or, when one grey value stands for "transparent", as LA."""
    values = np.asarray(image).astype(np.int64)
    # Pillow's own conversion clips at 255, which turns nearly every 16-bit picture white.
    grey = np.clip((values + 128) // 257, 0, 255).astype(np.uint8)
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return Image.fromarray(grey)
    alpha = np.where(values == key, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _looks_like(data: bytes) -> str:
    if not data:
        return "empty data"
    for magic, name in _LOOKS_LIKE:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return "AVIF or HEIC, or a video,"
    head = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    lowered = head.lower()
    if b"<svg" in lowered and lowered.startswith(b"<"):
        return "SVG"
    if lowered.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    if lowered.startswith(b"<"):
        return "XML"
    if head[:1] in (b"{", b"["):
        return "JSON"
    # A cut inside a multi-byte character at the end of the sample is no sign of binary data.
    text = head[:256].decode("utf-8", errors="ignore")
    if text and len(text.encode()) >= len(head[:256]) - 3 and all(c.isprintable() or c.isspace() for c in text):
        return "text"
    return "unknown data"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
