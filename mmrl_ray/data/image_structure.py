"""Limits on the structure of an encoded picture, checked before Pillow parses it.

Pillow goes through the chunks, segments and blocks of a file one by one in Python, some microseconds each and some
bytes large, and unpacks every entry of a directory of EXIF, all of which may point at the same megabytes. Files of
encoders and cameras have few of them; the bounds here are far above those and far below what keeps a processor busy.
"""

from __future__ import annotations

import re
import struct

from mmrl_ray.errors import ImageError

MAX_SCANS = 40
"""Of a progressive JPEG; encoders write 6 to 20. Each takes as long as the picture is large and may cost 10 bytes: 500
of them in a file of 0.3 MB kept a processor busy for 38 s."""
MAX_CHUNKS = 16_384
"""Of a PNG, its pixels' among them: at 8 KiB each, as libpng writes them, a file of 20 MB has 2,560."""
MAX_METADATA_CHUNKS = 256
"""Of a PNG: each may hold a megabyte once it is unpacked."""
MAX_BLOCKS = 16_384
"""Of a GIF before its first frame, each of 1 to 255 bytes."""
MAX_FILL = 65_536
"""Bytes of a JPEG between its segments, up to its pixels."""
MAX_EXIF_BYTES = 4 * 2**20
"""That the entries of an EXIF directory name together; a photograph's have some 10 kB."""

_MAX_SEGMENTS = 2000
"""Of a JPEG up to its end: a file of 20 MB needs 320 for metadata."""
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""Of a JPEG segment that has a length, or the end; inside of scans nothing looks like one."""
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""JPEG segments that name the size."""
_EXIF = b"Exif\0\0"
_PNG_PIXELS = (b"IDAT", b"fdAT", b"fcTL")
_LONGEST_VALUE = 8
"""Bytes of one value in an EXIF entry."""


def check_png(data: bytes) -> None:
    """Counts chunks.

    Raises:
        ImageError: more than `MAX_CHUNKS`, or than `MAX_METADATA_CHUNKS` that are not of pixels.
    """
    place, chunks, metadata = 8, 0, 0
    while (name := data[place + 4 : place + 8]) and name != b"IEND":
        chunks += 1
        metadata += name not in _PNG_PIXELS
        if chunks > MAX_CHUNKS or metadata > MAX_METADATA_CHUNKS:
            most = f"{MAX_CHUNKS:,} chunks" if chunks > MAX_CHUNKS else f"{MAX_METADATA_CHUNKS} chunks of metadata"
            raise ImageError(f"PNG image of more than {most}: refused; save it again")
        place += int.from_bytes(data[place : place + 4], "big") + 12


def check_gif(data: bytes) -> None:
    """Counts what stands before the first frame, further frames are not read.

    Raises:
        ImageError: more than `MAX_BLOCKS`.
    """
    flags = data[10] if len(data) > 10 else 0
    place, blocks = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), 0
    while place < len(data) and data[place] not in b",;":
        if data[place] == 0x21:  # an extension: its kind, then blocks up to an empty one
            place += 2
            while place < len(data) and data[place] and blocks <= MAX_BLOCKS:
                place, blocks = place + data[place] + 1, blocks + 1
        place, blocks = place + 1, blocks + 1
        if blocks > MAX_BLOCKS:
            raise ImageError(f"GIF image of more than {MAX_BLOCKS:,} blocks before its first frame: save it again")


def check_jpeg(data: bytes) -> tuple[tuple[int, int] | None, list[int]]:
    """(width, height), None where no segment names them, and the places of all segments of EXIF.

    Goes from segment to segment as the decoder does, so that none is missed or taken from a file's attachments.

    Raises:
        ImageError: too many segments, more than `MAX_SCANS` scans, or `MAX_FILL` bytes between segments.
    """
    size: tuple[int, int] | None = None
    exif: list[int] = []
    place, scans, fill = 2, 0, 0
    for _ in range(_MAX_SEGMENTS):
        end = len(data) if scans else place + MAX_FILL + 2
        marker = _MARKER.search(data, place, end)
        if not scans:
            fill += (marker.start() if marker is not None else min(end, len(data))) - place
            if fill > MAX_FILL:
                raise ImageError(f"JPEG image with more than {MAX_FILL:,} bytes between its segments: save it again")
        if marker is None or marker[0] == b"\xff\xd9":
            return size, exif
        kind, place = marker[0][1], marker.end()
        if kind == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise ImageError(f"JPEG image of more than {MAX_SCANS} scans: refused; save it again")
        elif kind in _FRAMES and not scans and len(data) >= place + 7:
            height, width = struct.unpack(">HH", data[place + 3 : place + 7])
            size = width, height
        elif kind == 0xE1 and data.startswith(_EXIF, place + 2):
            exif.append(marker.start())
        place += int.from_bytes(data[place : place + 2], "big")
    raise ImageError(f"JPEG image of more than {_MAX_SEGMENTS:,} segments: refused; save it again")


def without_heavy_exif(data: bytes, exif: list[int]) -> bytes:
    """A JPEG whose EXIF, at these places, a decoder can afford to read: `data` itself, or its copy without."""
    if not exif:
        return data
    sizes = [int.from_bytes(data[place + 2 : place + 4], "big") for place in exif]
    parts = [data[place + 10 : place + 2 + size] for place, size in zip(exif, sizes, strict=True)]
    if exif_is_light(b"".join(parts)):
        return data
    spared = bytearray(data)
    for place in exif:
        spared[place + 1] = 0xEF  # APP15, which nothing reads
    return bytes(spared)


def exif_is_light(exif: bytes) -> bool:
    """Whether the entries of its first directory name no more than `MAX_EXIF_BYTES` together."""
    while exif.startswith(_EXIF):
        exif = exif[len(_EXIF) :]
    order = "<" if exif[:2] == b"II" else ">"
    if len(exif) < 8:
        return True
    place = struct.unpack(f"{order}I", exif[4:8])[0]
    count = int.from_bytes(exif[place : place + 2], "little" if order == "<" else "big")
    entries = exif[place + 2 : place + 2 + 12 * count]
    entries = entries[: len(entries) // 12 * 12]
    named = (values * _LONGEST_VALUE for _, _, values, _ in struct.iter_unpack(f"{order}HHII", entries))
    # One that names more than there is is not kept, but read up to the end.
    return sum(min(size, len(exif)) for size in named) <= MAX_EXIF_BYTES
