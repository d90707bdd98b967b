"""What one process finds out or fails at, known to all: so that they go on, or end, together."""

from collections.abc import Callable
from typing import TypeVar

from dnnlib.errors import ConfigError
from torch_utils.distributed import World

T = TypeVar("T")


def on_main(world: World, work: Callable[[], T]) -> T:
    """Have the main process do `work`; its result, which must be small, or its ConfigError, in every process."""
    result: list[T] = []
    failure = None
    if world.is_main:
        try:
            result.append(work())
        except ConfigError as error:
            failure = str(error)
            if world.size == 1:
                raise
    result, failure = world.all_gather_objects((result, failure))[0]
    if failure is not None:
        raise ConfigError(failure)
    return result[0]


def everywhere(world: World, work: Callable[[], T]) -> T:
    """Have every process do `work`; this one's result, or in every process the first ConfigError of any of them."""
    result: list[T] = []
    failure = None
    try:
        result.append(work())
    except ConfigError as error:
        failure = str(error)
        if world.size == 1:
            raise
    failures = [each for each in world.all_gather_objects(failure) if each is not None]
    if failures:
        raise ConfigError(failures[0])
    return result[0]
