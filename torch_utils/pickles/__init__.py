"""Pickle files read as data: a closed machine that can run nothing."""
