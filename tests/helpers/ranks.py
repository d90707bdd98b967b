"""The processes of one run, as a launcher starts them, in children that have torch and the scripts imported already.

torchrun itself takes seconds to start. tests/training/run/test_faults.py starts it, and
tests/torch_utils/processes/test_failures.py.
"""

import contextlib
import multiprocessing.forkserver
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
import torch.multiprocessing

from tests.helpers.documented_run import run_script
from tests.helpers.paths import ROOT

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PRELOADED = ["train_edm2", "calculate_metrics", "dataset_tool", "generate_images", "sweep", "tests.helpers.ranks"]


def run_members(function: Callable[..., None], *args: Any, num: int = 2, timeout: float = 240) -> None:
    """Call function(rank, *args) in `num` processes. Raises if one of them does; ends all after `timeout` seconds."""
    if _METHOD == "forkserver":
        with contextlib.chdir(ROOT):  # where the server finds the modules, if this call starts it
            multiprocessing.forkserver.set_forkserver_preload(_PRELOADED)
            multiprocessing.forkserver.ensure_running()
    context = torch.multiprocessing.start_processes(function, args, num, join=False, start_method=_METHOD)
    try:
        end = time.monotonic() + timeout
        while not context.join(1):
            assert time.monotonic() < end, f"{function.__name__} takes more than {timeout} seconds"
    finally:
        for process in context.processes:
            process.kill()
            process.join(60)


def run_ranks(script: str, *args: Any, num: int = 2, timeout: float = 240) -> str:
    """Run `python SCRIPT ARGS...` in `num` processes of one run; what they print. AssertionError if one fails."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output.txt")
        environment = dict(os.environ)
        if num > 1:
            environment |= {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            # As torchrun does: the store is in this process, and all members are its clients.
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        member_args = (script, [str(arg) for arg in args], os.getcwd(), environment, output)
        try:
            run_members(_member, *member_args, num=num, timeout=timeout)
        except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as error:
            raise AssertionError(f"{error}\n{output.read_text('utf-8')}") from None
        return output.read_text("utf-8")


def _member(rank: int, script: str, args: list[str], folder: str, environment: dict[str, str], output: Path) -> None:
    """Be one process of the run."""
    os.environ.clear()
    os.environ |= environment
    if "WORLD_SIZE" in environment:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.chdir(folder)
    torch.set_num_threads(1)
    with open(output, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    run_script(script, args)
    sys.stdout.flush()
