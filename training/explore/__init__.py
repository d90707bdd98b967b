"""Exploring a model: settings, networks kept at hand, pictures as they come into being, and the commands for them."""
