"""What a killed process leaves beside the file that it was about to write."""

import re
from pathlib import Path

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp")  # as dnnlib.atomic names them


def remove_leftovers(dest: Path) -> None:
    """Remove temporary files that were to become `dest`, which nobody may be writing any more."""
    for path in dest.parent.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and match[1] == dest.name and path.is_file():
            path.unlink(missing_ok=True)
