"""Text files that grow by whole lines."""

from pathlib import Path

from dnnlib.disk import DiskFull, write_error


class LineFile:
    """Appends lines to the file `path`: whole ones, or none where the disk is full.

    With `patient`, what finds no room is kept, and written with the next line that does; otherwise DiskFull is raised.
    Other failures raise ConfigError.
    """

    def __init__(self, path: Path, *, patient: bool = False) -> None:
        self.path = path
        self._patient = patient
        self._kept = b""

    def append(self, text: str) -> None:
        """Write `text` and a line end."""
        self._kept += (text + "\n").encode("utf-8")
        try:
            with open(self.path, "ab", buffering=0) as file:
                start = file.tell()
                try:
                    written = file.write(self._kept)
                    if written < len(self._kept):  # the rest finds no room, which the next attempt tells
                        file.write(self._kept[written:])
                except OSError:
                    file.truncate(start)
                    raise
        except OSError as error:
            failure = write_error(self.path, error)
            if not (self._patient and isinstance(failure, DiskFull)):
                raise failure from None
        else:
            self._kept = b""
