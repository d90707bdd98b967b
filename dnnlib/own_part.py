"""Parts of the user's own that take the place of ours: imported by the name that the user gave, and by no other."""

import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dnnlib.errors import ConfigError, one_line

_PAGE = "docs/extending.md"  # has the contracts of all parts


@dataclass(frozen=True, kw_only=True)
class OwnPart:
    """A class or function that the user has written, as given to an option: --network=my_module:MyClass.

    Its errors are ConfigErrors of one line, which begin with the option and end with the page of the contracts.
    """

    option: str
    name: str  # module:Name, as Python imports it; the current folder is searched first

    def load(self) -> Any:
        """Import the module, which runs it, and return the class or function. Raises ConfigError."""
        module_name, colon, attribute = self.name.partition(":")
        if not (colon and attribute.isidentifier() and re.fullmatch(r"\w+(\.\w+)*", module_name)):
            raise self.error("is not a name; write module:Name, as in my_module:MyClass for my_module.py")
        folder = os.getcwd()
        if folder not in sys.path:  # and not taken away again: modules may import others later, and workers all of them
            sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # a script that is imported may end the program
            if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
                raise self.error(
                    f"is not found: {folder} has no module {error.name!r}, and none is installed"
                ) from None
            raise self._failure("importing it", error) from error
        found = getattr(module, attribute, None)
        if not callable(found):
            own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            close = difflib.get_close_matches(attribute, own, n=1)
            hint = f"; did you mean {module_name}:{close[0]}?" if close else ""
            raise self.error(f"is not found: {module_name} has no class or function {attribute!r}{hint}")
        return found

    def make(self, *args: Any, **kwargs: Any) -> Any:
        """Return an object of the class. Raises ConfigError."""
        cls = self.load()
        shown = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        with self.calls(f"{cls.__name__}({shown})"):
            return cls(*args, **kwargs)

    @contextlib.contextmanager
    def calls(self, call: str) -> Iterator[None]:
        """Turn whatever the user's code raises in this block, which makes the call `call`, into a ConfigError."""
        try:
            yield
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failure(call, error) from error

    def error(self, text: str) -> ConfigError:
        """Return the error that says `text` about this part."""
        return ConfigError(f"--{self.option}={self.name} {text} ({_PAGE})")

    def _failure(self, call: str, error: BaseException) -> ConfigError:
        return self.error(f"does not fit: {call} raises {type(error).__name__}: {one_line(error)}")
