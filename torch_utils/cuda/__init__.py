"""Compilation, CUDA graphs, streams and transfers. Everything works on a CPU, too."""
