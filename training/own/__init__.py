"""Networks, losses and data sets of the user's own in the place of ours (docs/extending.md)."""
