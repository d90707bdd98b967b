"""The click options of the scripts."""
