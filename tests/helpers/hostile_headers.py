"""Headers of .safetensors network files that lie, by kind."""

import json
import struct
from collections.abc import Callable
from typing import Any

ESCAPE = "\x1b]0;title\x07\r\n\u202e\x00"


def hostile_headers(valid: bytes) -> dict[str, bytes]:
    """Files like `valid`, a small network, each with one thing wrong in its header."""
    end = 8 + int.from_bytes(valid[:8], "little")

    def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
        header = json.loads(valid[8:end])
        result = change(header)
        packed = result if isinstance(result, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(packed)) + packed + valid[end:]

    def entry(**entries: Any) -> bytes:
        """With other entries in the metadata; values other than text become JSON."""
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}
        return changed(lambda header: header["__metadata__"].update(texts))

    def tensor(**entries: Any) -> bytes:
        """With other entries for a tensor."""
        return changed(lambda header: header["unet.out_gain"].update(entries))

    def network(**arguments: Any) -> bytes:
        original = json.loads(json.loads(valid[8:end])["__metadata__"]["network"])
        return entry(network={"class": "Precond", "arguments": original["arguments"] | arguments})

    def renamed(header: dict[str, Any]) -> None:
        header[f"unet.{ESCAPE}"] = header.pop("unet.out_gain")

    return {
        "header of a huge length": struct.pack("<Q", 2**63) + valid[8:],
        "header beyond the end": struct.pack("<Q", len(valid)) + valid[8:],
        "header of no length": struct.pack("<Q", 0) + valid[8:],
        "header that is not JSON": changed(lambda header: b"{" + b"x" * 100),
        "header that is nested": changed(lambda header: b'{"a":' + b"[" * 50_000),
        "header that is a list": changed(lambda header: b"{}[]"),
        "header that is not UTF-8": changed(lambda header: b'{"\xff\xfe": 1}'),
        "metadata that is not text": changed(lambda header: header["__metadata__"].update(format=1)),
        "no metadata": changed(lambda header: header.pop("__metadata__") and None),
        "another format": entry(format="pickle"),
        "another version": entry(format_version="2"),
        "format with control characters": entry(format=ESCAPE),
        "version with control characters": entry(format_version=ESCAPE),
        "tensor beyond the end": tensor(data_offsets=[0, 2**40]),
        "tensor of negative offsets": tensor(data_offsets=[-2, 0]),
        "tensor that ends before it begins": tensor(data_offsets=[4, 2]),
        "tensors in the same place": tensor(data_offsets=[0, 4]),
        "tensor of a huge shape": tensor(shape=[2**40, 2**40]),
        "tensor of an endless shape": tensor(shape=[10**30]),
        "tensor of a negative shape": tensor(shape=[-1]),
        "tensor of another shape": tensor(shape=[1, 1]),
        "tensor of an unknown dtype": tensor(dtype="O"),
        "tensor of integers": tensor(dtype="I16"),
        "tensor with a control character": changed(renamed),
        "missing tensor": changed(lambda header: header.pop("unet.out_gain") and None),
        "foreign network": entry(network={"class": "os.system", "arguments": {}}),
        "network with control characters": entry(network={"class": ESCAPE, "arguments": {}}),
        "network without arguments": entry(network={"class": "Precond"}),
        "no network": entry(network="null"),
        "network that is not JSON": entry(network=ESCAPE),
        "network that is nested": entry(network="[" * 100_000),
        "endless number": entry(nimg="9" * 5000),
        "number that is infinite": entry(ema_std="1e999"),
        "number that is NaN": entry(nimg="NaN"),
        "number that is true": entry(nimg="true"),
        "unknown argument": network(evil="import os"),
        "argument with control characters": network(**{ESCAPE: 1}),
        "argument of text": network(model_channels="__import__('os').system('id')"),
        "network of a huge width": network(model_channels=2**40),
        "network of a million layers": network(num_blocks=2**20),
        "network of many levels": network(channel_mult=[1] * 1000),
        "network that is divided by zero": network(channels_per_head=0),
        "foreign encoder": entry(encoder={"class": "subprocess.Popen", "arguments": {"args": "id"}}),
        "encoder with unknown arguments": entry(encoder={"class": "StandardRGBEncoder", "arguments": {"init": "id"}}),
        "foreign loss": entry(loss={"class": "eval", "arguments": {}}),
        "nested options": entry(dataset_kwargs='{"a":' * 100 + "1" + "}" * 100),
        "options of a hundred thousand entries": entry(dataset_kwargs={str(i): i for i in range(100_000)}),
    }
