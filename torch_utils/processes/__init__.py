"""The processes of one run: agreement, failures, signals, and who does what."""
