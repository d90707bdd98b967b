"""Where things are that tests read, and the type of a golden file's content."""

from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
GOLDEN_DIR = ROOT / "tests" / "golden"

Golden = tuple[dict[str, torch.Tensor], dict[str, str]]
