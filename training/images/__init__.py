"""Image files: decoding, PNG in and out, contact sheets."""
