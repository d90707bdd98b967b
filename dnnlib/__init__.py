"""General helpers without torch: errors, files, downloads, text, the command line."""

from dnnlib import util
from dnnlib.util import EasyDict

__all__ = ["EasyDict", "util"]
