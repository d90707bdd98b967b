"""Damage for files of every kind that is read here, from blind bit flips to changes that keep all checksums right.

`damage` is a function of the content and of a random generator alone, so that a seed names a damaged file.
"""

import random
from collections.abc import Callable, Sequence

from tests.helpers import fuzz_formats as formats
from tests.helpers.fuzz_blind import Damaged, blind

__all__ = ["Damaged", "damage"]


def damage(content: bytes, others: Sequence[bytes], rng: random.Random) -> Damaged:
    """`content` after one or a few changes; `others` are further valid files, whose parts may take its parts' place."""
    ways: list[Callable[[], Damaged | None]] = [lambda: blind(content, others, rng)] * 3
    if content[:2] == b"PK":
        ways += [lambda: formats.zip_tables(content, rng), lambda: formats.zip_content(content, rng)] * 2
    elif content[:1] == b"\x80":
        ways += [lambda: _of("pickle", formats.pickle_opcodes(content, rng))] * 3
    elif content[8:9] == b"{":
        ways += [lambda: formats.safetensors(content, rng)] * 3
    elif content[:4] == b"\x89PNG":
        ways += [lambda: _of("PNG", formats.png_chunks(content, rng))] * 3
    elif content[:6] == b"\x93NUMPY":
        ways += [lambda: _of("NPY", formats.npy_header(content, rng))] * 3
    elif content[:1] in b"{[":
        ways += [lambda: _of("JSON", formats.json_text(content, rng))] * 3
    elif content[:5] == b"HTTP/":
        ways += [lambda: _of("answer", formats.http_headers(content, rng))] * 6
    elif b"=" in content.partition(b"\n")[0]:
        ways = [lambda: _of("options", formats.option_values(content, rng))]
    for _ in range(20):
        result = rng.choice(ways)()
        if result is not None and result.content != content:
            return result
    return Damaged(kind="empty", content=b"")


def _of(kind: str, content: bytes | None) -> Damaged | None:
    return None if content is None else Damaged(kind=kind, content=content, sealed=True)
