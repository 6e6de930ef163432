"""The one hardened image decoder: serving, rollouts and data all come through here.

    bytes ──cap──▶ magic bytes ──allow-list──▶ header ──pixel, side, shape, count caps──▶ decode ──▶ orientation ──▶ RGB

Nothing is allocated for pixels before the header passed its caps, and whatever is wrong with a picture leaves as an
`ImageError`. No global state of Pillow is read for the limits or changed. Pictures of strangers are decoded by the
same function in a process that can be ended, see `decoder_pool.py`.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

# Imported by name so that Pillow need not import every plugin it has (and every parser with it) to find these.
from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from mmrl_ray.data.image_structure import check_gif, check_jpeg, check_png, exif_is_light, without_heavy_exif
from mmrl_ray.errors import ImageError, one_line

ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF"]

MAX_BYTES = 20 * 1024 * 1024
"""Of an encoded picture."""
MAX_PIXELS = 50_000_000
"""Width × height: what a large phone camera makes (150 MB as RGB)."""
MAX_SIDE = 16_384
"""Pixels; also the most that WebP can hold."""
MAX_ASPECT = 200
"""Longer to shorter side: beyond it Qwen-VL's processor raises, and no processor keeps anything readable."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one picture may be."""

    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS
    max_side: int = MAX_SIDE


DEFAULT_LIMITS = ImageLimits()
EXTENSIONS: dict[ImageFormat, str] = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif"}
_ORIENTATION_TAG = 0x0112
_RAW_EXIF = "Raw profile type exif"
"""Text of a PNG that has EXIF in hexadecimal digits."""
_LONGEST_RAW_EXIF = 65_536
"""Characters; longer ones are ignored."""
_BAND_PIXELS = 2**20
"""Converted at a time, where that takes several copies: a whole large picture's would be gigabytes."""
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


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The picture as 8-bit RGB, upright, transparency over white; of an animation the first frame.

    Accepts PNG, JPEG, WebP and GIF. 16-bit channels are scaled to 8 (not clipped), CMYK and palettes are converted.
    Metadata that cannot be parsed is ignored; pixels that cannot be are an error, and so is a truncated file.

    Raises:
        ImageError: broken, too large (bytes, pixels, a side, or a strip more than `MAX_ASPECT` times longer than it
            is wide), or of a format that is not on the list.
    """
    kind, _, exif = _inspected(data, limits)
    try:
        with _opened(data, kind, exif) as image:
            _check_size(*image.size, limits)
            image.load()
            rgb = _to_rgb(_upright(image))
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # its own message is the address of a buffer
        raise ImageError(f"broken {kind} image: its header cannot be read") from error
    except MemoryError as error:
        raise ImageError(f"{kind} image that takes more memory than there is for it: make it smaller") from error
    except Exception as error:
        # The boundary: Pillow raises anything from struct.error to KeyError.
        raise ImageError(f"broken {kind} image: {one_line(error) or type(error).__name__}") from error
    rgb.info = {}
    return rgb


def inspect_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> int:
    """Pixels that the header announces, after everything that `decode_image` refuses before it decodes; microseconds.

    Raises:
        ImageError: too large, of a format that is not on the list, or without a header.
    """
    kind, size, _ = _inspected(data, limits)
    if size is None:
        raise ImageError(f"broken {kind} image: its header cannot be read")
    return size[0] * size[1]


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
    return EXTENSIONS[image_format(data)]


def encode_png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_hash(images: Sequence[bytes]) -> str:
    """Hex SHA-256 of one encoded picture (as `sha256sum` prints it), or of the digests of several, in order."""
    digests = [hashlib.sha256(image) for image in images]
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"image of {width}x{height} pixels is empty")
    if max(width, height) > limits.max_side:
        raise ImageError(
            f"image of {width}x{height} pixels: at most {limits.max_side} a side are accepted; make it smaller"
        )
    if width * height > limits.max_pixels:
        raise ImageError(
            f"image of {width}x{height} pixels: at most {limits.max_pixels:,} are accepted; make it smaller"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"image of {width}x{height} pixels: a side may be at most {MAX_ASPECT} times the other")


def _inspected(data: bytes, limits: ImageLimits) -> tuple[ImageFormat, tuple[int, int] | None, list[int]]:
    """Format, (width, height) and the places of a JPEG's EXIF; raises like `inspect_image`."""
    if len(data) > limits.max_bytes:
        raise ImageError(f"image of {len(data):,} bytes: at most {limits.max_bytes:,} are accepted; make it smaller")
    kind = image_format(data)
    # Pillow allocates a WebP's canvas while opening it, and warns of a large PNG or GIF: ask the header before.
    exif: list[int] = []
    if kind == "JPEG":
        size, exif = check_jpeg(data)
    else:
        size = _size_from_header(data, kind)
    if size is not None:
        _check_size(*size, limits)
    if kind == "PNG":
        check_png(data)
    elif kind == "GIF":
        check_gif(data)
    return kind, size, exif


def _opened(data: bytes, kind: ImageFormat, exif: list[int]) -> Image.Image:
    if kind == "JPEG":
        # Not by `Image.open`, which also unpacks the directory of further pictures that phones write into a JPEG.
        try:
            return JpegImagePlugin.JpegImageFile(io.BytesIO(without_heavy_exif(data, exif)))
        except SyntaxError as error:
            raise ImageError("broken JPEG image: its header cannot be read") from error
    return Image.open(io.BytesIO(data), formats=[kind])


def _size_from_header(data: bytes, kind: ImageFormat) -> tuple[int, int] | None:
    """(width, height) where they stand at a fixed place; None when they do not or the header is too short."""
    if kind == "PNG" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    if kind == "GIF" and len(data) >= 10:
        return struct.unpack("<HH", data[6:10])
    if kind == "WEBP" and len(data) >= 25:
        chunk = data[12:16]
        if chunk == b"VP8X" and len(data) >= 30:
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        if chunk == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if chunk == b"VP8 " and len(data) >= 30:
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
    return None


def _upright(image: Image.Image) -> Image.Image:
    """Turned the way its EXIF orientation says, where that can be read at a small price."""
    if not exif_is_light(image.info.get("exif", b"")) or len(image.info.get(_RAW_EXIF, "")) > _LONGEST_RAW_EXIF:
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        transpose = _TRANSPOSES.get(orientation)
    except Exception:  # noqa: BLE001 - metadata from outside; a photograph with broken EXIF is still a photograph
        return image
    return image if transpose is None else image.transpose(transpose)


def _to_rgb(image: Image.Image) -> Image.Image:
    deep = image.mode == "I" or image.mode.startswith("I;16")
    if not deep and not _is_transparent(image):
        return image.convert("RGB")
    boxes = list(_bands_of(image.size))
    if len(boxes) == 1:
        return _band_to_rgb(image)
    rgb = Image.new("RGB", image.size)
    for box in boxes:
        rgb.paste(_band_to_rgb(image.crop(box)), box[:2])
    return rgb


def _bands_of(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that cover a picture from top to bottom: left, upper, right, lower."""
    width, height = size
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _scale_16_bit(image)
    if _is_transparent(image):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture as 8-bit L or, when one grey value stands for "transparent", as LA."""
    values = np.asarray(image).astype(np.int32)
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


def bands(image: Image.Image) -> Iterator[bytes]:
    """The pixels of an RGB picture from top to bottom, some megabytes at a time."""
    return (image.crop(box).tobytes() for box in _bands_of(image.size))


class BandedImage(Image.Image):
    """An RGB picture whose pixels NumPy gets band by band: Pillow joins all of them in one go, which keeps every other
    thread of the interpreter waiting, 0.1 s for 49 megapixels. Made by `banded`."""

    def convert(self, mode: str | None = None, *args: Any, **options: Any) -> Image.Image:
        """Pillow's `convert`; to RGB it is itself, and no copy."""
        return self if mode == "RGB" else super().convert(mode, *args, **options)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What NumPy reads the pixels by."""
        pixels, end = np.empty(3 * self.width * self.height, np.uint8), 0
        for band in bands(self):
            pixels[end : end + len(band)] = np.frombuffer(band, np.uint8)
            end += len(band)
        return {"shape": (self.height, self.width, 3), "typestr": "|u1", "version": 3, "data": pixels.data}


def banded(size: tuple[int, int], pixels: memoryview) -> Image.Image:
    """A picture of these RGB pixels, which other threads do not wait for, either."""
    image = Image.new("RGB", size, None)  # not filled with black first
    for _, top, width, end in _bands_of(size):
        band = bytes(pixels[3 * width * top : 3 * width * end])
        image.paste(Image.frombytes("RGB", (width, end - top), band), (0, top))
    image.__class__ = BandedImage  # Pillow has no constructor for it
    return image
