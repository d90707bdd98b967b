"""Operations that a piece of code sends to the device, as PyTorch's dispatcher sees them."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# These make memory or another view of it; nothing is launched.
_FREE = ("aten.empty", "aten.detach", "aten.alias", "aten.lift_fresh", "aten._unsafe_view", "profiler.")


class Launches(TorchDispatchMode):
    """Counts operations that launch at least one kernel: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not func.is_view and not name.startswith(_FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
