"""The report of a training run: one self-contained HTML file."""
