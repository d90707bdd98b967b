"""Checkpoints of one file or of many, their digests, and copies in host memory to write them from."""
