"""Exceptions that users see as a single line, and the text of errors."""


class ConfigError(ValueError):
    """A mistake of the user: options, files or data that cannot work.

    The message says what is wrong, with the values, and what would be right. Scripts print it in one line and exit
    with code 2 (`dnnlib.cli.main`); programs that use the modules catch it as a ValueError.

    The message may quote names out of files, which can be anything. Its text is therefore one printable line: line
    breaks become spaces, other unprintable characters question marks.

    Several processes with the same command make the same mistake, and only the first one on each machine prints it.
    `only_here` is set if the error concerns this process alone, or if this process speaks for all.
    """

    only_here = False

    def __str__(self) -> str:
        text = " ".join(super().__str__().splitlines())
        return text if text.isprintable() else "".join(sign if sign.isprintable() else "?" for sign in text)


class LostContactError(RuntimeError):
    """Another process of the run is gone or does not answer, for an unknown reason. One line, exit code 1."""


def reason_of(error: BaseException) -> str:
    """Return why `error` happened, without the errno and file names that an OSError adds to its text."""
    return getattr(error, "strerror", None) or str(error)


def one_line(error: BaseException) -> str:
    """Return the text of `error`, which may quote files, as one printable line of 400 characters; else its class."""
    text = " ".join(str(error).split())[:400] or type(error).__name__
    return "".join(sign if sign.isprintable() else "?" for sign in text)
