"""Make damaged copies of C4."""

import gzip
from pathlib import Path

from torchtitan_ext.data.datasets import text_files

from .streams import write_c4

SHARDS = [[f"é {i}.{j} 🗼" * (i + 2 * j + 1) for j in range(6)] for i in range(4)]
N = len(SHARDS[0])


def with_bytes(change):
    def damage(file: Path):
        file.write_bytes(change(file.read_bytes()))

    return damage


def lines_are(change):
    return with_bytes(lambda data: gzip.compress(change(gzip.decompress(data))))


def with_line(line: bytes, at: int):
    def insert(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        return b"".join([*lines[: at - 1], line + b"\n", *lines[at - 1 :]])

    return lines_are(insert)


def flip(data: bytes, at: int) -> bytes:
    data = bytearray(data)
    data[at] ^= 1
    return bytes(data)


# What is done to a file, the place that the problem names, and what it says.
SKIPPED = {
    "cut short": (with_bytes(lambda data: data[:-4]), f"after line {N}", "ended before"),
    "cut in the header": (with_bytes(lambda data: data[:5]), "after line 0", "ended before"),
    "wrong checksum": (with_bytes(lambda data: flip(data, -6)), f"after line {N}", "CRC"),
    "wrong length": (with_bytes(lambda data: flip(data, -2)), f"after line {N}", "length"),
    "corrupt": (with_bytes(lambda data: gzip.compress(b"")[:10] + b"\xff" * 20), "after line 0", "decompress"),
    "no gzip": (with_bytes(gzip.decompress), "after line 0", "Not a gzipped file"),
    "no bytes": (with_bytes(lambda data: b""), "after line 0", "no bytes"),
    "no JSON": (with_line(b'{"text": "a"', 3), "line 3", "not a JSON object"),
    "nested": (with_line(b"[" * 200_000, 2), "line 2", "RecursionError"),
    "no object": (with_line(b'["text"]', N + 1), f"line {N + 1}", 'string "text"'),
    "no text": (with_line(b'{"url": "u"}', 2), "line 2", 'string "text"'),
    "text is no string": (with_line(b'{"text": 7}', 2), "line 2", 'string "text"'),
    "no UTF-8": (with_line(b'{"text": "\xff"}', 4), "line 4", "can't decode byte 0xff"),
    "half a pair": (with_line(b'{"text": "\\ud800"}', 4), "line 4", "surrogates not allowed"),
}


def write_damaged(folder, kinds, damages=SKIPPED):
    """A copy of C4 whose files have these kinds of damage, and the texts that are left of each."""
    texts = SHARDS[1]
    path, left = write_c4(Path(folder), [texts] * len(kinds)), []
    for file, kind in zip(text_files(str(path)), kinds, strict=True):
        if kind:
            damages[kind][0](Path(file))
        left.append([] if kind and damages[kind][1] == "after line 0" else texts)
    return path, left
