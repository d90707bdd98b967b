"""The folder of shards: what is in it, what it may take, and who fetches what when many want the same."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dnnlib.errors import ConfigError
from tests.helpers.shard_server import serve
from tests.helpers.shards import cached, leftovers
from training.streaming import remote
from training.streaming.cache import ReadAhead, ShardCache
from training.streaming.remote import RemoteFile, find_file


def write_files(folder: Path, names: str, size: int = 100) -> dict[str, RemoteFile]:
    """Files a.zip, ... of different bytes."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        (folder / f"{name}.zip").write_bytes(bytes([number]) * size)
    return {name: find_file((folder / f"{name}.zip").as_uri()) for name in names}


def test_what_was_used_longest_ago_makes_room(tmp_path: Path):
    files = write_files(tmp_path / "data", "abcd")
    cache = ShardCache(tmp_path / "shards", 300)
    for age, name in enumerate("abc"):
        cache.fetch(files[name])
        os.utime(cache.path(files[name]), (age, age))
    cache.fetch(files["a"])
    cache.fetch(files["d"])
    assert cached(cache) == ["a.zip", "c.zip", "d.zip"]
    assert cache.fetch(files["b"], keep=[files[name] for name in "acd"]) is None
    assert cached(cache) == ["a.zip", "c.zip", "d.zip"]
    cache.fetch(files["b"], keep=[files[name] for name in "ac"])
    assert cached(cache) == ["a.zip", "b.zip", "c.zip"]


def size_of(cache: ShardCache) -> int:
    """Bytes in the folder at this moment, or a little later."""
    total = 0
    for path in cache.folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_a_file_is_downloaded_once_however_many_want_it_at_the_same_time(tmp_path: Path):
    write_files(tmp_path / "data", "a", size=100_000)
    with serve(tmp_path / "data") as server:
        file = find_file(f"{server.url}/a.zip")
        caches = [ShardCache(tmp_path / "shards", 200_000) for _ in range(8)]  # such as 8 processes have
        with ThreadPoolExecutor(8) as pool:
            paths = list(pool.map(lambda cache: cache.fetch(file), caches))
        assert [r for r in server.requests if r[0] == "GET"] == [("GET", "a.zip", 0, 100_000)]
    assert {path.read_bytes() for path in paths if path is not None} == {(tmp_path / "data" / "a.zip").read_bytes()}


def test_the_bound_holds_while_many_fetch_different_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = write_files(tmp_path / "data", "abcdefghijklmnop", size=10_000)
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 1000)
    most, over = 0, threading.Event()
    watched = ShardCache(tmp_path / "shards", 35_000)
    watched.folder.mkdir()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, size_of(watched))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda file: ShardCache(tmp_path / "shards", 35_000).fetch(file), files.values()))
    over.set()
    watcher.join()
    assert None not in paths
    assert 10_000 < most <= 35_000
    assert len(cached(watched)) == 3
    for path in watched.folder.glob("*.zip"):
        assert path.read_bytes() == (tmp_path / "data" / path.name.partition("-")[2]).read_bytes()


def test_a_download_whose_process_is_killed_is_made_again(tmp_path: Path):
    files = write_files(tmp_path / "data", "ab", size=3000)
    cache = ShardCache(tmp_path / "shards", 7000)
    with serve(tmp_path / "data") as server:
        file = find_file(f"{server.url}/a.zip")
        server.stall = True
        code = (
            "import sys; from pathlib import Path; from training.streaming.remote import find_file; "
            "from training.streaming.cache import ShardCache; "
            "ShardCache(Path(sys.argv[1]), 7000).fetch(find_file(sys.argv[2]))"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(cache.folder), file.url])
        assert server.stalled.wait(30)
        assert len(leftovers(cache)) == 1
        assert cached(cache) == []
        process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
        process.wait(timeout=120)
        server.stall = False
        cache.fetch(files["b"])  # clears away what the other left, which else would be in the way for ever
        assert leftovers(cache) == []
        path = cache.fetch(file)
        assert path is not None
        assert path.read_bytes() == (tmp_path / "data" / "a.zip").read_bytes()


def test_the_next_window_is_fetched_while_the_current_one_is_read(tmp_path: Path):
    files = write_files(tmp_path / "data", "abcdef")
    cache = ShardCache(tmp_path / "shards", 400)

    def wait_for(names: list[str]) -> None:
        for _ in range(1000):
            if cached(cache) == names:
                return
            threading.Event().wait(0.01)
        assert cached(cache) == names

    ahead = ReadAhead(cache)
    a, b, c, d, e, f = files.values()
    ahead.enter([], [a, b], [c, d])
    wait_for(["a.zip", "b.zip", "c.zip", "d.zip"])
    ahead.enter([a, b], [c, d], [e, f])  # with no room for three, the one before goes
    wait_for(["c.zip", "d.zip", "e.zip", "f.zip"])
    ahead.close()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: folder.write_bytes(b""), "cannot write to the data cache"),
        (lambda folder: None, "more than --data-cache-size=99"),
    ],
    ids=["no folder", "too large"],
)
def test_what_cannot_be_kept_is_told(tmp_path: Path, spoil: Callable[[Path], object], words: str):
    file = write_files(tmp_path / "data", "a")["a"]
    spoil(tmp_path / "shards")
    with pytest.raises(ConfigError, match=words):
        ShardCache(tmp_path / "shards", 99 if "99" in words else 1000).fetch(file)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fill(*args: object) -> bool:
        raise OSError(28, "No space left on device")

    file = write_files(tmp_path / "data", "a")["a"]
    monkeypatch.setattr("training.streaming.cache.download", fill)
    cache = ShardCache(tmp_path / "shards", 1000)
    with pytest.raises(ConfigError, match=r"No space left on device; give another --data-cache, or"):
        cache.fetch(file)
    assert leftovers(cache) == cached(cache) == []
