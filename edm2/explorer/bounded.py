"""A table that holds what was used last, within a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Bounded(Generic[K, V]):
    """The values used last, in `max_bytes` at most; from any thread. A larger value is not kept at all."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()  # the one used last is the last one
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value, which counts as used now; None where it is not here."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: K, value: V, num_bytes: int) -> bool:
        """Keep `value`, and let go of what has not been used for longest; whether it is kept."""
        with self._lock:
            self._remove(key)
            if num_bytes > self.max_bytes:
                return False
            while self._num_bytes + num_bytes > self.max_bytes:
                self._remove(next(iter(self._values)))
            self._values[key] = value, num_bytes
            self._num_bytes += num_bytes
            return True

    def _remove(self, key: K) -> None:
        self._num_bytes -= self._values.pop(key, (None, 0))[1]
