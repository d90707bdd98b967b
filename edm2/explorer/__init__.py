"""The page of `explore.py`: everything from settings to the web server."""
