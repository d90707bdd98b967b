"""Files that try to run code, fill the memory or hang the reader, by kind; and a record of what ran meanwhile.

Most kinds would do harm in an ordinary unpickler: they make the file `marker`.
"""

import codecs
import contextlib
import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch

PROTO = b"\x80\x04"
COMMAND = "echo > {}" if sys.platform != "win32" else "type nul > {}"

# Functions that run programs or code, by the names that files have for them, with how their arguments look.
RUNNERS = ["os system", f"{os.system.__module__} system", "os popen", "subprocess getoutput", "subprocess check_output"]
EVALUATORS = ["builtins eval", "builtins exec", "__builtin__ eval", "timeit timeit", "runpy run_path", "code interact"]
DOORS_TO_ALL = ["builtins getattr", "builtins __import__", "importlib import_module", "operator attrgetter",
    "functools partial", "pickle loads", "_pickle loads", "torch load", "torch.serialization load", "numpy load",
    "torch.storage pickle.loads", "torch._utils sys.modules", "torch.hub load", "copyreg _reconstructor",
    "torch_utils.persistence sys.modules", "dnnlib.util EasyDict.update", "collections OrderedDict.__reduce__",
    "joblib load", "types FunctionType", "types CodeType", "marshal loads", "ctypes CDLL", "shutil rmtree",
    "numpy.core.multiarray fromfile", "numpy memmap", "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_wrapper_subclass"]  # fmt: skip


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Stateful:
    """Pickles as a call of `function`, then BUILD with `state`."""

    def __init__(self, function: Any, args: tuple[Any, ...], state: Any) -> None:
        self.parts = function, args, state

    def __reduce__(self) -> Any:
        return self.parts


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _byte(value: int) -> bytes:
    return bytes([value])


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    packed = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(packed)]) + packed


def sequence(*numbers: int) -> bytes:
    """A tuple."""
    return b"(" + b"".join(number(n) for n in numbers) + b"t"


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def plain_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage_call(payload: bytes) -> bytes:
    """Loads `payload` as a storage."""
    return stack_global("torch.storage", "_load_from_bytes") + data(payload) + b"\x85R"


def storage(payload: bytes) -> bytes:
    """A pickle that loads `payload` as a storage."""
    return PROTO + storage_call(payload) + b"."


def legacy(described: bytes, keys: bytes = b"\x80\x02]X\x01\x00\x00\x00ka.", rest: bytes = b"") -> bytes:
    """A file in torch.save's older form around the pickle `described`."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in head) + described + keys + rest


def described(count: int, kind: str = "torch FloatStorage", tail: bytes = b"N") -> bytes:
    """The description of a storage in torch.save's older form."""
    word = plain_global(*kind.split())
    return b"\x80\x02(" + text("storage") + word + text("k") + text("cpu") + number(count) + tail + b"tQ."


def payload(values: int, claimed: int | None = None) -> bytes:
    """A storage of `values` floats that says it has `claimed`."""
    count = values if claimed is None else claimed
    return legacy(described(count), rest=struct.pack("<Q", count % 2**64) + bytes(4 * values))


def tensor(values: int, offset: int, size: bytes, stride: bytes) -> bytes:
    """A pickle of a tensor over a storage of `values` floats; size and stride are opcodes."""
    rebuild = stack_global("torch._utils", "_rebuild_tensor_v2")
    return PROTO + rebuild + b"(" + storage_call(payload(values)) + number(offset) + size + stride + b"\x89NtR."


def torch_saved(value: Any, *, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def stored_object(name: str, source: str, state: bytes = b"}") -> bytes:
    """An object of the class `name` as network files have it; `state` is opcodes."""
    entries = {"type": text("class"), "version": b"K\x06", "module_src": text(source), "class_name": text(name)}
    items = b"".join(text(key) + value for key, value in entries.items()) + text("state") + state
    return stack_global("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}(" + items + b"u\x85R"


def array(dtype: bytes, shape: bytes, content: bytes) -> bytes:
    """A pickle of a NumPy array as protocol 5 has it; dtype and shape are opcodes."""
    frombuffer = stack_global("numpy._core.numeric", "_frombuffer")
    return PROTO + frombuffer + b"(" + data(content) + dtype + shape + text("C") + b"tR."


def float_dtype(code: str = "f8") -> bytes:
    return stack_global("numpy", "dtype") + text(code) + b"\x89\x88\x87R"


def zip_of(content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, part in content.items():
            file.writestr(name, part)
    return buffer.getvalue()


@cache
def corpus(marker: str) -> dict[str, bytes]:
    """Hostile files by kind. Each is refused by every reader of pickles in this code base."""
    code = f"open({marker!r}, 'w')"
    parts = (_calls(COMMAND.format(marker), code), _known_words(code), _payloads(code), _arrays(code), _sizes())
    files = {kind: content for part in parts for kind, content in part.items()} | _structures() | _names()
    assert len(files) == sum(map(len, parts)) + len(_structures()) + len(_names())
    return files


def _calls(command: str, code: str) -> dict[str, bytes]:
    """Every opcode that can call, on every way to name a function."""
    files: dict[str, bytes] = {}
    for function in RUNNERS + EVALUATORS:
        module, name = function.split()
        argument = text(command if function in RUNNERS else code)
        for how, word in (("GLOBAL", plain_global(module, name)), ("STACK_GLOBAL", stack_global(module, name))):
            files |= {
                f"REDUCE of {function} by {how}": PROTO + word + argument + b"\x85R.",
                f"NEWOBJ of {function} by {how}": PROTO + word + argument + b"\x85\x81.",
                f"NEWOBJ_EX of {function} by {how}": PROTO + word + argument + b"\x85}\x92.",
                f"OBJ of {function} by {how}": PROTO + b"(" + word + argument + b"o.",
                f"BUILD of {function} by {how}": PROTO + word + b"}" + text("__setstate__") + argument + b"sb.",
            }
        files[f"INST of {function}"] = PROTO + b"(" + argument + f"i{module}\n{name}\n.".encode()
    for function in DOORS_TO_ALL:
        files[f"global {function}"] = PROTO + stack_global(*function.split()) + text(code) + b"\x85R."
    getattr_word, import_word = plain_global("builtins", "getattr"), plain_global("builtins", "__import__")
    chain = getattr_word + import_word + text("os") + b"\x85R" + text("system") + b"\x86R" + text(command) + b"\x85R."
    subclasses = Call(getattr, Call(getattr, Call(getattr, "", "__class__"), "__base__"), "__subclasses__")
    return files | {
        "getattr chain to os.system": PROTO + chain,
        "getattr chain to all classes": pickle.dumps(subclasses),
        "call of a call's result": PROTO + getattr_word + b")R)R)R.",
        "protocol 0": pickle.dumps(Call(eval, code), 0),
        "protocol 1": pickle.dumps(Call(eval, code), 1),
        "call before the end, dropped by POP": PROTO + plain_global("builtins", "eval") + text(code) + b"\x85R0N.",
        "call hidden in a dictionary": PROTO + b"}" + text("ema") + pickle.dumps(Call(exec, code), 2)[2:-1] + b"s.",
        "extension code of one byte": PROTO + b"\x82\xf0" + text(command) + b"\x85R.",
        "extension code of two bytes": PROTO + b"\x83\xf0\x00" + text(command) + b"\x85R.",
        "extension code of four bytes": PROTO + b"\x84\xf0\x00\x00\x00" + text(command) + b"\x85R.",
        "persistent id": PROTO + text("a") + b"Q.",
        "persistent id as text": PROTO + b"Pid\n.",
        "persistent id of a storage": PROTO + described(1)[2:],
        "out-of-band buffer": b"\x80\x05\x97.",
        "out-of-band read-only buffer": b"\x80\x05" + data(b"") + b"\x98.",
    }


def _known_words(code: str) -> dict[str, bytes]:
    """Attributes and items of objects that the reader knows."""
    reconstruct = stack_global("torch_utils.persistence", "_reconstruct_persistent_obj")
    easy = stack_global("dnnlib.util", "EasyDict")
    evil = stack_global("builtins", "eval")
    sequential = stack_global("torch.nn.modules.container", "Sequential") + b")R"
    marker_source = f"{code}\nclass Network:\n    def __setstate__(self, state): {code}\n"
    return {
        "BUILD on a known function": PROTO + reconstruct + b"}" + text("__code__") + b"Nsb.",
        "BUILD with slots": PROTO + reconstruct + b"N}" + text("__defaults__") + b"Ns\x86b.",
        "BUILD on a dictionary": PROTO + easy + b")\x81}" + text("__class__") + easy + b"sb.",
        "BUILD twice": PROTO + sequential + b"}" + text("a") + b"Nsb}" + text("b") + b"Nsb.",
        "BUILD with state that is not a dictionary": PROTO + sequential + text(code) + b"b.",
        "__setstate__ given as an attribute": PROTO + sequential + b"}" + text("__setstate__") + evil + b"sb"
        + text(code) + b"b.",
        "__reduce__ given as an item": PROTO + easy + b")R}" + text("__reduce__") + evil + b"sb.",
        "__reduce__ that restores __dict__": pickle.dumps(Stateful(exec, (code,), {"__class__": 1})),
        "items of a list": PROTO + b"]" + text("a") + b"Ns.",
        "appending to a dictionary": PROTO + b"}Na.",
        "adding to a list": PROTO + b"](N\x90.",
        "arguments of a container": PROTO + stack_global("torch.nn.modules.container", "Sequential")
        + text(code) + b"\x85R.",
        "arguments of EasyDict": PROTO + easy + text(code) + b"\x85R.",
        "bytes in another encoding": PROTO + stack_global("_codecs", "encode") + text(code) + text("hex") + b"\x86R.",
        "a dotted name": PROTO + stack_global("collections", "OrderedDict.fromkeys") + b"]\x85R.",
        "a module as a name": PROTO + stack_global("torch.storage", "os.system") + text(code) + b"\x85R.",
        "a global named by bytes": PROTO + data(b"os") + data(b"system") + b"\x93.",
        "a global without a name": PROTO + stack_global("", "") + b".",
        "a word that may only be mentioned, called": PROTO + stack_global("torch", "float16") + b")R.",
        "a module source that writes a file": PROTO + stored_object("Network", marker_source) + b".",
        "the same as a network file": PROTO + b"}" + text("ema") + stored_object("Network", marker_source) + b"s.",
        "a known class without tensors and with that source": PROTO + stored_object("Precond", marker_source) + b".",
        "a toy class without tensors and with that source": PROTO + stored_object("ToyModel", marker_source) + b".",
        "a stored function": PROTO + stored_object("Network", code).replace(text("class"), text("funct"), 1) + b".",
        "a class name that is an expression": PROTO + stored_object(f"({code})", "") + b".",
    }  # fmt: skip


def _payloads(code: str) -> dict[str, bytes]:
    """Hostile content of a tensor's bytes."""
    call = pickle.dumps(Call(eval, code), 2)
    nested = legacy(call)
    for _ in range(5):
        nested = legacy(b"\x80\x02" + storage_call(nested) + b".")
    directory = b"PK\x03\x04" + (b"PK\x01\x02" + bytes(42)) * 20_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 20_000, 20_000, len(directory) - 4, 4, 0)
    deflated = zip_of({"archive/data.pkl": call, "archive/data/0": bytes(32 << 20)}, zipfile.ZIP_DEFLATED)
    return {
        "payload with a call, older form": storage(legacy(call)),
        "payload with a call for a magic number": storage(call + legacy(b"N.")),
        "payload with a call for its keys": storage(legacy(described(1), keys=call)),
        "payload with a call, torch.save": storage(torch_saved(Call(eval, code), new=False)),
        "payload with a call, zip form": storage(torch_saved(Call(eval, code), new=True)),
        "payload in a payload, six deep": storage(nested),
        "payload in a payload, zip form": storage(torch_saved(Call(torch.load, torch_saved(1, new=True)), new=True)),
        "payload of a foreign type": storage(legacy(described(1, "builtins eval"))),
        "payload of an object": storage(torch_saved({"a": 1}, new=False)),
        "payload with a view": storage(legacy(described(1, tail=b"\x88"))),
        "payload made by hand": storage(legacy(b"\x80\x02" + text("k") + plain_global("torch", "FloatStorage")
        + b"K\x01\x87.", rest=struct.pack("<Q", 1) + bytes(4))),
        "bare pickle as payload": storage(call),
        "payload that is text": PROTO + stack_global("torch.storage", "_load_from_bytes") + text(code) + b"\x85R.",
        "tar file as payload": storage(b"storages" + bytes(504)),
        "TorchScript archive as payload": storage(zip_of({"a/code/__torch__.py": code.encode(), "a/data.pkl": call})),
        "zip bomb as payload": storage(deflated),
        "ZIP directory of twenty thousand files as payload": storage(directory + end),
        "zip bomb in place of the file": deflated,
        "torch.save in place of the file": torch_saved(Call(eval, code), new=True),
        "torch.save of a tensor in place of the file": torch_saved(torch.ones(2), new=True),
    }  # fmt: skip


def _arrays(code: str) -> dict[str, bytes]:
    """NumPy arrays of anything but numbers."""
    state = b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"
    return {
        "array of objects": pickle.dumps(np.array([Call(eval, code)], dtype=object)),
        "array of objects, protocol 2": pickle.dumps(np.array([Call(eval, code)], dtype=object), 2),
        "array with fields": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
        "array of text": pickle.dumps(np.array(["text"])),
        "array of dates": pickle.dumps(np.array(["2024-01-01"], dtype="M8[D]")),
        "array that becomes one of objects": array(float_dtype() + state, sequence(1), bytes(8)),
        "array of a dtype by its constructor": array(float_dtype("O"), sequence(1), bytes(8)),
        "array of another class": PROTO + stack_global("numpy._core.multiarray", "_reconstruct")
        + stack_global("builtins", "eval") + b"K\x00\x85" + data(b"b") + b"\x87R.",
        "masked array": pickle.dumps(np.ma.array([1.0])),
        "array of a huge shape": array(float_dtype(), sequence(2**20, 2**20, 2**20), bytes(8)),
        "array of a huge empty shape": array(float_dtype(), sequence(0, 2**62, 2**62), b""),
        "array of a negative shape": array(float_dtype(), sequence(-1, -1), bytes(8)),
        "array of a hundred dimensions": array(float_dtype(), sequence(*[1] * 100), bytes(8)),
        "tensor class of someone else": PROTO + stack_global("torch._tensor", "_rebuild_from_type_v2")
        + stack_global("builtins", "exec") + stack_global("builtins", "dict") + text(code) + b"\x85N(t.",
        "tensor over text": PROTO + stack_global("torch._utils", "_rebuild_tensor_v2") + b"(" + text("x")
        + b"K\x00)))NtR.",
    }  # fmt: skip


def _sizes() -> dict[str, bytes]:
    """Lengths beyond the end of the file, and small files that expand to large data."""
    big = struct.pack("<Q", 2**62)
    one, many = sequence(1), sequence(2**40)
    rebuild = stack_global("torch._utils", "_rebuild_tensor_v2")
    copies = b"".join(b"h\x00h\x01\x85R" for _ in range(2000))
    laughs = b"]" + text("ha") + b"a" + b"".join(b"q%b0]h%ba" % (i, i) + b"h%ba" % i for i in map(_byte, range(60)))
    reconstruct = stack_global("torch_utils.persistence", "_reconstruct_persistent_obj")
    return {
        "huge BINUNICODE8": PROTO + b"\x8d" + big + b"abc.",
        "huge BINUNICODE": PROTO + b"X" + struct.pack("<I", 2**32 - 1) + b"abc.",
        "huge BINBYTES8": PROTO + b"\x8e" + big + b"abc.",
        "huge BINBYTES": PROTO + b"B" + struct.pack("<I", 2**32 - 1) + b"abc.",
        "huge BYTEARRAY8": b"\x80\x05\x96" + big + b"abc.",
        "length beyond all integers": PROTO + b"\x8e" + b"\xff" * 8 + b"abc.",
        "huge FRAME": PROTO + b"\x95" + big + b"N.",
        "huge LONG4": PROTO + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x7f.",
        "negative LONG4": PROTO + b"\x8b" + struct.pack("<i", -1) + b"\x7f.",
        "integer of forty thousand bits": PROTO + b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000 + b".",
        "integer as endless text": PROTO + b"L" + b"9" * 100_000 + b"L\n.",
        "negative BINSTRING": PROTO + b"T" + struct.pack("<i", -1) + b"abc.",
        "huge memo index": PROTO + b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
        "endless line": PROTO + b"c" + b"a" * 1_000_000,
        "storage of a huge count": storage(payload(1, 2**60)),
        "storage of a negative count": storage(payload(1, -1)),
        "storage of a wrong count": storage(payload(4, 3)),
        "storage whose count is a tree": storage(legacy(described(1).replace(number(1), laughs, 1))),
        "tensor of a huge size": tensor(1, 0, many, one),
        "tensor of a huge size and no stride": tensor(1, 0, many, sequence(0)),
        "tensor of a huge stride": tensor(4, 0, sequence(2), sequence(2**62)),
        "tensor of a huge offset": tensor(4, 2**62, one, one),
        "tensor of a negative offset": tensor(4, -1, one, one),
        "tensor of a negative stride": tensor(4, 3, sequence(2), sequence(-1)),
        "tensor of an endless number": tensor(4, 0, sequence(2**200), one),
        "empty tensor of a huge size": tensor(0, 0, sequence(0, 2**62, 2**62), sequence(1, 1, 1)),
        "tensor of a hundred dimensions": tensor(1, 0, sequence(*[1] * 100), sequence(*[1] * 100)),
        "tensor whose size is text": tensor(1, 0, text("11"), text("11")),
        "tensor with hooks": PROTO + rebuild + b"(" + storage_call(payload(1)) + number(0) + one + one
        + b"\x89}K\x01K\x02stR.",
        "one payload loaded two thousand times": PROTO + stack_global("torch.storage", "_load_from_bytes") + b"q\x000"
        + data(payload(1 << 18)) + b"q\x010(" + copies + b"t.",
        "one text encoded two thousand times": PROTO + stack_global("_codecs", "encode") + b"q\x000"
        + text("a" * (1 << 20)) + b"q\x010" + text("latin1") + b"q\x020(" + b"h\x00h\x01h\x02\x86R" * 2000 + b"t.",
        "one array made two thousand times": PROTO + stack_global("numpy._core.numeric", "_frombuffer") + b"q\x000("
        + data(bytes(1 << 20)) + float_dtype() + sequence(1 << 17) + text("C") + b"tq\x010(" + b"h\x00h\x01R" * 2000
        + b"t.",
        "lists that double sixty times": PROTO + laughs + b".",
        "the same as the kind of an object": PROTO + reconstruct + b"}" + text("type") + laughs + b"s\x85R.",
        "the same as a number of images": PROTO + b"}" + text("num_images") + laughs + b"s.",
        "one text in a hundred thousand places": PROTO + text("a" * 100_000) + b"q\x000](" + b"h\x00" * 100_000 + b"e.",
    }  # fmt: skip


def _structures() -> dict[str, bytes]:
    """Stacks, memos and ends that don't fit."""
    sequential = stack_global("torch.nn.modules.container", "Sequential")
    nested_state = b"".join(sequential + b")R}" + text("_modules") for _ in range(5000)) + b"N" + b"sb" * 5000
    one_hash = [number(n * sys.hash_info.modulus) for n in range(1, 5001)]
    numbers = b"(" + b"".join(one_hash)
    return {
        "set of numbers of one hash": PROTO + b"\x8f" + numbers + b"\x90.",
        "frozen set of numbers of one hash": PROTO + numbers + b"\x91.",
        "call for a set of numbers of one hash": PROTO + stack_global("builtins", "set") + numbers + b"t\x85R.",
        "keys that are numbers of one hash": PROTO + b"}(" + b"".join(n + b"N" for n in one_hash) + b"u.",
        "list in itself": PROTO + b"]q\x00h\x00a.",
        "dictionary in itself": PROTO + b"}q\x00" + text("ema") + b"h\x00s.",
        "tuple in its own list": PROTO + b"]q\x00h\x00\x85a.",
        "module in itself": PROTO + sequential + b")Rq\x00}" + text("_modules") + b"h\x00sb.",
        "lists, fifty thousand deep": PROTO + b"]" * 50_000 + b"a" * 49_999 + b".",
        "tuples, fifty thousand deep": PROTO + b")" + b"\x85" * 50_000 + b".",
        "dictionaries, twenty thousand deep": PROTO + (b"}" + text("a")) * 20_000 + b"N" + b"s" * 20_000 + b".",
        "modules, five thousand deep": PROTO + nested_state + b".",
        "marks, fifty thousand deep": PROTO + b"(" * 50_000 + b".",
        "deep tuple as key": PROTO + b"}" + b")" + b"\x85" * 50_000 + b"Ns.",
        "deep tuple in a set": PROTO + b"\x8f(" + b")" + b"\x85" * 50_000 + b"\x90.",
        "list as key": PROTO + b"}]Ns.",
        "a million opcodes": PROTO + b"N0" * 500_000 + b"N.",
        "a million sets": PROTO + b"\x8f" * 1_000_000 + b"t.",
        "a million memo entries": PROTO + b"\x8f\x94" * 500_000 + b".",
        "nothing on the stack": PROTO + b".",
        "too much on the stack": PROTO + b"NN.",
        "no mark": PROTO + b"t.",
        "an open mark": PROTO + b"N(.",
        "an empty memo": PROTO + b"h\x05.",
        "odd items": PROTO + b"}(Nu.",
        "no end": PROTO + b"]",
        "more after the end": PROTO + b"N.N.",
        "two pickles": pickle.dumps({}) + pickle.dumps({}),
        "unknown opcode": PROTO + b"\xff.",
        "unknown protocol": b"\x80\xff" + b"N" * 10,
        "empty file": b"",
        "zeros": bytes(1000),
        "a web page": b"<!DOCTYPE html><html>Not found</html>",
    }


def _names() -> dict[str, bytes]:
    """Names that could control a terminal."""
    escape = "\x1b]0;title\x07\r\n\u202e\x00"
    return {
        "control characters in a global": PROTO + stack_global(f"os{escape}", f"system{escape}") + b")R.",
        "control characters in a class": PROTO + stored_object(f"Precond{escape}", "") + b".",
        "control characters in a kind": PROTO + stored_object("A", "").replace(text("class"), text(escape), 1) + b".",
        "control characters in a dtype": PROTO + stack_global("numpy", "dtype") + text(escape) + b"\x89\x88\x87R.",
        "a name of a million characters": PROTO + stack_global("os", "a" * 1_000_000) + b")R.",
        "text that is not UTF-8": PROTO + b"X\x02\x00\x00\x00\xff\xfe.",
        "half a surrogate pair": PROTO + b"X\x03\x00\x00\x00\xed\xa0\x80" + text("a") + b"\x93.",
        "a module as text with line ends": PROTO + b"V\\u000aos\n.",
    }


# What Python tells audit hooks when code is loaded or run, here or in another program. Every unpickler of the standard
# library and of torch looks up names by pickle.find_class.
_RUNNING = {"exec", "import", "marshal.loads", "pickle.find_class", "code.__new__", "function.__new__"}
_RUNNING |= {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile"}
_RUNNING |= {"subprocess.Popen", "pty.spawn", "ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function", "shutil.rmtree"}
_recording: list[list[str]] = []  # one audit hook, which cannot be removed, appends to the last list
_hooked: list[bool] = []


def _listen(event: str, args: Any) -> None:
    if _recording and event in _RUNNING:
        _recording[-1].append(f"{event} {str(args)[:100]}")


@contextlib.contextmanager
def record_running() -> Iterator[list[str]]:
    """The list of everything that ran meanwhile."""
    for name in ("raw_unicode_escape", "cp437"):  # which parsers import at their first use
        codecs.lookup(name)
    if not _hooked:
        sys.addaudithook(_listen)
        _hooked.append(True)
    _recording.append([])
    try:
        yield _recording[-1]
    finally:
        _recording.pop()
