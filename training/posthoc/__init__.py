"""Networks of any EMA length from a run's snapshots (arXiv 2312.02696, Section 3)."""

MAX_FIT = 0.1
"""Largest relative L2 error of a reconstructed profile that stands for its EMA length. Beyond it, the snapshots are too
far apart."""
