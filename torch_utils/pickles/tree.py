"""Whether what a pickle holds is a tree that can be walked and printed: of bounded depth and size, without cycles."""

from collections.abc import Collection
from typing import Any

from torch_utils.pickles.machine import MAX_OPCODES, Refused, StoredObject

_MAX_DEPTH = 100  # of containers in one another; networks have about 20
_MAX_SIZE = 4 * MAX_OPCODES  # of the tree in values, counting what is shared at each of its places
_OPEN = (0, 0)
_CONTAINERS = (list, tuple, dict, StoredObject)


def require_tree(root: Any) -> None:
    """Raise Refused unless `root` is a tree of bounded depth and size, with no container inside itself.

    Shared values count at each place: a list of twice a list of twice a list is endless for whoever walks or prints it.
    """
    measured: dict[int, tuple[int, int]] = {}  # size and depth of each container; _OPEN while inside of it
    num_open, waiting = 0, [root]
    while waiting:
        current = waiting[-1]
        values = _inside(current)
        inside = [value for value in values if isinstance(value, _CONTAINERS)]
        if id(current) not in measured:
            measured[id(current)] = _OPEN
            num_open += 1
            if num_open > _MAX_DEPTH:
                raise Refused(f"its values are nested more than {_MAX_DEPTH} deep")
            if any(measured.get(id(value)) == _OPEN for value in inside):
                raise Refused("it holds a value that is inside itself")
            waiting += [value for value in inside if id(value) not in measured]
            continue
        waiting.pop()
        if measured[id(current)] == _OPEN:
            num_open -= 1
            known = [measured[id(value)] for value in inside]
            texts = sum(len(value) for value in values if type(value) in (str, bytes))
            size = 1 + len(values) + texts // 64 + sum(size for size, _ in known)
            depth = 1 + max((depth for _, depth in known), default=0)
            if size > _MAX_SIZE or depth > _MAX_DEPTH:
                raise Refused("its values are nested too deep, or shared so often that there is no end to them")
            measured[id(current)] = size, depth


def _inside(value: Any) -> Collection[Any]:
    """The values in a container; keys are text and numbers."""
    if isinstance(value, StoredObject):
        return value.state.values()
    if isinstance(value, dict):
        return value.values()
    return value if type(value) in (list, tuple) else ()
