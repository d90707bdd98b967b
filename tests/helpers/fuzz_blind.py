"""Damage that knows nothing of the format of a file. `others` are further valid files."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A damaged file."""

    kind: str  # what was done to it
    content: bytes
    sealed: bool = False  # checksums fit what they cover: what is read may differ in value, not in form


# Values that lengths, offsets and counts are likely to be wrong at.
EDGES = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 1 << 24, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
EDGES_LONG = [*EDGES, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def blind(content: bytes, others: Sequence[bytes], rng: random.Random) -> Damaged:
    """One kind of blind damage, once or a few times."""
    kind, change = rng.choice(_BLIND)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        content = change(content, others, rng)
    # What another file's end brings along may be all that a ZIP file needs.
    return Damaged(kind=kind, content=content, sealed=kind == "splice")


def _place(content: bytes, rng: random.Random) -> int:
    """Any position, with the ends, where most formats have their tables, as likely as the middle."""
    size = max(len(content), 1)
    return rng.choice([rng.randrange(size), rng.randrange(min(size, 96)), size - 1 - rng.randrange(min(size, 96))])


def _flip_bits(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64]) if content else 0):
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set_bytes(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    begin, length = _place(content, rng), rng.choice([1, 1, 4, 16, 512, 4096])
    filler = rng.choice([b"\0", b"\xff", None])
    fresh = rng.randbytes(length) if filler is None else filler * length
    return content[:begin] + fresh[: len(content) - begin] + content[begin + length :]


def _truncate(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return content[: _place(content, rng)]


def _append(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return content + rng.choice([bytes(rng.randrange(1, 4096)), rng.randbytes(rng.randrange(1, 512)), content])


def _block(content: bytes, rng: random.Random) -> tuple[int, int]:
    begin = _place(content, rng)
    return begin, min(len(content), begin + rng.choice([1, 4, 16, 64, 512, 4096]))


def _move_block(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Swap two blocks, double one, or take one out."""
    (a, a_end), (b, b_end) = sorted([_block(content, rng), _block(content, rng)])
    way = rng.randrange(3)
    if way == 0 and a_end <= b:
        return content[:a] + content[b:b_end] + content[a_end:b] + content[a:a_end] + content[b_end:]
    if way == 1:
        return content[:b] + content[a:a_end] + content[b:]
    return content[:a] + content[a_end:]


def _set_number(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A number of 2, 4 or 8 bytes, such as a length, to a value at some edge, or one more or less."""
    size, order = rng.choice([2, 4, 4, 8]), rng.choice(["little", "little", "big"])
    begin = min(_place(content, rng), max(len(content) - size, 0))
    old = int.from_bytes(content[begin : begin + size], order)
    value = rng.choice([*EDGES_LONG, old + 1, old - 1, old * 2, len(content), len(content) - begin]) % 256**size
    return content[:begin] + value.to_bytes(size, order) + content[begin + size :]


def _splice(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """The beginning of one file and the end of another, or a piece of the other in the middle."""
    other = rng.choice(others) if others else content[::-1]
    if rng.random() < 0.5:
        return content[: _place(content, rng)] + other[_place(other, rng) :]
    begin, (other_begin, other_end) = _place(content, rng), _block(other, rng)
    return content[:begin] + other[other_begin:other_end] + content[begin + other_end - other_begin :]


_BLIND: list[tuple[str, Callable[[bytes, Sequence[bytes], random.Random], bytes]]] = [
    ("bits", _flip_bits),
    ("bytes", _set_bytes),
    ("truncation", _truncate),
    ("appended", _append),
    ("blocks", _move_block),
    ("number", _set_number),
    ("splice", _splice),
]
