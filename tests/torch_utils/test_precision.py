"""Number formats by precision and device, and switches that are restored."""

import pytest
import torch

from torch_utils.precision import compute_dtype, fastest_precision, numerics, precision_note
from torch_utils.precision_names import PRECISIONS


@pytest.mark.parametrize(
    ("precision", "cpu", "cuda"),
    [
        ("fp32", torch.float32, torch.float32),
        ("tf32", torch.float32, torch.float32),
        ("fp16", torch.float32, torch.float16),
        ("bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_type_of_activations(precision, cpu, cuda):
    assert precision in PRECISIONS
    assert compute_dtype(precision, torch.device("cpu")) == cpu
    assert compute_dtype(precision, torch.device("cuda")) == cuda


def test_tf32_is_on_for_its_precision_alone_and_is_put_back():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    for precision in PRECISIONS:
        with numerics(precision=precision):
            assert matmul.allow_tf32 == cudnn.allow_tf32 == (precision == "tf32")
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def test_a_precision_that_the_device_does_not_have_is_said(monkeypatch):
    cpu = torch.device("cpu")
    assert precision_note("fp32", cpu) is None
    assert "float32" in precision_note("fp16", cpu)
    assert "Ampere" in precision_note("tf32", cpu)
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda value=supported: value, raising=False)
        assert (precision_note("bf16", cpu) is None) == supported


def test_the_fastest_format_is_that_of_the_device(monkeypatch):
    for supported, fastest in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda value=supported: value, raising=False)
        assert fastest_precision(torch.device("cpu"))[0] == fastest
    for capability, fastest in (((9, 0), "fp16"), ((7, 0), "fp16"), ((6, 1), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        assert fastest_precision(torch.device("cuda", 0))[0] == fastest
    assert fastest_precision(torch.device("mps"))[0] == "fp32"
