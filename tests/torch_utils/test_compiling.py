"""What torch.compile finds on a machine: compilers, folders and users of all sorts."""

import getpass
import os
import shutil
import stat
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from torch_utils import compiling, cuda
from torch_utils.compiling import compiled_code_dir, keep_compiled_code, missing_compiler

GPU, CPU = torch.device("cuda"), torch.device("cpu")
NAMES = ("TORCHINDUCTOR_CACHE_DIR", "DNNLIB_CACHE_DIR", "CC", "CXX", "USER", "LOGNAME", "LNAME", "USERNAME")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine without settings, and with an empty temporary folder."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the test sets is undone, too
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with warnings.catch_warnings():
        yield


def machine_with(monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in programs else None)


@pytest.mark.parametrize("program", ["gcc", "clang", "cl"])
def test_a_gpu_needs_any_c_compiler(program: str, monkeypatch: pytest.MonkeyPatch):
    machine_with(monkeypatch, program)
    assert missing_compiler(GPU) is None
    machine_with(monkeypatch)
    assert "no compiler was found (gcc, clang, cl): install one" in (missing_compiler(GPU) or "")
    assert "(g++, clang++, cl)" in (missing_compiler(CPU) or "")


def test_a_compiler_in_the_environment_counts_alone(monkeypatch: pytest.MonkeyPatch):
    machine_with(monkeypatch, "icc", "gcc")
    monkeypatch.setenv("CC", "icc -O1")
    assert missing_compiler(GPU) is None
    monkeypatch.setenv("CC", "nowhere/cc")
    assert missing_compiler(GPU) == "CC=nowhere/cc does not exist"


def test_without_a_compiler_a_function_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch):
    machine_with(monkeypatch)
    told: list[str] = []
    call = cuda.compiled(lambda x: x + 1, told.append)
    for num in (2, 3, 2):
        assert torch.equal(call(torch.ones(num)), torch.full([num], 2.0))
    (line,) = told
    assert line.startswith("Not compiled, and slower: no compiler was found")


def test_settings_decide_about_the_folder_before_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert Path(compiled_code_dir()).parent == tmp_path
    monkeypatch.setenv("DNNLIB_CACHE_DIR", "mine")
    assert Path(compiled_code_dir()) == Path("mine", "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "there")
    keep_compiled_code()
    assert compiled_code_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"] == "there"


def test_a_folder_that_others_can_write_to_is_not_used():
    folder = Path(compiled_code_dir())
    assert Path(compiled_code_dir()) == folder
    if os.name == "posix":
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o777)
        assert Path(compiled_code_dir()) != folder


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch):
    def getuser() -> str:
        if "USER" not in os.environ:
            raise KeyError("getpwuid(): uid not found: 1234")
        return os.environ["USER"]

    monkeypatch.setattr(getpass, "getuser", getuser)
    keep_compiled_code()
    assert getpass.getuser() == os.environ["LOGNAME"] == compiling._user_id()


def test_the_advice_to_turn_tf32_on_is_not_printed():
    keep_compiled_code()
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("TensorFloat32 tensor cores for float32 products available but not enabled.", stacklevel=1)
    assert not caught
