"""EDM2 and autoguidance: what is built on `training`, and the version."""

__version__ = "0.1.0"
