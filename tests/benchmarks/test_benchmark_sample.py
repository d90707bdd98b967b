"""The benchmark of sampling and the table of numerics, in their smallest sizes: they run, and compare what they say."""

import dataclasses

import pytest
import torch

from benchmarks import numerics_sampling, sample

CPU = torch.device("cpu")
TINY = {"img_resolution": 8, "img_channels": 4, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_line_of_the_table(precision, capsys):
    case = sample.Case(name="tiny", net=TINY, gnet=TINY, guidance=1.4, batch=2, precision=precision)
    ours, oracle = sample.measure(case, CPU, num_steps=2, repeats=1)
    assert ours > 0 and oracle > 0
    printed = capsys.readouterr().out
    assert f"tiny, batch 2, {precision}" in printed and "convolutions, matrix products and attention" in printed


def test_images_that_disagree_are_no_result(monkeypatch):
    monkeypatch.setattr(sample, "TOLERANCE", {"bf16": 1e-6})
    case = sample.Case(name="tiny", net=TINY, batch=2, precision="bf16")
    with pytest.raises(AssertionError, match="differ by"):
        sample.measure(case, CPU, num_steps=2, repeats=1)


def test_with_a_decoder():
    pytest.importorskip("diffusers")
    case = sample.Case(name="tiny", net=TINY, batch=2, precision="fp32", decoder=True)
    ways = sample.Ways(case, CPU, num_steps=2, decoder_width=32)
    assert ways.ours().shape == (2, 3, 64, 64) and ways.difference() < 1e-3


def test_the_cases_for_a_gpu_are_the_published_shapes():
    cases = sample.cases_of(torch.device("cuda"), None)
    assert {(case.precision, case.batch) for case in cases} == {("fp16", 32), ("fp16", 1)}
    for case in cases:
        arguments = dataclasses.asdict(case)["net"]
        assert (arguments["model_channels"], arguments["img_resolution"], arguments["img_channels"]) == (192, 64, 4)
    assert [case.gnet is None for case in cases[:2]] == [True, False]


def test_the_table_of_numerics():
    lines = list(numerics_sampling.table(2, CPU, False, num_steps=2))
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]] for line in lines[2:]}
    assert set(rows) == {"fp32", "bf16", "fp32, batches of 1"}
    assert float(rows["fp32"][1]) < 0.01 < float(rows["bf16"][1])
    assert rows["fp32"] == rows["fp32, batches of 1"]
