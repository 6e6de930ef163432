"""Encoded pictures: broken, enormous or of a wrong kind, and odd ones that are pictures nevertheless."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable

from PIL import Image

from tests.unit.data.pictures import encode, picture, png, png_chunk

Make = Callable[[], bytes]

SMALL = (24, 16)
"""Width and height of the odd ones, after they were turned upright."""


def _header_only(kind: str, width: int, height: int) -> bytes:
    """A file of a few bytes that announces a picture of any size."""
    if kind == "PNG":
        return png(width, height, 8, 2, b"\0" * 1000)
    if kind == "GIF":
        return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0," + struct.pack("<4H", 0, 0, width, height)
    if kind == "WEBP":
        body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0"
        body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + b"\0" * 32
        return b"RIFF" + struct.pack("<I", len(body)) + body
    data = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _text_bomb() -> bytes:
    """A small PNG with compressed text that unpacks to 80 MB."""
    packed = zlib.compress(b"a" * 80_000_000)
    return png(8, 8, 8, 2, b"\0" * 200, png_chunk(b"zTXt", b"Comment\0\0" + packed))


def many_scans(count: int, side: int, *, between: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes again and again: each one goes through the whole picture."""
    data = encode(Image.new("L", (side, side), 77), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + (between + scan) * count + b"\xff\xd9"


def _tiff() -> bytes:
    return encode(Image.new("RGB", (4, 4)), "TIFF")


def _fits() -> bytes:
    cards = (
        "SIMPLE  =                    T",
        "BITPIX  =                    8",
        "NAXIS   =                    0",
        "END",
    )
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode()


BAD: dict[str, Make] = {
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "truncated-png": lambda: picture(1, "PNG", (64, 64))[:70],
    "truncated-jpeg": lambda: picture(1, "JPEG", (64, 64))[:400],
    "truncated-webp": lambda: picture(1, "WEBP", (64, 64))[:40],
    "truncated-gif": lambda: picture(1, "GIF", (64, 64))[:30],
    "png-signature-alone": lambda: b"\x89PNG\r\n\x1a\n",
    "png-wrong-checksum": lambda: picture(1)[:40] + b"\xff" + picture(1)[41:],
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "svg-entities": lambda: b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a 'aaaa'>]><svg>&a;</svg>",
    "tiff": _tiff,
    "fits": _fits,
    "bmp": lambda: encode(Image.new("RGB", (4, 4)), "BMP"),
    "pdf": lambda: b"%PDF-1.7\n",
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "html": lambda: b"<!DOCTYPE html><html></html>",
    "zip": lambda: b"PK\3\4" + b"\0" * 100,
    "pickle": lambda: b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
    "1x100000": lambda: png(1, 100_000, 8, 0, b"\0\0" * 100_000),
    "100000x1": lambda: png(100_000, 1, 8, 0, b"\0" * 100_001),
    "strip": lambda: png(1, 201, 8, 0, b"\0\0" * 201),
    "empty-png": lambda: png(0, 5, 8, 0, b""),
    "30000x30000-png": lambda: _header_only("PNG", 30_000, 30_000),
    "16000x16000-png": lambda: png(16_000, 16_000, 1, 0, b"\0" * 2001 * 16_000),
    "30000x30000-gif": lambda: _header_only("GIF", 30_000, 30_000),
    "16384x16384-webp": lambda: _header_only("WEBP", 16_384, 16_384),
    "30000x30000-jpeg": lambda: _header_only("JPEG", 30_000, 30_000),
    "jpeg-of-20000-scans": lambda: many_scans(20_000, 4000),
    "jpeg-whose-scans-hide-behind-an-end": lambda: many_scans(500, 4000, between=b"\xff\xfe\0\4\xff\xd9"),
    "jpeg-of-100000-comments": lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 100_000 + _as("RGB", "JPEG")[2:],
    "png-text-bomb": _text_bomb,
}
"""Each is an `ImageError`."""


def _exif_turned() -> bytes:
    turned = Image.new("RGB", (SMALL[1], SMALL[0]), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(turned, "JPEG", exif=exif)


def _animated() -> bytes:
    frames = [Image.new("RGB", SMALL, (255, 0, 0)), *(Image.new("RGB", SMALL, (0, 0, n)) for n in range(1, 200))]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=1)


def _as(mode: str, kind: str) -> bytes:
    return encode(Image.new("RGB", SMALL, (255, 0, 0)).convert(mode), kind)


ODD: dict[str, Make] = {
    "animated-gif": _animated,
    "cmyk-jpeg": functools.partial(_as, "CMYK", "JPEG"),
    "palette-png": functools.partial(_as, "P", "PNG"),
    "rgba-png": functools.partial(_as, "RGBA", "PNG"),
    "rgba-webp": functools.partial(_as, "RGBA", "WEBP"),
    "16-bit-png": lambda: png(*SMALL, 16, 2, (b"\0" + b"\xff\xff\0\0\0\0" * SMALL[0]) * SMALL[1]),
    "exif-rotated-jpeg": _exif_turned,
    "progressive-jpeg": lambda: encode(Image.new("RGB", SMALL, (255, 0, 0)), "JPEG", progressive=True),
    "jpeg-with-a-film-behind-it": lambda: _as("RGB", "JPEG") + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\1" * 1000,
    "jpeg-with-marks-in-a-comment": lambda: b"\xff\xd8\xff\xfe\x0f\xa2" + b"\xff\xda" * 2000 + _as("RGB", "JPEG")[2:],
}
"""Each is a plain red picture of size `SMALL`."""


# -- files that cost a decoder much more than they weigh ---------------------------------------------------------------


def _scanlines(height: int, of: bytes) -> bytes:
    """Compressed rows of a large picture that never is in memory."""
    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(b"\0" + of) for _ in range(height)), packer.flush()])


def _large_png(side: int, bits: int, colour_type: int, *extra: bytes, interlaced: bool = False) -> bytes:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour_type, 0, 0, interlaced))
    # Interlaced rows are shorter, and twice as many: plain zeros fit both.
    rows = _scanlines(side * (2 if interlaced else 1), bytes(side * channels * bits // 8))
    body = png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body


def _animation(kind: str, frames: int) -> bytes:
    pictures = [Image.new("RGB", SMALL, (n % 256, n // 256, 9)) for n in range(frames)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encode(pictures[0], kind, save_all=True, append_images=pictures[1:], duration=10, **options)


def _behind_signature(chunks: bytes) -> bytes:
    """A small PNG with more chunks before its pixels."""
    whole = picture(1)
    return whole[:33] + chunks + whole[33:]


def exif_bomb(entries: int, size: int) -> bytes:
    """EXIF whose every entry is the same `size` bytes."""
    directory = b"".join(struct.pack("<HHII", 0x1000 + n, 7, size, 8) for n in range(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", entries) + directory + b"\0" * 4 + bytes(size)


def _jpeg_with(*segments: bytes) -> bytes:
    written = b"".join(b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment for segment in segments)
    return b"\xff\xd8" + written + _as("RGB", "JPEG")[2:]


def _long_exif() -> list[bytes]:
    """Several segments, which Pillow puts together to one directory."""
    exif = exif_bomb(5000, 2_000_000)[6:]
    return [b"Exif\0\0" + exif[place : place + 65_000] for place in range(0, len(exif), 65_000)]


def _iccp(count: int) -> bytes:
    return png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1_000_000))) * count


HEAVY: dict[str, tuple[Make, bool]] = {
    "grey-16-bit": (lambda: _large_png(4000, 16, 0), True),
    "rgba-16-bit": (lambda: _large_png(4000, 16, 6), True),
    "grey-16-bit-with-a-key": (lambda: _large_png(4000, 16, 0, png_chunk(b"tRNS", b"\0\1")), True),
    "palette": (lambda: _large_png(4000, 8, 3, png_chunk(b"PLTE", bytes(768)), png_chunk(b"tRNS", b"\x80")), True),
    "interlaced": (lambda: _large_png(4000, 8, 2, interlaced=True), True),
    "webp": (lambda: encode(Image.new("RGBA", (4000, 4000)), "WEBP", lossless=True, method=0, quality=0), True),
    "jpeg-fill-bytes": (lambda: b"\xff\xd8" + b"\xff" * 19_000_000 + _as("RGB", "JPEG")[2:], False),
    "jpeg-zero-bytes": (lambda: b"\xff\xd8\xff\xfe\0\2" + b"\0" * 19_000_000 + _as("RGB", "JPEG")[2:], False),
    "jpeg-scans": (lambda: many_scans(2000, 1000), False),
    "jpeg-exif": (lambda: _jpeg_with(exif_bomb(2500, 30_000)), True),
    "jpeg-exif-in-parts": (lambda: _jpeg_with(*_long_exif()), True),
    "png-empty-chunks": (lambda: _behind_signature(png_chunk(b"teSt", b"") * 1_600_000), False),
    "png-empty-pixels": (lambda: _behind_signature(png_chunk(b"IDAT", b"") * 1_600_000), False),
    "png-profiles": (lambda: _behind_signature(_iccp(2000)), False),
    "png-texts": (lambda: _behind_signature(png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6))) * 100), False),
    "png-exif": (lambda: _behind_signature(png_chunk(b"eXIf", exif_bomb(5000, 2_000_000)[6:])), True),
    "apng": (lambda: _animation("PNG", 3000), True),
    "animated-webp": (lambda: _animation("WEBP", 3000), True),
    "gif-frames": (lambda: _animation("GIF", 3000), True),
    "gif-blocks": (lambda: _as("RGB", "GIF")[:13] + b"!\xfe" + b"\1a" * 1_000_000 + b"\0", False),
    "gif-junk": (lambda: _as("RGB", "GIF")[:10] + b"\0\0\0" + b"\1" * 5_000_000, False),
}
"""Each with whether it is a picture; otherwise it is an `ImageError`, and either takes little time and memory."""
