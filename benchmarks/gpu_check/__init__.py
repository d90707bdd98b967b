"""Check a machine with NVIDIA GPUs: correctness, speed and set-up, each check bounded in time. See docs/gpu.md."""
