"""Conversion of images to data sets, and of data sets to latents. Worker processes import neither torch nor click."""
