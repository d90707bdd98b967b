"""A training run from inside: state, processes, files, checkpoints, watching."""
