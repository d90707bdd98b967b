"""The arithmetic of benchmarks/scaling_estimate.py against counts made another way."""

import pytest
import torch

from benchmarks import scaling_estimate as estimate
from training.networks_edm2 import Precond


def make_network() -> Precond:
    return Precond(
        8, 3, 3, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8], channels_per_head=8
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_counted_without_content_is_what_a_real_pass_keeps(recompute: bool):
    with torch.device("meta"):
        without = make_network()
    for num in (1, 3):
        real = estimate.kept_bytes(make_network(), num, recompute=recompute, dtype=torch.float32, like_flash=False)
        assert estimate.kept_bytes(without, num, recompute=recompute, dtype=torch.float32) == real > 0


def test_a_plan_adds_up():
    cost = estimate.Cost(
        params=10**9,
        flops=1e12,
        image_bytes={False: 10**9, True: 10**8},
        weight_bytes={False: 2 * 10**9, True: 0},
        blocks=[(10**8, 10**8)] * 10,
        block_params=10**8,
        root_params=0,
    )
    ddp = estimate.plan(cost, 8, 2048, group=1, recompute=False)
    # 24 GB of state and 2 of weights leave 100.9 of 126.9 GB for images of 1 GB.
    assert (ddp.state_bytes, ddp.batch_gpu, ddp.round_bytes) == (24e9, 64, 66e9)
    assert ddp.sent_bytes == 2 * 4e9 * 7 / 8
    sharded = estimate.plan(cost, 8, 2048, group=8, recompute=False)
    assert sharded.state_bytes == 24e9 / 8 + 3 * 4e8
    assert sharded.sent_bytes == 4 * 3 * 4e9 * 7 / 8  # four rounds
    copies = estimate.plan(cost, 64, 512, group=8, recompute=False)
    assert copies.sent_bytes == 3 * 4e9 * 7 / 8 + 2 * 5e8 * 7 / 8
    assert ddp.compute_sec == 256e12 / 395e12
    assert estimate.plan(cost, 8, 2048, group=1, recompute=True).compute_sec == pytest.approx(ddp.compute_sec * 4 / 3)
