"""Networks that see a second image: what it is (a smaller version, or the image with a part hidden), and from where."""
