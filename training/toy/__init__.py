"""The 2-D toy example of arXiv 2406.02507: its true distribution, networks, training, sampling and figure."""
