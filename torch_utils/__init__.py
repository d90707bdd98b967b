"""Helpers around torch that know nothing of diffusion: processes, precision, checkpoints, stored objects."""
