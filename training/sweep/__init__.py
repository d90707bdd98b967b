"""Scores over EMA lengths and guidance weights."""
