"""Reads damaged files in a process of its own, so that a crash, a hang or a lack of memory ends that process alone.

python -m tests.helpers.fuzz_run 0 1000            # seeds 0 to 999, a line of JSON for each
python -m tests.helpers.fuzz_run 17 18             # one of them
python -m tests.helpers.fuzz_run 0 1000 options    # one subject alone
"""

import codecs
import faulthandler
import importlib
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from dnnlib.errors import ConfigError
from tests.helpers.fuzz import damage
from tests.helpers.fuzz_subjects import Subject, require_one_line, subjects
from tests.helpers.hostile import record_running

LIMIT_SEC = 60.0  # for one input; those here take a hundredth of a second
LIMIT_KB = 64 << 10  # by which the memory may grow while an input of these kilobytes is read
_SPACE_BYTES = 1 << 30  # of addresses that may be asked for beyond what the process has when it starts


def main(first: int, last: int, only: str = "") -> None:
    """For each seed, print a line at its start and one with the outcome; `only` names a subject."""
    torch.set_num_threads(1)
    PIL.Image.init()
    for encoding in ("utf-16-be", "utf-16-le", "utf-32-be", "utf-32-le"):  # which JSON may be in
        codecs.lookup(encoding)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "made").mkdir()
        known = {name: each for name, each in subjects(place / "made").items() if only in ("", name)}
        # Much is imported at the first use: by the readers, and by the judges, which build networks on the meta device.
        importlib.import_module("torch._dynamo")
        originals = {name: _in_folder(place, each.files, each, strict=False) for name, each in known.items()}
        _limit_space()
        for seed in range(first, last):
            _say({"seed": seed})
            faulthandler.dump_traceback_later(LIMIT_SEC, exit=True)
            _say({"seed": seed, **one(seed, place, known, originals)})
            faulthandler.cancel_dump_traceback_later()


def one(seed: int, place: Path, known: dict[str, Subject], originals: dict[str, Any]) -> dict[str, Any]:
    """Damage a file by `seed` and read it; return the damage, the outcome, and the time and memory used."""
    rng = random.Random(seed)
    name = list(known)[seed % len(known)]
    subject = known[name]
    target = rng.choice(subject.targets)
    others = [content for other in known.values() for content in other.files.values()]
    damaged = damage(subject.files[target], others, rng)
    about: dict[str, Any] = {"subject": name, "target": target, "damage": damaged.kind}
    before, start = _reset_peak(), time.perf_counter()
    try:
        found = _in_folder(place, {**subject.files, target: damaged.content}, subject)
        about["outcome"] = subject.judge(found, originals[name], damaged.sealed)
    except ConfigError as error:
        about |= {"outcome": "refused", "message": require_one_line(error)}
    except Exception:
        about |= {"outcome": "bug", "message": traceback.format_exc()}
    return about | {"sec": round(time.perf_counter() - start, 3), "grown_kb": _peak_kb() - before}


def _in_folder(place: Path, files: dict[str, bytes], subject: Subject, *, strict: bool = True) -> Any:
    """Return the result of the subject's reader for these files; if strict, it must not import or run anything."""
    folder = place / "files"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    try:
        with record_running() as ran:
            return subject.read(folder)
    finally:
        shutil.rmtree(folder)
        assert not (strict and subject.closed and ran), ran


def _limit_space() -> None:
    """Let the system refuse allocations far beyond the bound, if it can."""
    try:
        import resource
    except ImportError:
        return
    used_kb = _status("VmSize:") if sys.platform == "linux" else 0
    if used_kb:
        resource.setrlimit(resource.RLIMIT_AS, (used_kb * 1024 + _SPACE_BYTES,) * 2)


def _reset_peak() -> int:
    """Memory of the process in kB, from which the peak is measured; 0 if the system does not report it."""
    if sys.platform != "linux":
        return 0
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS:")


def _peak_kb() -> int:
    return _status("VmHWM:") if sys.platform == "linux" else 0


def _status(entry: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith(entry)).split()[1])


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
