"""Image files: decoding of all formats, PNG encoding and files, contact sheets."""
