"""Comparisons of two ways in one run, with the ratio printed; none of them is a test."""
