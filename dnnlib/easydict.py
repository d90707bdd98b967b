"""A dictionary whose entries are attributes as well."""

from typing import Any


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


# The name under which network files store it (`dnnlib.util.EasyDict`).
EasyDict.__module__ = "dnnlib.util"
