"""Networks of any EMA length from a run's snapshots (arXiv 2312.02696, Section 3)."""
