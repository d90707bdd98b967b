"""The names that scripts for the published code base import: EasyDict, open_url, make_cache_dir_path."""

from typing import Any

from dnnlib.download import make_cache_dir_path, open_url

__all__ = ["EasyDict", "make_cache_dir_path", "open_url"]


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
