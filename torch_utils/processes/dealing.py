"""Which process makes which batch of images: as many for each, or each whenever it is free."""

import uuid
from collections.abc import Iterator, Sequence

import numpy as np
import torch.distributed

from torch_utils.distributed import World

# Whole batches for each process that may be computed again to finish what an interrupted run left.
_BATCHES_AGAIN = 4


def split_batches(num_images: int, max_batch_size: int, world: World) -> list[np.ndarray]:
    """This process's batches, as positions 0 .. num_images-1: contiguous, near equal, dealt to the processes in turn.

    All processes get equally many; with few images some batches are empty, and without any there is no batch.
    """
    return all_batches(num_images, max_batch_size, world.size)[world.rank :: world.size]


def all_batches(num_images: int, max_batch_size: int, num_ranks: int) -> list[np.ndarray]:
    """The batches of all processes in the order in which they are dealt, their number a multiple of `num_ranks`."""
    num_batches = -(-num_images // (max_batch_size * num_ranks)) * num_ranks
    return np.array_split(np.arange(num_images), num_batches) if num_batches else []


def remaining_batches(
    batches: Sequence[np.ndarray], there: Sequence[int], max_batch_size: int, num_ranks: int
) -> list[np.ndarray]:
    """What is left of the `batches` of all processes when the images at the positions `there` need not be made.

    A batch that an interrupted run left unfinished is made again as a whole: in float32 the last digits of an image
    depend on the size of its batch, and so it gets the very bytes that the run would have given it. Where that would
    be many images, as after deleting single files, the missing ones are dealt anew. Ends with empty batches, so that
    the number is a multiple of `num_ranks`.
    """
    present = set(there)
    left = [batch for batch in batches if not present.issuperset(batch.tolist())]
    num_again = sum(len(present.intersection(batch.tolist())) for batch in left)
    if num_again > _BATCHES_AGAIN * num_ranks * max_batch_size:
        missing = np.concatenate([[i for i in batch.tolist() if i not in present] for batch in left])
        left = [missing[part] for part in all_batches(len(missing), max_batch_size, num_ranks)]
    return left + [np.zeros(0, dtype=np.int64)] * (-len(left) % num_ranks)


def deal_on_demand(batches: Sequence[np.ndarray], world: World) -> Iterator[tuple[int, np.ndarray]]:
    """Number and contents of the next batch that no process has taken, whenever this process asks, until none is left.

    A process gets as many as it has time for. Every process must begin with this; from then on they don't wait for
    each other, whether one is slow or has failed. The number taken last is kept in the store of torch.distributed.
    """
    if world.size == 1:
        yield from enumerate(batches)
        return
    # Its own counter for every loop, in a store that lives as long as the process group.
    name = world.all_gather_objects(uuid.uuid4().hex)[0]
    store = torch.distributed.PrefixStore("edm2-batches", torch.distributed.distributed_c10d._get_default_store())
    while (batch_idx := store.add(name, 1) - 1) < len(batches):
        yield batch_idx, batches[batch_idx]
