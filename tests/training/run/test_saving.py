"""What a run leaves on its disk: in the background as in the foreground, on full, broken and shared disks."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import dnnlib.background
import dnnlib.cli
import train_edm2 as script
from dnnlib.errors import ConfigError
from dnnlib.folder_lock import FolderLock
from edm2.run_log import RunLog
from tests.helpers.tiny import assert_same_state, tiny_config, train, write_dataset
from torch_utils.checkpoints.checkpoint import load_checkpoint, read_digest, save_checkpoint
from torch_utils.distributed import World
from training.run import saving
from training.run.run_folder import RunFolder
from training.run.saving import RunSaver
from training.snapshot import load_snapshot
from training.training_loop import Event, Iteration, Notice, Saved, Status, TrainingRun

TINY = ["--preset=edm2-img64-s", "--device=cpu", "--channels=4", "--channel-mult=1,2", "--num-blocks=1", "--rampup=0"]
OPTIONS = [*TINY, "--batch=512", "--status=0", "--snapshot=0", "--checkpoint=1024"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip")


def make_run(config, folder: Path) -> TrainingRun:
    folder.mkdir(exist_ok=True)
    return TrainingRun(config, RunFolder(folder), world=World())


def run(*args: object) -> int:
    try:
        dnnlib.cli.main(script.train_edm2, [str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def state_path(folder: Path, kimg: int | str) -> Path:
    return folder / f"training-state-{kimg:0>7}.pt"


def test_files_of_the_background_are_those_of_the_foreground(data: Path, tmp_path: Path):
    config = tiny_config(data, batch=512, duration=1024, snapshot=1024, checkpoint=1024, snapshot_format="both")
    for background in (True, False):
        train(make_run(dataclasses.replace(config, background_saves=background), tmp_path / str(background)))
    names = sorted(path.name for path in (tmp_path / "True").iterdir())
    assert len(names) == 5
    assert names == sorted(path.name for path in (tmp_path / "False").iterdir())
    for name in names:
        one, two = (tmp_path / way / name for way in ("True", "False"))
        if name.endswith(".pt"):
            assert read_digest(one) is not None
            assert_same_state(load_checkpoint(one), load_checkpoint(two))
        else:
            assert_same_state(*(load_snapshot(path).net.state_dict() for path in (one, two)))
        if name.endswith(".safetensors"):
            assert header_and_numbers(one) == header_and_numbers(two)


def header_and_numbers(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_checkpoints_of_one_state_are_bitwise_the_same_either_way(data: Path, tmp_path: Path):
    config = tiny_config(data, duration=16)
    one = train(make_run(config, tmp_path))
    content = []
    for background in (True, False):
        saver = RunSaver(dataclasses.replace(config, background_saves=background), one.folder, World())
        events = [*saver.save_checkpoint(1024, one.state.state_dict()), *saver.settle()]
        assert [event.nimg for event in events] == [1024]
        content.append(state_path(tmp_path, 1).read_bytes())
    assert content[0] == content[1]


def test_training_goes_on_while_a_file_is_written_and_waits_before_the_next(data: Path, tmp_path: Path, monkeypatch):
    go, started = threading.Event(), threading.Event()

    def slowly(path: Path, content: dict) -> None:
        started.set()
        assert go.wait(60)
        save_checkpoint(path, content)

    monkeypatch.setattr(saving, "save_checkpoint", slowly)
    monkeypatch.setattr(saving, "_HEARTBEAT_SEC", 0.01)
    one = make_run(tiny_config(data, checkpoint=16, duration=48), tmp_path)
    gain = one.state.net.unet.out_gain
    events, gains = iter(one), []
    for _ in range(3):
        assert isinstance(next(events), Iteration)
        gains.append(gain.item())
    assert started.is_set() and list(tmp_path.glob("*.pt")) == []
    go.set()
    first, *rest = (event for event in events if isinstance(event, Saved))
    assert [first.nimg, *(event.nimg for event in rest)] == [16, 32, 48]
    assert load_checkpoint(rest[-1].paths[0])["state"]["cur_nimg"] == 48
    assert len(set(gains)) == 3


def test_a_file_is_of_the_time_when_it_was_taken(data: Path, tmp_path: Path, monkeypatch):
    go = threading.Event()

    def slowly(path: Path, content: dict) -> None:
        assert go.wait(60)
        save_checkpoint(path, content)

    monkeypatch.setattr(saving, "save_checkpoint", slowly)
    one = make_run(tiny_config(data, checkpoint=16, duration=24), tmp_path)
    gains = {}
    for event in one:
        if isinstance(event, Iteration):
            gains[event.nimg] = one.state.net.unet.out_gain.item()
        if gains.keys() >= {24}:
            go.set()
        if isinstance(event, Saved) and event.nimg == 16:
            assert load_checkpoint(event.paths[0])["net"]["unet.out_gain"].item() == gains[16] != gains[24]


def test_a_run_that_is_left_early_waits_for_its_files(data: Path, tmp_path: Path):
    config = tiny_config(data, checkpoint=16, duration=48)
    with contextlib.closing(make_run(config, tmp_path)) as left:
        for event in left:
            if isinstance(event, Iteration) and event.nimg == 24:
                break
    assert load_checkpoint(state_path(tmp_path, "0000000.016"))["state"]["cur_nimg"] == 16


def test_only_so_many_checkpoints_are_kept(data: Path, tmp_path: Path):
    config = tiny_config(data, batch=1024, checkpoint=1024)
    for keep, duration, left in ((0, 3, [1, 2, 3]), (2, 4, [3, 4]), (1, 5, [5])):
        train(make_run(dataclasses.replace(config, keep_checkpoints=keep, duration=duration << 10), tmp_path))
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [f"training-state-{kimg:07d}.pt" for kimg in left]


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_taken(data, tmp_path, capsys):
    out = tmp_path / "run"
    args = [*OPTIONS, f"--data={data}", f"--outdir={out}", "--duration=2Ki"]
    assert run(*args) == 0
    newest, before = state_path(out, 2), state_path(out, 1)
    whole = load_checkpoint(newest)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    assert run(*args) == 0
    told = capsys.readouterr().out
    line = f"{newest.name} is damaged and was renamed to {newest.name}.damaged; the run continues from {before.name}."
    assert line in told and line in (out / "log.txt").read_text()
    assert newest.with_name(f"{newest.name}.damaged").read_bytes() == content
    assert_same_state(load_checkpoint(newest), whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(data, tmp_path, capsys):
    out = tmp_path / "run"
    args = [*OPTIONS, f"--data={data}", f"--outdir={out}"]
    assert run(*args, "--duration=2Ki") == 0
    for path in out.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert run(*args, "--duration=3Ki") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "training-state-0000001.pt" in error and "1 older one(s) as well; to train from the beginning" in error
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    for path in list(out.glob("*.pt")):
        path.rename(path.with_name(f"{path.name}.damaged"))
    assert run(*args, "--duration=3Ki") == 2
    assert "has no checkpoint left but training-state-0000002.pt.damaged" in capsys.readouterr().err
    for path in out.glob("*.damaged"):
        path.unlink()
    (out / "stats.jsonl").touch()
    assert run(*args, "--duration=1Ki") == 0
    assert f"{out} has no checkpoint: the run starts from the beginning." in capsys.readouterr().out


def test_a_checkpoint_of_the_published_layout_is_continued(data: Path, tmp_path: Path):
    config = tiny_config(data, checkpoint=24, duration=24)
    train(make_run(config, tmp_path / "ours"))
    ours = load_checkpoint(state_path(tmp_path / "ours", "0000000.024"))
    parts = {key: ours[key] for key in ("state", "net", "optimizer", "ema")}
    later = dataclasses.replace(config, duration=48)
    expected = train(make_run(later, tmp_path / "ours")).state.state_dict()
    for name, change in {"published": {}, "other": {"optimizer_state": parts["optimizer"], "loss_fn": None}}.items():
        (tmp_path / name).mkdir()
        stored = {key: value for key, value in {**parts, **change}.items() if not change or key != "optimizer"}
        torch.save(stored, state_path(tmp_path / name, 0))
        assert_same_state(train(make_run(later, tmp_path / name)).state.state_dict(), expected)


def test_the_interval_of_statistics_goes_on_where_it_was(data: Path, tmp_path: Path):
    config = tiny_config(data, checkpoint=24, duration=24, status=32)
    first = make_run(config, tmp_path)
    list(first)
    stored = load_checkpoint(state_path(tmp_path, "0000000.024"))
    assert stored["run"]["tick"]["cur_nimg"] == 24
    # As if the checkpoint had been taken in the middle of an interval that began at 8 images, a second before.
    stored["run"]["tick"] = {"cur_nimg": 8, "total_elapsed_time": stored["state"]["total_elapsed_time"] - 1.0}
    save_checkpoint(state_path(tmp_path, "0000000.024"), stored)
    events = list(make_run(dataclasses.replace(config, duration=32), tmp_path))
    (stats,) = (event.stats for event in events if hasattr(event, "stats"))
    assert stats["Timing/sec_per_tick"] > 1.0
    assert stats["Timing/sec_per_kimg"] == pytest.approx(stats["Timing/sec_per_tick"] / 24e-3)


def test_moments_of_other_shapes_are_refused(data: Path, tmp_path: Path):
    config = tiny_config(data, checkpoint=16, duration=16)
    train(make_run(config, tmp_path))
    stored = load_checkpoint(state_path(tmp_path, "0000000.016"))
    moments = stored["optimizer"]["state"][1]
    moments["exp_avg"] = moments["exp_avg"][..., :1].contiguous()
    save_checkpoint(state_path(tmp_path, "0000000.016"), stored)
    with pytest.raises(
        ConfigError, match=r"does not belong to this run: exp_avg of parameter 1 is \dx1, the parameter \dx\d"
    ):
        make_run(config, tmp_path)


def test_a_second_run_in_the_folder_is_refused_and_a_dead_ones_lock_is_not(data, tmp_path, capsys):
    out = tmp_path / "run"
    args = [*OPTIONS, f"--data={data}", f"--outdir={out}", "--duration=1Ki"]
    lock = FolderLock(out)
    lock.acquire()
    assert run(*args) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"--outdir={out} is in use by process {os.getpid()} on " in error
    assert [path.name for path in out.iterdir()] == ["run.lock"]
    text = lock.path.read_text()
    lock.release()
    out.mkdir()
    lock.path.write_text(text.replace(f'"pid": {os.getpid()}', f'"pid": {2**22 + 1}'))
    (out / ".training-state-0000001.pt.0123456789ab.tmp").touch()
    assert run(*args) == 0
    assert "which is gone; taking over" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "data.json",
        "log.txt",
        "sessions.jsonl",
        "training-state-0000001.pt",
        "training_options.json",
    ]


def test_who_lost_the_folder_writes_no_more(data: Path, tmp_path: Path):
    folder = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="taken over by"), folder.held(World(), say=lambda text: None):
        other = TrainingRun(tiny_config(data, checkpoint=16), folder, world=World())
        lock = tmp_path / "run.lock"
        lock.write_text(lock.read_text().replace('"token": "', '"token": "not'))
        list(other)
    assert list(tmp_path.glob("*.pt")) == []


@contextlib.contextmanager
def small_disk(folder: Path, size: str, *, fill: int = 0) -> Iterator[None]:
    """A disk of its own, for those who may have one; `fill` bytes are taken."""
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, timeout=120
    )
    if not mounted or mounted.returncode:
        pytest.skip("nobody may mount a disk here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=120)


def fill_up(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes of the disk."""
    path = folder / "filling"
    path.write_bytes(b"\0" * max(shutil.disk_usage(folder).free - leave, 0))
    return path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tmpfs")
def test_a_full_disk_ends_the_run_in_one_line_or_is_waited_for(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "disk"
    args = [*OPTIONS, f"--data={data}", f"--outdir={out}", "--format=safetensors"]
    with small_disk(out, "4m"):
        assert run(*args, "--duration=1Ki") == 0
        first = state_path(out, 1)
        before = first.read_bytes()
        filling = fill_up(out, leave=len(before) // 2)
        capsys.readouterr()
        assert run(*args, "--duration=2Ki") == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "training-state-0000002.pt: it needs " in error and "--on-disk-full=wait" in error
        # Without the look before, the disk itself refuses.
        monkeypatch.setattr(dnnlib.background, "require_space", lambda path, num_bytes: None)
        for snapshots in ("0", "2Ki"):
            assert run(*args, "--duration=2Ki", f"--snapshot={snapshots}") == 2
            (error,) = capsys.readouterr().err.splitlines()
            assert "No space left on device; earlier files are unchanged" in error
        assert first.read_bytes() == before
        assert not any(path.name.startswith((".", "run.lock")) for path in out.iterdir())

        monkeypatch.setattr(saving, "_HEARTBEAT_SEC", 0.01)
        monkeypatch.setattr(saving, "BackgroundWriter", partial(dnnlib.background.BackgroundWriter, poll_sec=0.01))
        said: list[str] = []

        def say(log: RunLog, text: str) -> None:
            said.append(text)
            if "waiting for room" in text:
                filling.unlink()

        monkeypatch.setattr(RunLog, "say", say)
        assert run(*args, "--duration=2Ki", "--on-disk-full=wait") == 0
        assert sum("waiting for room" in text for text in said) == 1
        assert any("There is room again" in text for text in said)
        assert load_checkpoint(state_path(out, 2))["state"]["cur_nimg"] == 2048


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mount")
def test_a_disk_that_turns_read_only_ends_the_run_in_one_line(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "disk"
    args = [*OPTIONS, f"--data={data}", f"--outdir={out}"]
    real = FolderLock.require_held  # which is called before each file

    def turn_read_only(lock: FolderLock) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(out)], check=True, timeout=120)
        real(lock)

    with small_disk(out, "8m"):
        assert run(*args, "--duration=1Ki") == 0
        before = state_path(out, 1).read_bytes()
        monkeypatch.setattr(FolderLock, "require_held", turn_read_only)
        capsys.readouterr()
        assert run(*args, "--duration=2Ki") == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"cannot write {state_path(out, 2)}: Read-only file system" in error
        assert run(*args, "--duration=2Ki") == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"the output folder {out} cannot be written to" in error
        assert state_path(out, 1).read_bytes() == before


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_in_the_middle_of_a_file_leaves_the_earlier_ones(
    data: Path, tmp_path: Path, monkeypatch, code: int, background: bool
):
    config = tiny_config(data, batch=512, checkpoint=1024, duration=2048, background_saves=background)
    train(make_run(dataclasses.replace(config, duration=1024), tmp_path))
    before = state_path(tmp_path, 1).read_bytes()
    written = []

    def emit(self, chunk, real=saving.save_checkpoint.__globals__["DigestWriter"]._emit) -> None:
        written.append(len(chunk))
        if sum(written) > len(before) // 2:
            self.failure = OSError(code, os.strerror(code))
            raise self.failure
        real(self, chunk)

    monkeypatch.setattr("torch_utils.checkpoints.checkpoint.DigestWriter._emit", emit)
    with pytest.raises(ConfigError, match=f"cannot write .*0000002.pt: {os.strerror(code)}"):
        train(make_run(config, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["training-state-0000001.pt"]
    assert state_path(tmp_path, 1).read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="there are no resource limits")
def test_a_limit_on_file_sizes_is_one_line(data: Path, tmp_path: Path):
    import resource

    config = tiny_config(data, checkpoint=16, snapshot=16, duration=16, snapshot_format="safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*: File too large"):
            train(make_run(config, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="the folder of an open file cannot be removed there")
def test_a_folder_that_vanishes_ends_the_run_in_one_line(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    report = RunLog.report

    def vanish(log: RunLog, event: Event) -> None:
        if isinstance(event, Status):
            shutil.rmtree(out, ignore_errors=True)
        report(log, event)

    monkeypatch.setattr(RunLog, "report", vanish)
    args = [*OPTIONS[:-3], f"--data={data}", f"--outdir={out}", "--duration=1Ki"]
    assert run(*args, "--status=512") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"stats.jsonl: the folder {out} is gone" in error
    assert not out.exists()


def test_a_failing_save_is_told_at_the_next_iteration(data: Path, tmp_path: Path, monkeypatch):
    def fail(path: Path, content: dict) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "save_checkpoint", fail)
    broken = make_run(tiny_config(data, checkpoint=16, duration=1 << 20), tmp_path)
    seen = []
    with pytest.raises(ConfigError, match="Input/output error"):
        for event in broken:
            seen.append(event)
            if event.nimg == 16:
                assert isinstance(event, Iteration)
            if event.nimg > 16:
                broken._saver._writer.wait()
    assert seen[-1].nimg == 24
    assert not any(isinstance(event, Saved | Notice) for event in seen)
