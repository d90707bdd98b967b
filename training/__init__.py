"""EDM2 and autoguidance: networks, loss, training, sampling, snapshots, metrics."""
