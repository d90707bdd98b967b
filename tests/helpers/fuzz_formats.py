"""Damage that respects a format: the wrong value at a right place, or changes that keep all checksums right."""

import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
import zlib
from itertools import pairwise
from typing import Any

from tests.helpers.fuzz_blind import EDGES, EDGES_LONG, Damaged, blind

_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 255, 10**6, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), float("-inf"), "", "x", "\x00", "\ud800", "a\nb", "../../etc/passwd", "/abs", "C:\\x", "1", "0.05",
    "nan", "x" * 5000, [], {}, [[]], [0], [1, 2], [None], [["a", 0]], {"a": 1}, {"class": "Precond"}, {"labels": 1},
    [1.5, "x"], [[0, 1], [2, 3]],
]  # fmt: skip


# ZIP files: the tables at the end, and what is inside, with checksums that fit.

# Offset and struct format of fields: of an entry of the central directory, of a local header, of the end record.
_CENTRAL = [(6, "H"), (8, "H"), (10, "H"), (16, "I"), (20, "I"), (24, "I"), (28, "H"), (30, "H"), (32, "H"), (34, "H"),
    (38, "I"), (42, "I")]  # fmt: skip
_LOCAL = [(4, "H"), (6, "H"), (8, "H"), (14, "I"), (18, "I"), (22, "I"), (26, "H"), (28, "H")]
_END = [(4, "H"), (6, "H"), (8, "H"), (10, "H"), (12, "I"), (16, "I"), (20, "H")]


def zip_tables(content: bytes, rng: random.Random) -> Damaged | None:
    """A field of a directory entry, a local header or the end record, or a name in one of them."""
    signature, fields, name_at = rng.choice(
        [(b"PK\1\2", _CENTRAL, 46), (b"PK\1\2", _CENTRAL, 46), (b"PK\3\4", _LOCAL, 30), (b"PK\5\6", _END, 0)]
    )
    places = [i for i in range(len(content)) if content.startswith(signature, i)]
    if not places:
        return None
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3])):
        place = rng.choice(places)
        if name_at and rng.random() < 0.2 and place + name_at < len(content):
            changed[place + name_at + rng.randrange(4)] = rng.choice(b"\0/.\xff\\A9")
            continue
        offset, code = rng.choice(fields)
        if place + offset + struct.calcsize(code) > len(content):
            continue
        (old,) = struct.unpack_from(f"<{code}", changed, place + offset)
        elsewhere = struct.unpack_from(f"<{code}", content, rng.choice(places) + offset)[0] if code == "I" else old
        value = rng.choice([*EDGES, old + 1, old - 1, old ^ 8, elsewhere, 8, 12, 14, 99]) % 256 ** struct.calcsize(code)
        struct.pack_into(f"<{code}", changed, place + offset, value)
    return Damaged(kind="ZIP tables", content=bytes(changed))


def zip_content(content: bytes, rng: random.Random) -> Damaged | None:
    """The same archive with another content of one entry, another name of it, or without it; its checksums fit."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    place = rng.randrange(len(entries))
    if rng.random() < 0.3:  # few entries are not pictures
        place = next((i for i, (name, _) in enumerate(entries) if name.endswith((".json", "data.pkl"))), place)
    name, data = entries[place]
    way = rng.randrange(6)
    if way == 0:
        stem = name.rpartition("/")[0]
        name = rng.choice(
            ["../x.png", "/x.png", "x", f"{stem}/x.npy", f"{stem}/", entries[0][0], "C:x.png", "a" * 9000]
        )
        entries[place] = name, data
    elif way == 1:
        del entries[place]
    else:
        entries[place] = name, _inside(name, data, rng)
    methods = [zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    buffer, method = io.BytesIO(), rng.choice(methods)
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data, method)  # dated 1980: the same seed, the same bytes
    return Damaged(kind="ZIP content", content=buffer.getvalue(), sealed=True)


def _inside(name: str, data: bytes, rng: random.Random) -> bytes:
    """The content of an entry, damaged in the way of its own format."""
    by_start = {b"\x89PNG": png_chunks, b"\x93NUM": npy_header}
    by_end = {".json": json_text, ".pkl": pickle_opcodes}
    change = by_start.get(data[:4]) or next((way for end, way in by_end.items() if name.endswith(end)), None)
    changed = change(data, rng) if change is not None and rng.random() < 0.8 else None
    return blind(data, [], rng).content if changed is None else changed


# Pickles, opcode by opcode.


def pickle_opcodes(content: bytes, rng: random.Random) -> bytes | None:
    try:
        starts = [position for _, _, position in pickletools.genops(content)] + [len(content)]
    except Exception:
        return None
    count = len(starts) - 1
    parts = [content[a:b] for a, b in pairwise(starts)]
    for _ in range(rng.choice([1, 1, 2, 4])):
        place, other = rng.randrange(count), rng.randrange(count)
        way = rng.randrange(6)
        if way == 0:
            parts[place] = b""
        elif way == 1:
            parts[place] += parts[other]
        elif way == 2:
            parts[place], parts[other] = parts[other], parts[place]
        elif way == 3:  # an argument of a kind that is not expected
            parts[place] = rng.choice([b"N", b"]", b"}", b")", b"K\x07", b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"(t",
                b"X\x01\0\0\0a", b"G\x7f\xf8\0\0\0\0\0\0", b"\x88", b"0", b"2", b"\x94", b"h\0",
                b"j\xff\xff\xff\x7f"])  # fmt: skip
        elif way == 4 and len(parts[place]) > 1:  # its argument
            changed = bytearray(parts[place])
            changed[rng.randrange(1, len(changed))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            parts[place] = bytes(changed)
        elif way == 5:
            parts[place] = bytes([rng.randrange(256)]) + parts[place][1:]
    return b"".join(parts)


# .safetensors: the length of the header, the header as JSON, the numbers.


def safetensors(content: bytes, rng: random.Random) -> Damaged | None:
    (length,) = struct.unpack_from("<Q", content)
    header = json_text(content[8 : 8 + length], rng)
    if header is None:
        return None
    said = len(header) if rng.random() < 0.9 else rng.choice([*EDGES_LONG, len(header) - 1, len(content)])
    return Damaged(
        kind="safetensors header", content=struct.pack("<Q", said) + header + content[8 + length :], sealed=True
    )


# JSON, a text or lines of it.


def json_text(content: bytes, rng: random.Random) -> bytes | None:
    if rng.random() < 0.15:
        return rng.choice(
            [
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"null",
                b"1" * 5000,
                b'"',
                b"\xff\xfe{}",
                b"",
                b"\xef\xbb\xbf" + content,
            ]
        )
    lines = content.splitlines()
    place = rng.randrange(len(lines)) if len(lines) > 1 and content[-3:-2] != b"\n" else None
    try:
        value = json.loads(content)
        place = None
    except ValueError:
        if place is None:
            return None
        value = json.loads(lines[place])
    for _ in range(rng.choice([1, 1, 1, 3])):
        value = _changed_value(value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    return text if place is None else b"\n".join([*lines[:place], text, *lines[place + 1 :], b""])


def _changed_value(value: Any, rng: random.Random) -> Any:
    """The same with one value in it, at any depth, replaced, removed, renamed or doubled."""
    inner = bool(value) and isinstance(value, dict | list)
    # What is text in a header may be JSON in turn.
    if isinstance(value, str) and value[:1] in "{[" and value and rng.random() < 0.8:
        try:
            return json.dumps(_changed_value(json.loads(value), rng))
        except ValueError:
            return rng.choice(_VALUES)
    if not inner or rng.random() < 0.05:
        return rng.choice([*_VALUES, value + 1, value - 1, -value] if type(value) in (int, float) else _VALUES)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return rng.choice([value[:place] + value[place + 1 :], [*value, value[place]], value[::-1]])
        return [*value[:place], _changed_value(value[place], rng), *value[place + 1 :]]
    key = rng.choice(sorted(value))
    if rng.random() < 0.2:
        rest = {name: entry for name, entry in value.items() if name != key}
        return rng.choice([rest, rest | {key + "x": value[key]}, rest | {"": value[key]}])
    return value | {key: _changed_value(value[key], rng)}


# PNG: chunks with checksums that fit.


def png_chunks(content: bytes, rng: random.Random) -> bytes | None:
    chunks, start = [], 8
    while start + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, start)
        chunks.append((content[start + 4 : start + 8], content[start + 8 : start + 8 + length]))
        start += 12 + length
    if not chunks:
        return None
    place = rng.randrange(len(chunks))
    name, data = chunks[place]
    way = rng.randrange(6)
    if way == 0:
        del chunks[place]
    elif way == 1:
        chunks.insert(place, (name, data))
    elif way == 2:
        extra = [(b"tRNS", b"\0\1"), (b"PLTE", bytes(9)), (b"acTL", struct.pack(">II", 9, 0)), (b"eXIf", b"MM\0*"),
            (b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 20))), (b"zTXt", b"a\0\0" + zlib.compress(bytes(8 << 20))),
            (b"abCD", b""), (b"IDAT", b"")]  # fmt: skip
        chunks.insert(rng.randrange(1, len(chunks) + 1), rng.choice(extra))
    elif way == 3 and name != b"IHDR" and data:
        chunks[place] = name, blind(data, [], rng).content
    else:
        header = bytearray(chunks[0][1])
        if len(header) != 13:
            return None
        if rng.random() < 0.6:
            value = rng.choice([0, 1, 7, 9, 16, 255, 4096, 13_000, 16_000, 65_535, 1 << 24, 0x7FFFFFFF, 0xFFFFFFFF])
            struct.pack_into(">I", header, rng.choice([0, 4]), value)
            if rng.random() < 0.5:
                struct.pack_into(">II", header, 0, value, value)
        else:
            header[rng.randrange(8, 13)] = rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
        chunks[0] = b"IHDR", bytes(header)
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return content[:8] + b"".join(packed)


# NPY: the text of the header.


def npy_header(content: bytes, rng: random.Random) -> bytes | None:
    (length,) = struct.unpack_from("<H", content, 8)
    text = content[10 : 10 + length].decode("latin1")
    start = text.find("(") + 1
    shape = text[start : text.find(")", start)]
    shapes = ["0,", "-1,", "1,", "8, 8, 8", "2, 4, 4", "8, 1048576, 1048576", "99999999999999999999,", "4, 4, 8, 1",
        "8, 30000, 30000", "True, 1, 1", "8.0, 4, 4", "1e9,", ""]  # fmt: skip
    kinds = ["<f8", ">f4", "<f2", "|O", "<i4", "|u1", "<c8", "|V4", "<U1", "|S4", "(2,)<f4", "<m8", "x"]
    way = rng.randrange(5)
    if way == 0:
        text = text.replace(f"({shape})", f"({rng.choice(shapes)})")
    elif way == 1:
        text = text.replace("<f4", rng.choice(kinds))
    elif way == 2:
        text = text.replace("False", rng.choice(["True", "None", "__import__('os')", "1", "[" * 300]))
    elif way == 3:
        text = rng.choice(
            ["{}", "(" * 200, "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 1, 1)}", text[:9]]
        )
    else:
        version = rng.choice([b"\2\0", b"\3\0", b"\0\0", b"\xff\xff"])
        return content[:6] + version + content[8:]
    header = text.rstrip("\n").encode("latin1") + b"\n"
    said = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 0xFFFF])
    return content[:8] + struct.pack("<H", said) + header + content[10 + length :]


# Headers of an answer over HTTP, and values of options: lines of a name and a value.

_HEADER_VALUES = [
    b"", b"0", b"-1", b"+5", b"9" * 5000, b"1e9", b"12, 12", b"12, 13", b"x" * 70_000, b"\xff\xfe", b"caf\xc3\xa9",
    b"\0", b"bytes 0-219/220", b"bytes 5-9/*", b"bytes */220", b"bytes 9-5/1", b"bytes 0-" + b"9" * 400 + b"/1",
    b"identity", b"gzip", b"br, gzip", b"chunked", b"gzip, chunked", b"W/\"a\"", b"\"\xe4\"", b"/x", b"//", b"//[",
    b"http://[::1/", b"http://127.0.0.1:0/", b"http://127.0.0.1:99999/", b"ftp://a/", b"file:///etc/passwd",
    b"javascript:x", b"?", b"#", b"http://" + b"a" * 300 + b"/", b"http://\xe2\x84\x80/", b"Thu, 99 Foo 2024",
    b"Mon, 01 Jan 99999 00:00:00 GMT", b"keep-alive", b"inf", b"nan", b"a\r\n b", b" 220", b"0x10", b"220;220",
]  # fmt: skip
_HEADER_NAMES = [
    b"Content-Length", b"Content-Range", b"Content-Encoding", b"Transfer-Encoding", b"Location", b"Retry-After",
    b"ETag", b"Last-Modified", b"Accept-Ranges", b"Connection", b"Set-Cookie", b"Date", b"", b"X\xff",
]  # fmt: skip
_STATUS = [
    b"200", b"204", b"206", b"301", b"304", b"307", b"308", b"400", b"404", b"408", b"416", b"429", b"500", b"99",
    b"999", b"-1", b"9" * 30, b"x", b"",
]  # fmt: skip


def http_headers(content: bytes, rng: random.Random) -> bytes:
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    for _ in range(rng.choice([1, 1, 2, 3])):
        way, place = rng.randrange(6), rng.randrange(len(lines))
        if way == 0:
            first = first.replace(first.split(b" ")[1], rng.choice(_STATUS), 1) if b" " in first else first
        elif way == 1:
            lines.insert(place, rng.choice(_HEADER_NAMES) + b": " + rng.choice(_HEADER_VALUES))
        elif way == 2 and len(lines) > 1:
            del lines[place]
        elif way == 3 and rng.random() < 0.1:
            lines += [b"X-%d: y" % number for number in range(rng.choice([50, 200, 5000]))]
        else:
            lines[place] = lines[place].partition(b":")[0] + b": " + rng.choice(_HEADER_VALUES)
    return b"\r\n".join([first, *lines]) + b"\r\n\r\n" + rng.choice([body, body, body, body[:-1], body * 2, b""])


OPTION_VALUES = [
    "", " ", "-", "--", "0", "0e400", "-0", "-1", "+1", "1", "1.5", ".5", "1.", "1e3", "1e400", "1e-400",
    "1e999999999999999999999", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "0." + "1" * 5000, "1_000", "0x10",
    "\u0661\u0662", "\u00b2", "1,2", "1,,2", ",", "1,", "1-", "-1--5", "5-1", "0-99999", "1-99999999999999999",
    "0-" + "9" * 40, "1," * 2000 + "1", "0.1,0.2", "0.1,0.1000000000000001,...,0.2", "0.1,0.2,...", "...",
    "0.02,0.04,...,0.24", "1e-300,2e-300,...,0.2", "0,inf", "1:2", "Ki", "1Ki", "9" * 18 + "Gi", "1ki", "1e3Ki", "GB",
    "1GB", "9" * 17 + "TiB", "1.5GB", "auto", "all", "none", "self", "fid", "fid,fid", "FID", "x" * 300, "x" * 5000,
    "a\tb", "\x1b[2J", "\udcff", "\U0001f600", "~", "~root", "~nobody/x", "~\udcff", "/", "//", ".", "..",
    "a" * 300 + "/b", "http://[", "http://", "https://a:b/", "http://a:99999/", "hf://", "hf://a", "hf://a/b@",
    "s3://", "x://y", "file://", "https://h/a-{0..999999999999}.zip", "https://h/a-{9..1}.zip", "https://h/{", "*",
    "[", "[!", "?", "%s", "{}", "{0}", "$(x)", "`x`", ";", "lowres:0", "lowres:" + "9" * 9, "lowres:", "inpaint:0-0",
    "inpaint:1-0", "inpaint:.1-9", "64x64", "0x0", "99999x99999", "1x" + "9" * 30, "64X64", "cpu", "cuda:-1",
    "cuda:" + "9" * 30, "meta", "fp16", "true", "None", "net-" + "9" * 40 + "-0.100.pkl", "(0.28,2.90]", "0.28,2.90",
]  # fmt: skip


def option_values(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode().splitlines()
    for _ in range(rng.choice([1, 1, 1, 2, 4, 20])):
        place = rng.randrange(len(lines))
        name, _, value = lines[place].partition("=")
        way = rng.randrange(8)
        if way == 0 and value:
            cut = rng.randrange(len(value))
            value = value[:cut] + rng.choice(["", "-", ",", "e", ".", "9" * 20, "\x00", "\u00e4"]) + value[cut + 1 :]
        elif way == 1:
            value = rng.choice([value + rng.choice(OPTION_VALUES), f"{value},{rng.choice(OPTION_VALUES)}"])
        else:
            value = rng.choice(OPTION_VALUES)
        lines[place] = f"{name}={value}"
    return "\n".join(lines).encode("utf-8", "surrogateescape")
