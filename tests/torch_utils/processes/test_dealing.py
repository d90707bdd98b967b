"""Batches dealt to processes: what an interrupted run left, and on demand, over two processes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed

from tests.helpers.ranks import run_members
from torch_utils.distributed import World
from torch_utils.processes.dealing import (
    all_batches,
    cores_per_process,
    deal_on_demand,
    remaining_batches,
    split_batches,
)

BATCHES = 7


def lists(batches: list[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_nothing_to_make_is_no_batch():
    assert split_batches(0, 4, World()) == [] and list(deal_on_demand([], World())) == []


def test_one_process_gets_all_batches_in_order():
    batches = all_batches(10, 4, 1)
    assert [(i, batch.tolist()) for i, batch in deal_on_demand(batches, World())] == list(enumerate(lists(batches)))


def test_unfinished_batches_are_made_again_as_they_were():
    batches = all_batches(12, 3, 1)  # 0-2, 3-5, 6-8, 9-11
    assert lists(remaining_batches(batches, [0, 1, 2, 4], 3, 1)) == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert lists(remaining_batches(batches, range(12), 3, 1)) == []
    assert lists(remaining_batches(batches, [], 3, 1)) == lists(batches)


def test_what_is_left_is_as_many_batches_for_every_process():
    batches = all_batches(24, 3, 2)
    left = remaining_batches(batches, range(3, 18), 3, 2)
    assert lists(left) == [[0, 1, 2], [18, 19, 20], [21, 22, 23], []]
    assert all(batch.dtype == batches[0].dtype for batch in left)


def test_single_missing_images_of_many_batches_are_dealt_anew():
    batches = all_batches(400, 10, 2)
    missing = list(range(3, 400, 20))
    left = remaining_batches(batches, sorted(set(range(400)) - set(missing)), 10, 2)
    assert np.concatenate(left).tolist() == missing
    assert [len(batch) for batch in left] == [10, 10]


def _member(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = World(rank=rank, size=2)
    notes = torch.distributed.PrefixStore("test", store)
    batches = all_batches(3 * BATCHES - 1, 3, 1)

    # The second process stays with its first batch until the first process has made all the others.
    slow = []
    for batch_idx, batch in deal_on_demand(batches, world):
        slow.append((batch_idx, batch.tolist()))
        if rank == 1:
            notes.set("slow has one", "")
            notes.wait(["fast is done"])
        else:
            notes.wait(["slow has one"])
    notes.set("fast is done", "")

    # Now the second process fails with a batch in hand; the first one goes on to the end.
    failed = []
    for batch_idx, _ in deal_on_demand(batches, world):
        failed.append(batch_idx)
        if rank == 1:
            notes.set("failed", "")
            break
        notes.wait(["failed"])
    Path(folder, f"{rank}.json").write_text(json.dumps([slow, failed]))
    # The group is left by both at once: gloo may abort a process whose peer is gone.
    notes.set(f"ends {rank}", "")
    notes.wait(["ends 0", "ends 1"])
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_slow_process_gets_fewer_batches_and_a_failed_one_holds_nobody_up(tmp_path: Path):
    run_members(_member, str(tmp_path))
    (fast, left), (slow, lost) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (len(fast), len(slow)) == (BATCHES - 1, 1)
    expected = [[i, batch.tolist()] for i, batch in enumerate(all_batches(3 * BATCHES - 1, 3, 1))]
    assert sorted(fast + slow) == expected
    assert (len(left), len(lost)) == (BATCHES - 1, 1) and sorted(left + lost) == list(range(BATCHES))


def test_processes_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cores = cores_per_process()
    assert 1 <= cores <= (os.cpu_count() or 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores_per_process() == max(1, cores // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert cores_per_process() == 1
