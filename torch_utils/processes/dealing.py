"""Assignment of batches to processes: the same number for each, or on demand; and the share of cores."""

import os
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
import torch.distributed

from torch_utils.distributed import World

# Batches per process that may be computed again, as a whole, to complete what an interrupted run left.
_BATCHES_AGAIN = 4


def split_batches(num_images: int, max_batch_size: int, world: World) -> list[np.ndarray]:
    """Return this process's batches of 0..num_images-1: contiguous, near equal, as many as others get, maybe empty."""
    return all_batches(num_images, max_batch_size, world.size)[world.rank :: world.size]


def all_batches(num_images: int, max_batch_size: int, num_ranks: int) -> list[np.ndarray]:
    """Return the batches of all processes in dealing order; their number is a multiple of `num_ranks`."""
    num_batches = -(-num_images // (max_batch_size * num_ranks)) * num_ranks
    return np.array_split(np.arange(num_images), num_batches) if num_batches else []


def remaining_batches(
    batches: Sequence[np.ndarray], existing: Sequence[int], max_batch_size: int, num_ranks: int
) -> list[np.ndarray]:
    """Return the `batches` of all processes that are still needed if the images at positions `existing` exist.

    A batch that an interrupted run left unfinished is computed again as a whole. In float32 the last digits of an image
    depend on its batch size, so this gives the bytes that the run would have written. If that would repeat many images,
    as after single files were deleted, the missing ones form new batches. Empty batches at the end make the number a
    multiple of `num_ranks`.
    """
    present = set(existing)
    left = [batch for batch in batches if not present.issuperset(batch.tolist())]
    num_again = sum(len(present.intersection(batch.tolist())) for batch in left)
    if num_again > _BATCHES_AGAIN * num_ranks * max_batch_size:
        missing = np.concatenate([[i for i in batch.tolist() if i not in present] for batch in left])
        left = [missing[part] for part in all_batches(len(missing), max_batch_size, num_ranks)]
    return left + [np.zeros(0, dtype=np.int64)] * (-len(left) % num_ranks)


def deal_on_demand(batches: Sequence[np.ndarray], world: World) -> Iterator[tuple[int, np.ndarray]]:
    """Yield number and content of the next batch that no process has taken, until none is left.

    A process gets as many as it has time for. Every process must start this iteration; after that none waits for
    another that is slow or has failed. The counter is in the store of torch.distributed.
    """
    if world.size == 1:
        yield from enumerate(batches)
        return
    # A new counter for every loop: the store lives as long as the process group.
    name = world.all_gather_objects(uuid.uuid4().hex)[0]
    store = torch.distributed.PrefixStore("edm2-batches", torch.distributed.distributed_c10d._get_default_store())
    while (batch_idx := store.add(name, 1) - 1) < len(batches):
        yield batch_idx, batches[batch_idx]


def cores_per_process() -> int:
    """Number of cores that this process may use, divided by the processes that torchrun started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
