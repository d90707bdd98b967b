"""The one exception that users see as a single line."""


class ConfigError(ValueError):
    """What the user asked for or gave cannot work: options, files, data.

    The message says what is wrong, with the values, and what would be right. Scripts print it in one line and exit
    with code 2 (`dnnlib.cli.main`); programs that use the modules directly catch it as a ValueError.

    It may quote names out of files, which can be anything: as text it is one line that can be printed, with spaces for
    line breaks and question marks for other signs that have no face.

    Among several processes, every one that was given the same command makes the same mistake, and only the first one
    on each machine speaks; `only_here` says that the error is this process's alone, or that it is to speak for all.
    """

    only_here = False

    def __str__(self) -> str:
        text = " ".join(super().__str__().splitlines())
        return text if text.isprintable() else "".join(sign if sign.isprintable() else "?" for sign in text)


class LostContactError(RuntimeError):
    """Another process of the run is gone or does not answer; nobody knows why. One line, exit code 1."""


def reason_of(error: BaseException) -> str:
    """Return why `error` happened, without the errno and file names that an OSError adds to its text."""
    return getattr(error, "strerror", None) or str(error)
