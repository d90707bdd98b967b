"""The training benchmark at a size that takes no time: it checks what it times, and counts what is kept in memory."""

from dataclasses import replace

import pytest
import torch

from benchmarks import train
from tests.helpers.tiny import NETWORK

TINY = train.Shape(name="tiny", network=NETWORK, resolution=8, channels=3, label_dim=3, batch=4)
CPU = torch.device("cpu")


def test_it_compares_prints_and_counts(monkeypatch, capsys):
    monkeypatch.setattr(train, "matrix_rate", lambda dtype, device: 1e12)
    train.measure(TINY, ("fp32", "bf16"), CPU, compiled=False, recompute=True, num_steps=1, repeats=1, profiled=True)
    text = capsys.readouterr().out
    assert text.count("Agrees with the oracle") == 4
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == [
        "plain, float32",
        "ours, fp32",
        "ours, fp32, recompute",
        "ours, bf16",
        "ours, bf16, recompute",
    ]
    memory = [float(row[-2]) for row in rows]
    assert memory[0] == 1 > memory[1] > memory[2]
    assert "Share of matrix time" in text


def test_the_rate_of_products_is_measured(monkeypatch):
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size: randn(*(min(n, 8) for n in size)))
    for dtype in (torch.float32, torch.bfloat16):
        assert 0 < train.matrix_rate(dtype, CPU) < float("inf")


def test_a_wrong_result_is_not_timed(monkeypatch):
    plain_loss = train.plain_loss
    monkeypatch.setattr(train, "plain_loss", lambda *args: 1.01 * plain_loss(*args))
    state = train.our_state(TINY, "fp32", CPU, compile=False)
    with pytest.raises(AssertionError, match="off by"):
        train.check(TINY, state, torch.float32, 1e-3)


def test_saved_bytes_counts_each_tensor_once_and_no_parameter():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    x = torch.ones(4, 8, requires_grad=True)

    def step() -> None:
        y = x @ weight  # keeps x and the parameter
        (y * y).sum()  # keeps y, twice

    assert train.saved_bytes(step) == 2 * 4 * 8 * 4


def test_a_batch_of_another_size_is_another_shape():
    assert replace(train.SHAPES["s"], batch=8).batch == 8 and train.SHAPES["s"].batch == 64
