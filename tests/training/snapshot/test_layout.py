"""Networks laid out without values: as on the meta device, and without PyTorch's compiler being loaded."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.paths import GOLDEN_DIR
from training.networks_edm2 import Precond
from training.presets import REPOSITORY_DIR
from training.snapshot.parts import WithoutValues
from training.snapshot.safetensors_file import read_safetensors

SMALL = {"model_channels": 8, "num_blocks": 1, "channels_per_head": 8}


@pytest.mark.parametrize(
    "arguments",
    [
        {"img_resolution": 16, "img_channels": 3, "label_dim": 5, "channel_mult": [1, 2], **SMALL},
        {"img_resolution": 8, "img_channels": 4, "label_dim": 0, "channel_mult": [1], "logvar_channels": 6, **SMALL},
    ],
)
def test_names_shapes_and_types_are_those_of_a_real_network(arguments: dict[str, Any]):
    real = Precond(**arguments)
    with WithoutValues():
        laid_out = Precond(**arguments)
    described = [
        {
            name: (value.shape, value.dtype, value.requires_grad)
            for name, value in net.state_dict(keep_vars=True).items()
        }
        for net in (real, laid_out)
    ]
    assert described[0] == described[1]
    assert all(value.is_meta for value in laid_out.state_dict().values())
    assert torch.ones(1).device.type == "cpu"  # the context is over


def test_other_operations_go_the_ordinary_way():
    with WithoutValues():
        layer = torch.nn.Linear(3, 2)
        scaled = 2 * torch.ones(2, dtype=torch.float64) * 3
        product = torch.ones(2, 3) * torch.ones(3)
        ones = torch.full([2], 7)
    assert layer.weight.is_meta and layer.weight.shape == (2, 3)
    assert scaled.is_meta and (scaled.shape, scaled.dtype) == ((2,), torch.float64)
    assert product.is_meta and product.shape == (2, 3)
    assert ones.is_meta and ones.dtype == torch.int64


def test_a_file_is_read_straight_to_the_device():
    # The meta device stands for a GPU: tensors that had been put together on the CPU would not be without values.
    snapshot = read_safetensors(REPOSITORY_DIR / "models" / "fashion.safetensors", device="meta")
    assert all(value.is_meta for value in snapshot.net.state_dict().values())


def test_a_network_does_not_change_with_its_file(tmp_path: Path):
    path = tmp_path / "net.safetensors"
    shutil.copy(REPOSITORY_DIR / "models" / "fashion.safetensors", path)
    net = read_safetensors(path).net
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with open(path, "r+b") as file:
        file.seek(-(1 << 16), 2)
        file.write(b"\x01" * (1 << 16))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_loading_a_network_does_not_load_the_compiler():
    files = [str(GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"), str(REPOSITORY_DIR / "models" / "fashion.safetensors")]
    program = (
        "import sys, torch\nfrom training.snapshot import load_snapshot\nbefore = set(sys.modules)\n"
        f"for file in {files!r}: load_snapshot(file)\n"
        "print(sorted({'torch._dynamo', 'sympy'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY_DIR, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
