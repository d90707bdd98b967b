"""sessions.jsonl: when and how the sessions of a run began, a line for each, so that its report can tell."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import ConfigError, reason_of
from torch_utils.distributed import World

SESSIONS_FILE = "sessions.jsonl"


def record_session(folder: Path, *, nimg: int, command: str, world: World) -> None:
    """Append a line about the session that begins at `nimg` images; `command` as one would type it again."""
    device = world.device
    entry: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "nimg": nimg,
        "command": command,
        "processes": world.size,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    try:
        with open(folder / SESSIONS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder / SESSIONS_FILE} cannot be written: {reason_of(error)}") from None
