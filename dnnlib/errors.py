"""The one exception that users see as a single line."""


class ConfigError(ValueError):
    """What the user asked for or gave cannot work: options, files, data.

    The message says what is wrong, with the values, and what would be right. Scripts print it in one line and exit
    with code 2 (`dnnlib.cli.main`); programs that use the modules directly catch it as a ValueError.
    """
