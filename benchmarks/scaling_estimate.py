"""Compute memory, communication and time per step for many GPUs. Trains nothing and needs no GPU.

Counted exactly: parameters, operations, and the bytes that the forward pass keeps for the backward pass (on the meta
device, for the eager network). Assumed: the constants below. docs/scaling.md explains the tables.

    python -m benchmarks.scaling_estimate
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from training.fast.training_network import FastPrecond
from training.flops import count_flops
from training.networks_edm2 import Precond

PEAK_FLOPS = 790e12  # of a large bfloat16 matrix product on an H200, a multiply-accumulate being two
EFFICIENCY = 0.5  # share of that in a training step: the target, not a measurement
GPU_BYTES = 141e9  # of an H200
USABLE = 0.9  # of it: the rest is for the CUDA context, workspaces and fragments
NODE_GPUS = 8
# Bytes a second over a ring within a node and across nodes, each of which it enters once by every one of 8 ports of
# 400 Gbit/s; and of one port: 80 % of 450, 400 and 50 GB/s.
BUS_BYTES = {True: 360e9, False: 320e9}
PORT_BYTES = 40e9
HOP_SEC = 5e-6  # latency of one step of a ring or tree
FLOAT, HALF = 4, 2  # bytes
_BUCKET_BYTES = 25 << 20  # of DistributedDataParallel
STATE_FLOATS = 6  # a parameter: itself, its gradient, two moments, two averages
NETWORKS = {"XXL": 448, "5B": 832}  # width of the first level
PLANS = [(8, 2048), (64, 2048), (1024, 2048), (1024, 16384)]  # GPUs, images a step


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one network."""

    params: int
    flops: float  # of products, convolutions and attention, to train on one image without recomputing
    image_bytes: dict[bool, int]  # kept for the backward pass for one more image, without and with recompute
    weight_bytes: dict[bool, int]  # kept whatever the batch: weights in half precision
    blocks: list[tuple[int, int]]  # bytes that a block keeps when it is recomputed: whatever the batch, and per image
    block_params: int  # of the largest block
    root_params: int  # outside of blocks

    def round_bytes(self, images: int, *, recompute: bool) -> int:
        """Return the bytes kept at once for the backward pass on this many images."""
        kept = self.weight_bytes[recompute] + images * self.image_bytes[recompute]
        return kept + (max(weights + images * each for weights, each in self.blocks) if recompute else 0)


def cost_of(width: int) -> Cost:
    """Return the cost of a network of this width for 64x64 latents."""
    with torch.device("meta"):
        net = Precond(64, 4, 1000, model_channels=width)
    kept = {recompute: [kept_bytes(net, n, recompute=recompute) for n in (1, 2)] for recompute in (False, True)}
    blocks = [block for level in (net.unet.enc, net.unet.dec) for block in level.values()][1:]
    sizes = [sum(param.numel() for param in block.parameters()) for block in blocks]
    total = sum(param.numel() for param in net.parameters())
    return Cost(
        params=total,
        flops=3 * 2 * count_flops(net.eval()).matrix_flops,
        image_bytes={key: two - one for key, (one, two) in kept.items()},
        weight_bytes={key: 2 * one - two for key, (one, two) in kept.items()},
        blocks=[(2 * one - two, two - one) for one, two in zip(block_bytes(net, 1), block_bytes(net, 2), strict=True)],
        block_params=max(sizes),
        root_params=total - sum(sizes),
    )


def kept_bytes(
    net: Precond, num: int, *, recompute: bool, dtype: torch.dtype = torch.bfloat16, like_flash: bool = True
) -> int:
    """Return the bytes that a forward pass on `num` images keeps for the backward pass, without the parameters."""
    replica = FastPrecond(net.train(), dtype=dtype, recompute=recompute)
    device = next(net.parameters()).device
    x = images_for(net, num)
    labels = torch.zeros(num, net.label_dim, device=device)
    sigma = torch.ones(num, device=device)
    with saved_storages(net) as found, flash_attention(like_flash):
        result = replica(x, sigma, labels, return_logvar=True)
    size = sum(storage.nbytes() for storage in found.values())
    del result
    return size


def block_bytes(net: Precond, num: int) -> list[int]:
    """Return the bytes that each block keeps for its backward pass on `num` images, with half-precision weights."""
    replica = FastPrecond(net.train(), dtype=torch.bfloat16)
    sizes: list[int] = []

    def around(block: torch.nn.Module, *args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        with saved_storages(net) as found:
            result: torch.Tensor = block(*args, **named)
        sizes.append(sum(storage.nbytes() for storage in found.values()))
        return result

    device = next(net.parameters()).device
    x = images_for(net, num)
    with mock.patch.object(replica, "_run", around), flash_attention(True):
        replica(x, torch.ones(num, device=device), torch.zeros(num, net.label_dim, device=device))
    return sizes


def images_for(net: Precond, num: int) -> torch.Tensor:
    """Return black images of the network's shape, on its device."""
    side = net.img_resolution
    assert isinstance(side, int)
    return torch.zeros(num, net.img_channels, side, side, device=next(net.parameters()).device)


@contextmanager
def saved_storages(net: torch.nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Yield the storages that autograd keeps in the block, without those of the network itself."""
    own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@contextmanager
def flash_attention(active: bool) -> Iterator[None]:
    """Let attention keep what the fused kernels keep: on the meta device it would take the plain path."""
    if not active:
        yield
        return
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _LikeFlash.apply):
        yield


class _LikeFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device))
        return out


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to train a network; seconds and bytes are of one GPU and step."""

    gpus: int
    batch: int
    group: int  # GPUs that share one copy of the weights; 1 = DDP
    recompute: bool
    batch_gpu: int  # images a round; 0 = does not fit
    state_bytes: float
    round_bytes: float
    sent_bytes: float
    compute_sec: float
    comm_sec: float

    @property
    def rates(self) -> tuple[float, float]:
        """Images per second over all GPUs, if nothing is sent during computation, and if everything is."""
        return self.batch / (self.compute_sec + self.comm_sec), self.batch / max(self.compute_sec, self.comm_sec)


def plan(cost: Cost, gpus: int, batch: int, *, group: int, recompute: bool) -> Plan:
    """Return the plan with the largest power of two of images per round that fits."""
    share = batch // gpus
    state: float = STATE_FLOATS * FLOAT * cost.params
    if group > 1:
        # Whole at the same time: everything outside of blocks, and the current block, the next one and a gradient.
        state = state / group + FLOAT * (2 * cost.root_params + 3 * cost.block_params)
    room = USABLE * GPU_BYTES - state
    fitting = [n for n in (2**i for i in range(12)) if n <= share and cost.round_bytes(n, recompute=recompute) <= room]
    batch_gpu = max(fitting, default=0)
    sent, comm_sec = exchange(cost, gpus, group, rounds=share // max(batch_gpu, 1))
    flops = cost.flops * share * (4 / 3 if recompute else 1)
    return Plan(
        gpus=gpus,
        batch=batch,
        group=group,
        recompute=recompute,
        batch_gpu=batch_gpu,
        state_bytes=state,
        round_bytes=cost.round_bytes(max(batch_gpu, 1), recompute=recompute),
        sent_bytes=sent,
        compute_sec=flops / (PEAK_FLOPS * EFFICIENCY),
        comm_sec=comm_sec,
    )


def exchange(cost: Cost, gpus: int, group: int, *, rounds: int) -> tuple[float, float]:
    """Return the bytes that a GPU sends in a step, and the seconds that this takes by itself."""
    size = float(FLOAT * cost.params)
    bus = BUS_BYTES[gpus <= NODE_GPUS]
    if group == 1:  # one sum, in buckets, over trees
        sent = 2 * size * (gpus - 1) / gpus
        return sent, sent / bus + size / _BUCKET_BYTES * 2 * math.log2(gpus) * HOP_SEC
    # Two gathers and a scatter a round, block by block, over a ring of the group.
    passes = 3 * rounds
    sent = passes * size * (group - 1) / group
    seconds = sent / BUS_BYTES[group <= NODE_GPUS] + passes * (len(cost.blocks) + 1) * (group - 1) * HOP_SEC
    copies = gpus // group
    if copies > 1:  # and a sum over the copies of the part that a GPU keeps, by its own port
        more = 2 * size / group * (copies - 1) / copies
        sent, seconds = sent + more, seconds + more / PORT_BYTES
        seconds += (len(cost.blocks) + 1) * 2 * math.log2(copies) * HOP_SEC
    return sent, seconds


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")
    print()


def gb(number: float) -> str:
    """Format bytes in units of 10^9."""
    return f"{number / 1e9:,.1f}"


def gb2(number: float) -> str:
    """Format bytes in units of 10^9, with two digits."""
    return f"{number / 1e9:,.2f}"


def main() -> None:
    """Print the tables of docs/scaling.md."""
    costs = {name: cost_of(width) for name, width in NETWORKS.items()}
    print_table(
        ["network", "width", "parameters, 10^9", "Tflop an image", "images/s a GPU at the bound", "at 50 %"],
        [
            [
                name,
                str(NETWORKS[name]),
                f"{c.params / 1e9:.2f}",
                f"{c.flops / 1e12:.2f}",
                f"{PEAK_FLOPS / c.flops:.0f}",
                f"{PEAK_FLOPS * EFFICIENCY / c.flops:.0f}",
            ]
            for name, c in costs.items()
        ],
    )
    print_table(
        ["GB", "weights", "gradients", "moments", "averages", "sum", "checkpoint", "a snapshot"],
        [
            [name, *(gb(FLOAT * k * c.params) for k in (1, 1, 2, 2, 6, 5)), gb(HALF * c.params)]
            for name, c in costs.items()
        ],
    )
    print_table(
        ["GB kept", "an image", "weights in bf16", "an image, --recompute", "+ a block at work", "+ its weights"],
        [
            [
                name,
                *(gb2(n) for n in (c.image_bytes[False], c.weight_bytes[False], c.image_bytes[True])),
                gb2(max(each for _, each in c.blocks)),
                gb2(max(weights for weights, _ in c.blocks)),
            ]
            for name, c in costs.items()
        ],
    )
    for name, cost in costs.items():
        print(f"{name}:\n")
        rows = []
        for gpus, batch in PLANS:
            for group in sorted({1, NODE_GPUS, gpus}):
                found = plan(cost, gpus, batch, group=group, recompute=False)
                rows.append(plan_row(found))
                if found.batch_gpu < batch // gpus:  # then --recompute may need fewer rounds, or fit at all
                    rows.append(plan_row(plan(cost, gpus, batch, group=group, recompute=True)))
        print_table(
            [
                *["GPUs", "batch", "weights", "--recompute", "--batch-gpu", "state GB", "round GB", "sent GB"],
                *["compute s", "sending s", "images/s"],
            ],
            rows,
        )


def plan_row(p: Plan) -> list[str]:
    """Return a plan as a row of a table."""
    ways = {1: "DDP", p.gpus: "--shard"}
    way = ways.get(p.group, f"--shard --shard-group={p.group}")
    row = [f"{p.gpus:,}", f"{p.batch:,}", way, "yes" if p.recompute else "no"]
    if not p.batch_gpu:
        return [*row, "does not fit", gb(p.state_bytes), gb(p.round_bytes), *["-"] * 4]
    low, high = p.rates
    numbers = [gb(p.state_bytes), gb(p.round_bytes), gb(p.sent_bytes), f"{p.compute_sec:.2f}", f"{p.comm_sec:.2f}"]
    return [*row, str(p.batch_gpu), *numbers, f"{low:,.0f} to {high:,.0f}"]


if __name__ == "__main__":
    main()
