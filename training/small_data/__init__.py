"""The choices of `--preset=small` for a small data set, and an estimate of the run's time and memory."""
