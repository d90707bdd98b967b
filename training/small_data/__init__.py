"""What `--preset=small` chooses for a small data set, and what the run will take."""
