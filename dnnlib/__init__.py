"""What the code base needs beside torch: configuration values, errors, files, downloads, the command line."""

from dnnlib import util
from dnnlib.easydict import EasyDict

__all__ = ["EasyDict", "util"]
