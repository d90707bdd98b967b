"""The machine: what is installed, its rates, and the tests that need a GPU."""

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch

from benchmarks.gpu_check.records import Finding, Row, Setting
from benchmarks.train import matrix_rate, wait
from torch_utils.compiling import missing_compiler
from torch_utils.precision import numerics

ROOT = Path(__file__).parents[2]
_LEAST_SHM = 1e9  # bytes: loaders of img512 hold 128 MB there, NCCL more


def machine(setting: Setting) -> Finding:
    """Report the card, the software and the rates of copies and matrix products; fail for what is missing."""
    device = torch.device(setting.device)
    faults, rows = set_up()
    copy = copy_rate(device, 1 << (16 if setting.tiny else 30))
    rows.append({"what": "copy, TB/s", "is": f"{copy / 1e12:.3g}"})
    rates = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        rates[dtype] = matrix_rate(dtype, device)
        rows.append(
            {"what": f"{str(dtype).removeprefix('torch.')} product, Tflop/s", "is": f"{rates[dtype] / 1e12:.3g}"}
        )
    with numerics(precision="tf32"):
        rows.append({"what": "tf32 product, Tflop/s", "is": f"{matrix_rate(torch.float32, device) / 1e12:.3g}"})
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        rows.insert(
            0, {"what": "card", "is": f"{card.name}, {card.total_memory / 1e9:.0f} GB, sm_{card.major}{card.minor}"}
        )
    value = f"{copy / 1e12:.3g} TB/s, {rates[torch.float16] / 1e12:.3g} Tflop/s in fp16"
    return Finding(passed=not faults, value="; ".join([*faults, value]), rows=tuple(rows))


def set_up() -> tuple[list[str], list[Row]]:
    """Return what is missing for training on a GPU, and a table of what is installed."""
    compiler = missing_compiler(torch.device("cuda"))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    has_triton = importlib.util.find_spec("triton") is not None
    conditions = {
        f"--compile does not work: {compiler}": compiler is None,
        f"no {header}, which --compile needs": header.is_file(),
        "no package triton, which --compile needs": has_triton,
        "less than 1 GB in /dev/shm: start the container with --ipc=host": shm is None or shm >= _LEAST_SHM,
    }
    driver = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.split("\n")[0]
    rows = [
        {"what": "driver", "is": driver},
        {"what": "Python", "is": sys.version.split()[0]},
        {"what": "torch", "is": torch.__version__},
        {"what": "CUDA", "is": str(torch.version.cuda)},
        {"what": "cuDNN", "is": str(torch.backends.cudnn.version())},
        {"what": "C compiler", "is": "-" if compiler else "found"},
        {"what": "/dev/shm, GB free", "is": "-" if shm is None else f"{shm / 1e9:.1f}"},
    ]
    return [fault for fault, is_met in conditions.items() if not is_met], rows


def copy_rate(device: torch.device, size: int) -> float:
    """Return the bytes a second, read and written together, of a copy of `size` bytes on the device."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    dest = torch.empty_like(source)
    times = []
    for _ in range(4):
        wait(device)
        start = time.perf_counter()
        for _ in range(10):
            dest.copy_(source)
        wait(device)
        times.append((time.perf_counter() - start) / 10)
    return 2 * size / min(times)


def gpu_tests(setting: Setting) -> Finding:
    """Run the tests that are marked `gpu`."""
    if importlib.util.find_spec("pytest") is None:
        return Finding(passed=False, value="pytest is not installed: pip install -e '.[dev]'")
    files = gpu_test_files(ROOT / "tests")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
    return judged(done.returncode, done.stdout)


def gpu_test_files(folder: Path) -> list[Path]:
    """Return the files with a test marked `gpu`: importing all others would take longer than these tests."""
    return [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]


def judged(code: int, output: str) -> Finding:
    """Return the finding for pytest's exit code and output: a skipped test is a failure, since it tested nothing."""
    lines = [line for line in output.strip().splitlines() if re.search(r"\d+ \w+", line)]
    summary = lines[-1].strip("= ") if lines else f"pytest ended with code {code}"
    failed = [line.split(" - ")[0].split("::")[-1] for line in output.splitlines() if line.startswith("FAILED ")]
    passed = code == 0 and "skipped" not in summary
    return Finding(passed=passed, value=", ".join([summary, *failed[:5]]))
