"""Scores of generated images: Fréchet distances, KID, Inception Score, precision, recall, density and coverage."""
