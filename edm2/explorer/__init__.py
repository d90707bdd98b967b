"""The page of explore.py: Gradio, and nothing that computes. It needs the extra `explore`."""
