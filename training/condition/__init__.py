"""Networks conditioned on a second image: a smaller version, or the image with a part hidden."""
