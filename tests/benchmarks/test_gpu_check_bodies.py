"""The checks of benchmarks/gpu_check at tiny sizes on a CPU: their code runs, and sees what it is there to see."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import numerics_training
from benchmarks.gpu_check import correctness, machine, programs, several, steps
from benchmarks.gpu_check.philox import class_of_seed, noise_of_seed
from benchmarks.gpu_check.records import Setting
from benchmarks.sample import IMG512_S
from training.networks_edm2 import Precond

TINY = Setting(device="cpu", seconds=60, tiny=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrix products, and half precision on a CPU, take longer than all else here."""
    for module in (machine, steps):
        monkeypatch.setattr(module, "matrix_rate", lambda dtype, device: 1e12)
    monkeypatch.setattr(numerics_training, "MODES", {"fp32": torch.float32, "bf16": torch.bfloat16})


def of_one_value(levels: dict[str, int]) -> object:
    """Stands in for `images_of`: images of one gray level, which depends on the way they are made."""

    def images(prepare: object, num: int, device: torch.device, **options: object) -> np.ndarray:
        way = "plain" if prepare is correctness.in_float32 else "single" if "max_batch_size" in options else "usual"
        return np.full([num, 1, 2, 2], 100 + levels.get(way, 0))

    return images


def test_the_machine_is_described():
    finding = machine.machine(TINY)
    assert {"torch", "C compiler", "copy, TB/s", "float16 product, Tflop/s"} <= {row["what"] for row in finding.rows}


def test_what_training_needs_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: "no-folder")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=64e6))
    faults = "; ".join(machine.set_up()[0])
    assert "--compile does not work" in faults and "Python.h" in faults
    assert ("--ipc=host" in faults) == Path("/dev/shm").is_dir()


def test_the_files_with_gpu_tests_are_found():
    names = {path.name for path in machine.gpu_test_files(ROOT / "tests")}
    assert {"test_static_call.py", "test_inference_network.py"} <= names and "test_phema.py" not in names


@pytest.mark.parametrize(
    ("code", "output", "passed", "value"),
    [
        (0, "....\n12 passed, 300 deselected in 9.87s\n", True, "12 passed, 300 deselected in 9.87s"),
        (0, "= 3 passed, 1 skipped in 1s =", False, "3 passed, 1 skipped in 1s"),
        (1, "FAILED tests/a.py::test_b - x\n1 failed, 1 passed in 2s", False, "1 failed, 1 passed in 2s, test_b"),
        (4, "", False, "pytest ended with code 4"),
    ],
)
def test_pytest_is_judged(code: int, output: str, passed: bool, value: str):
    finding = machine.judged(code, output)
    assert (finding.passed, finding.value) == (passed, value)


def test_noise_of_a_cuda_device_by_hand():
    # As PyTorch prints it on CUDA devices for torch.manual_seed(0) and (42).
    assert np.allclose(noise_of_seed(0, 4), [-0.9247, -0.4253, -2.6438, 0.1452], atol=1e-4)
    assert np.allclose(noise_of_seed(42, 4), [0.1940, 2.1614, -0.1721, 0.8491], atol=1e-4)
    noise = noise_of_seed(7, 1 << 16)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.01
    assert len({class_of_seed(seed, 1000) for seed in range(100)}) > 80


@pytest.mark.parametrize(("way", "level", "passed"), [("usual", 0, True), ("plain", 1, True), ("single", 2, False)])
def test_images_may_differ_by_one_gray_level(way: str, level: int, passed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(correctness, "images_of", of_one_value({way: level}))
    finding = correctness.seeds_and_images(TINY)
    assert finding.passed is passed and finding.value.endswith(f"images to {level} gray levels")


@pytest.mark.parametrize("body", [correctness.graphs_at_once, correctness.host_waits])
def test_results_are_right_on_a_cpu(body):
    finding = body(TINY)
    assert finding.passed, finding.value


def test_a_replay_with_another_result_is_seen(monkeypatch: pytest.MonkeyPatch):
    results = iter(range(100))

    class Drifting(correctness.StaticCall):
        def __call__(self, *inputs):
            return super().__call__(*inputs) + next(results)

    monkeypatch.setattr(correctness, "StaticCall", Drifting)
    finding = correctness.graphs_at_once(TINY)
    assert finding.passed is False and finding.value.startswith("6 of 6 replays differ")


def test_a_network_that_stays_in_memory_is_seen(monkeypatch: pytest.MonkeyPatch):
    kept = []

    class Keeping(correctness.PrepareNetwork):
        def __call__(self, net, device):
            kept.append(super().__call__(net, device))
            return kept[-1]

    monkeypatch.setattr(correctness, "PrepareNetwork", Keeping)
    finding = correctness.dropped_networks(TINY)
    assert finding.passed is False and finding.value.startswith("4 of 4")


def test_number_formats_are_compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(correctness, "images_of", of_one_value({}))
    finding = correctness.number_formats(TINY)
    assert finding.passed, finding.value
    assert [row["format"] for row in finding.rows] == ["fp32", "bf16"]
    monkeypatch.setattr(correctness, "_GRADIENT_BOUNDS", {"fp32": 1e-3, "bf16": 1e-3})
    finding = correctness.number_formats(TINY)
    assert finding.passed is False and finding.value.startswith("bf16: gradient off by")


def test_attention_kernels_are_compared_with_float64():
    finding = correctness.attention_kernels(TINY)
    (row,) = finding.rows
    assert float(row["pinned"].split(", ")[1]) < 1e-4 and row["math"] != "-"


@pytest.mark.parametrize("body", [steps.convolutions, programs.detectors])
def test_speeds_are_measured(body):
    finding = body(TINY)
    assert finding.value and finding.rows


def test_sampling_is_timed_against_the_oracle():
    one, two = programs.sampling(TINY)
    assert two.passed is None and two.rows[:1] == one.rows and [row["images"] for row in two.rows] == ["2", "1"]
    assert all(float(row["images differ by"]) < 1e-3 for row in two.rows)


@pytest.mark.parametrize(("ratio", "passed"), [(0.98, True), (0.9, False)])
def test_the_loop_has_a_bound(ratio: float, passed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(programs, "loop_against_step", lambda precision, num_steps, rounds, compiled: ratio)
    assert programs.loop(TINY).passed is passed


def test_a_step_is_measured_and_its_gradients_are_equal_twice():
    finding = steps.compiled_step(TINY)
    found = {row["what"]: row["is"] for row in finding.rows}
    assert finding.passed and found["weights whose gradient differs the second time"] == "0"
    assert int(found["kernels a step"]) > 100


def test_training_is_timed_against_the_oracle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    *_, finding = steps.training(TINY)
    assert [(row["way"], row["images"]) for row in finding.rows] == [
        ("ours, fp16", "1"),
        ("plain, float32", "1"),
    ]
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_timed():
    finding = programs.checkpoint(TINY)
    assert finding.passed is None and finding.value.startswith("pause ")


def test_the_convolutions_of_img512_s_are_the_papers():
    with torch.device("meta"):
        shapes = steps.conv_shapes(Precond(**IMG512_S))
    # 100.2 billion multiply-adds an image, and a third of the first level's 3x3 in one shape.
    assert sum(i * o * k * k * r * r * num for i, o, k, r, num in shapes) == 100_225_253_376
    assert shapes[0][:4] == (192, 192, 3, 64)


def test_one_process_trains_for_the_comparison_of_several():
    found = several.train_together("one", "cpu", True)
    assert found["apart"] == 0 and found["norm"] > 0 and np.isfinite(found["loss"])
