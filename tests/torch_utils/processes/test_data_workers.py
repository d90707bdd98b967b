"""Data workers leave signals to the main process, end with what uses them, and are named if they are killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from dnnlib.errors import ConfigError
from tests.helpers.paths import ROOT
from torch_utils.processes.data_workers import prepare_worker, worker_batches, worker_errors

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the workers are forked, to be quick"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


class Items(torch.utils.data.Dataset):
    """Items 0 to 99, of which one is special: `act` makes it."""

    def __init__(self, act=lambda: 0) -> None:
        self._act = act

    def __getitem__(self, index: int) -> int:
        return self._act() if index == 5 else index

    def __len__(self) -> int:
        return 100


def loader_of(items: Items, workers: int) -> torch.utils.data.DataLoader:
    context = "fork" if workers else None
    return torch.utils.data.DataLoader(
        items, batch_size=None, num_workers=workers, multiprocessing_context=context, worker_init_fn=prepare_worker
    )


def hang() -> int:
    threading.Event().wait()
    return 0


def damaged() -> int:
    raise ConfigError("item 5 is damaged")


def killed(signum: int) -> int:
    os.kill(os.getpid(), signum)
    return 0


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_workers_end_with_the_block_also_if_they_hang(workers: int):
    before = multiprocessing.active_children()
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(KeyError), worker_batches(loader_of(Items(hang), workers)) as items:
        assert [int(next(items)) for _ in range(4)] == [0, 1, 2, 3]
        assert len(multiprocessing.active_children()) == len(before) + workers
        raise KeyError
    assert multiprocessing.active_children() == before
    assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL or handler is signal.SIG_DFL


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_item_is_one_line(workers: int):
    loader = loader_of(Items(damaged), workers)
    with pytest.raises(ConfigError, match=r"^item 5 is damaged$"), worker_batches(loader) as items:
        list(items)


@pytest.mark.parametrize(
    ("signum", "line"),
    [
        (signal.SIGKILL, r"loader process \d+ was killed by signal: Killed, .*fewer --workers"),
        (signal.SIGSEGV, r"loader process \d+ was killed by signal: Segmentation fault, "),
        (signal.SIGBUS, r"/dev/shm.*--ipc=host.*--shm-size.*--workers=0"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the names of signals and /dev/shm are those of Linux")
def test_a_killed_worker_is_one_line_wherever_the_main_process_is(signum: int, line: str):
    loader = loader_of(Items(lambda: killed(signum)), 1)
    with pytest.raises(ConfigError, match=line) as caught, worker_errors(), worker_batches(loader) as items:
        for _ in range(4):  # after which the sixth item has been asked for
            next(items)
        threading.Event().wait(60)  # stands for an iteration
    assert caught.value.only_here


def test_other_errors_stay_as_they_are():
    for error in (RuntimeError("something else"), ConfigError("a mistake")):
        with pytest.raises(type(error), match=str(error)), worker_errors():
            raise error


LEFT = """
import os, signal, sys
from tests.torch_utils.processes.test_data_workers import Items, hang, loader_of
from torch_utils.processes.data_workers import worker_batches
from torch_utils.processes.stopping import SIGNALS

def left_open():
    with worker_batches(loader_of(Items(hang), 2)) as items:
        yield items

items = next(generator := left_open())
for worker in items._workers:
    print(worker.pid, flush=True)
    for signum in SIGNALS:
        os.kill(worker.pid, signum)
print(*[int(next(items)) for _ in range(4)], flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(7)
"""


@pytest.mark.parametrize(("way", "code"), [("exit", 7), ("killed", -signal.SIGKILL)])
def test_workers_outlive_the_signals_of_a_group_but_not_the_program(way: str, code: int):
    # The workers inherit standard output: its end is theirs.
    done = subprocess.run([sys.executable, "-c", LEFT, way], stdout=subprocess.PIPE, cwd=ROOT, text=True, timeout=60)
    *pids, items = done.stdout.splitlines()
    assert (done.returncode, len(pids), items) == (code, 2, "0 1 2 3")
