"""Everything that an explorer of models can be asked for, with what was shown last at hand."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edm2.explorer.bounded import Bounded
from edm2.explorer.grids import BATCH, Film, Grid, Progress, generate_film, generate_grid, image_of
from edm2.explorer.networks import Loading, Networks, stamp
from edm2.explorer.setting import Setting

_FINISHED_BYTES = 256 << 20

Record = Loading | Progress | Grid | Film


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """What there is of two settings: the newest record of each, None where it is not begun."""

    a: Record | None
    b: Record | None


class Explorer:
    """Grids, pairs of grids and film strips of settings; what was finished is not computed twice.

    Each request is a generator that computes while it is asked, and can be left at any time. From any thread, but one
    at a time: networks on a GPU have buffers of their own.
    """

    def __init__(self, networks: Networks, *, batch: int = BATCH) -> None:
        self.networks = networks
        self.batch = batch
        self._finished: Bounded[Any, Grid | Film] = Bounded(_FINISHED_BYTES)

    def grid(self, setting: Setting) -> Iterator[Loading | Progress | Grid]:
        """See `generate_grid`."""
        key = (setting, self._stamps(setting))
        found = self._finished.get(key)
        if isinstance(found, Grid):
            yield found
            return
        for record in generate_grid(setting, self.networks, batch=self.batch):
            if isinstance(record, Grid):
                self._finished.put(key, record, record.images.nbytes)
            yield record

    def film(self, setting: Setting, *, num_frames: int) -> Iterator[Loading | Progress | Film]:
        """See `generate_film`."""
        key = (setting, num_frames, self._stamps(setting))
        found = self._finished.get(key)
        if isinstance(found, Film):
            yield found
            return
        for record in generate_film(setting, self.networks, num_frames=num_frames):
            if isinstance(record, Film):
                self._finished.put(key, record, sum(frame.noisy.nbytes * 2 for frame in record.frames))
            yield record

    def film_of(self, setting: Setting, position: int, *, num_frames: int) -> Iterator[Loading | Progress | Film]:
        """The film strip of the image at `position` in the grid of `setting`."""
        label_dim = self.networks.facts(setting.net).label_dim if setting.class_idx == "all" else 0
        yield from self.film(image_of(setting, position, label_dim), num_frames=num_frames)

    def both(self, a: Setting, b: Setting) -> Iterator[Pair]:
        """The grids of two settings, one after the other."""
        newest: list[Record | None] = [None, None]
        for side, setting in enumerate((a, b)):
            for record in self.grid(setting):
                newest[side] = record
                yield Pair(a=newest[0], b=newest[1])

    def _stamps(self, setting: Setting) -> object:
        return stamp(setting.net), stamp(setting.guide) if setting.guide else None
