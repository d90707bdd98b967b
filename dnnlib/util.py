"""The names that scripts for the published code base import: EasyDict, open_url, make_cache_dir_path."""

from dnnlib.download import make_cache_dir_path, open_url
from dnnlib.easydict import EasyDict

__all__ = ["EasyDict", "make_cache_dir_path", "open_url"]
