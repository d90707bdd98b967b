"""Batches on their way to the device, beside the work on the batch before."""

from collections.abc import Iterable, Iterator

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


def on_device(batches: Iterable[Pair], device: torch.device) -> Iterator[Pair]:
    """Each batch, images and labels, on `device`.

    On a GPU a stream of its own copies them. The host is ahead of the GPU: when it asks for the next batch, the GPU
    still works on the one before, and the copy goes on beside that, if the tensors are in pinned memory.
    """
    if device.type != "cuda":
        for images, labels in batches:
            yield images.to(device), labels.to(device)
        return
    stream = torch.cuda.Stream(device)
    for images, labels in batches:
        with torch.cuda.stream(stream):
            moved = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in moved:
            tensor.record_stream(current)  # its memory is not for the next copy before this stream is done with it
        yield moved
