"""What torch.compile needs from the machine: a compiler, a folder for its code, a name for the user."""

import getpass
import os
import shlex
import shutil
import stat
import tempfile
import warnings
from pathlib import Path

import torch

from dnnlib.util import make_cache_dir_path

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_ADVICE = "install one (apt-get install gcc libc6-dev python3-dev) or name it in the environment variable"


def keep_compiled_code() -> None:
    """Prepare this process for torch.compile; call it before the compiler is first imported.

    Later runs find compiled code in `compiled_code_dir`. A user id without a name, as in containers, gets one: the
    compiler asks for it when it is imported (PyTorch before 2.13). Its advice to turn TF32 on is left out, because
    --precision=tf32 does that.
    """
    try:
        getpass.getuser()
    except (ImportError, KeyError, OSError):
        os.environ["USER"] = os.environ["LOGNAME"] = _user_id()
    os.environ.setdefault(_FOLDER, compiled_code_dir())
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)


def compiled_code_dir() -> str:
    """Return the folder for compiled code: $TORCHINDUCTOR_CACHE_DIR, $DNNLIB_CACHE_DIR/compiled, or a temporary one.

    The last is the user's own on a disk of this machine ($TMPDIR, else /tmp): a home folder may be a slow network file
    system, which all processes of a cluster would write to at once.
    """
    if os.environ.get(_FOLDER):
        return os.environ[_FOLDER]
    if os.environ.get("DNNLIB_CACHE_DIR"):
        return make_cache_dir_path("compiled")
    folder = Path(tempfile.gettempdir(), f"edm2-compiled-{_user_id()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_ours(folder):
            return str(folder)
    except OSError:
        pass
    return tempfile.mkdtemp(prefix="edm2-compiled-")  # what others could write to would be run


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks to build code for `device`, as a clause with the remedy, or None."""
    variable, names = ("CC", ("gcc", "clang", "cl")) if device.type == "cuda" else ("CXX", ("g++", "clang++", "cl"))
    chosen = shlex.split(os.environ.get(variable, ""), posix=os.name == "posix")
    if chosen:
        found = shutil.which(chosen[0]) is not None
        return None if found else f"{variable}={os.environ[variable]} does not exist"
    if any(shutil.which(name) for name in names):
        return None
    return f"no compiler was found ({', '.join(names)}): {_ADVICE} {variable}"


def _user_id() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"


def _is_ours(folder: Path) -> bool:
    """Return whether nobody else can write to `folder`. Windows has a temporary folder for each user."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.lstat()
    shared = stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not shared
