"""The names that scripts for the published code base import: EasyDict, objects by name, times, downloads."""

import importlib
from typing import Any

from dnnlib.download import make_cache_dir_path, open_url

__all__ = [
    "EasyDict", "call_func_by_name", "construct_class_by_name", "format_time", "get_obj_by_name", "make_cache_dir_path",
    "open_url",
]  # fmt: skip


class EasyDict(dict[str, Any]):
    """A dict with `d.key` for `d["key"]`: reading, setting and deleting. Otherwise an ordinary dict."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


def get_obj_by_name(name: str) -> Any:
    """Return the object with the dotted name `name`, importing its module: "torch.nn.Linear".

    For names in the caller's own code: whatever is named is imported, so that names from files are not safe here.
    Raises ImportError for a module that does not exist, AttributeError for an object.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module_name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # Only this name, or a class on the way to it, may be missing: what a module itself needs may not.
            if length == 1 or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError("the loop returns or raises")


def call_func_by_name(*args: Any, func_name: str, **kwargs: Any) -> Any:
    """Call the function with the dotted name `func_name`; see `get_obj_by_name`."""
    return get_obj_by_name(func_name)(*args, **kwargs)


def construct_class_by_name(*args: Any, class_name: str, **kwargs: Any) -> Any:
    """Return an object of the class with the dotted name `class_name`; see `get_obj_by_name`."""
    return call_func_by_name(*args, func_name=class_name, **kwargs)


def format_time(seconds: float) -> str:
    """A duration for people: 5s, 2m 05s, 1h 02m 05s, 3d 01h 02m."""
    total = round(seconds)
    days, hours, minutes, sec = total // 86400, total // 3600 % 24, total // 60 % 60, total % 60
    if days:
        return f"{days}d {hours:02}h {minutes:02}m"
    if total >= 3600:
        return f"{hours}h {minutes:02}m {sec:02}s"
    return f"{minutes}m {sec:02}s" if total >= 60 else f"{sec}s"
