"""The 2-D toy example of arXiv 2406.02507: true distribution, networks, training, sampling and figure."""
