"""The one exception that users see as a single line."""


class ConfigError(ValueError):
    """What the user asked for or gave cannot work: options, files, data.

    The message says what is wrong, with the values, and what would be right. Scripts print it in one line and exit
    with code 2 (`dnnlib.cli.main`); programs that use the modules directly catch it as a ValueError.

    Among several processes, every one that was given the same command makes the same mistake, and only the first one
    on each machine speaks; `only_here` says that the error is this process's alone, or that it is to speak for all.
    """

    only_here = False


class LostContactError(RuntimeError):
    """Another process of the run is gone or does not answer; nobody knows why. One line, exit code 1."""
