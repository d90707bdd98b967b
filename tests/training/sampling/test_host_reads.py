"""Sampling and the detectors of metrics never wait for the device: shown on the meta device, which has no values."""

from typing import Any

import pytest
import torch

from tests.helpers.no_host_reads import NoHostReads
from training.fast.inference_network import InferencePrecond
from training.metrics.detectors.dinov2 import normalized
from training.metrics.detectors.inception import resize_tf1
from training.networks_edm2 import Precond
from training.sampling.denoisers import WithoutLabels
from training.sampling.sampler import edm_sampler

META = torch.device("meta")


def network(**options: Any) -> InferencePrecond:
    options = {"label_dim": 5, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]} | options
    with META:
        net = Precond(16, 3, model_channels=8, channels_per_head=8, **options).eval()
        return InferencePrecond(net, dtype=torch.float16, pack=False)


@pytest.mark.parametrize("guide", ["another", "itself", "unconditional"])
@pytest.mark.parametrize("solver", ["heun", "dpmpp2m"])
def test_a_sampling_run_reads_nothing_on_the_host(guide, solver):
    net = network()
    gnet: Any = {
        "another": lambda: network(num_blocks=0),
        "itself": lambda: WithoutLabels(net),
        "unconditional": lambda: network(label_dim=0),
    }[guide]()
    noise, labels = torch.empty(2, 3, 16, 16, device=META), torch.empty(2, 5, device=META)
    churn = {"S_churn": 10} if solver == "heun" else {}
    with NoHostReads():
        images = edm_sampler(
            net, noise, labels, gnet, num_steps=5, guidance=1.5, interval=(0.1, 10), solver=solver, **churn
        )
    assert images.shape == noise.shape


def test_what_detectors_do_to_images_copies_nothing_from_the_host():
    images = torch.empty(2, 3, 32, 24, dtype=torch.uint8, device=META)
    with NoHostReads():
        assert resize_tf1(images, 299).shape == (2, 3, 299, 299)
        assert normalized(images.to(torch.float32)).shape == images.shape


def test_a_read_is_named_by_file_and_line():
    x = torch.empty(2, device=META)
    for wrong, words in (
        (lambda: float(x.sum()), "a value is read on the host"),
        (lambda: bool(x.isfinite().all()), "a value is read on the host"),
        (lambda: x * torch.tensor([1.0, 2.0]).to(META), "CPU tensor"),
    ):
        with (
            NoHostReads(),
            pytest.raises(AssertionError, match=rf"tests.training.sampling.test_host_reads\.py:\d+: .*{words}"),
        ):
            wrong()
