"""What the page offers: networks, runs and guides, out of the command line's and the repository's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edm2.explorer.networks import NetworkFacts, Networks
from edm2.explorer.run_snapshots import RunSnapshots, is_run_folder
from training.presets import GENERATION, locate
from training.sampling.guidance import SELF

NO_GUIDE = "none"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The entries of the pickers, as (what is shown, its value), and which one the page begins with."""

    networks: list[tuple[str, str]]
    guides: list[tuple[str, str]]  # NO_GUIDE is the first one
    guide: str
    guidance: float
    typed: bool  # whether names may be typed that are not among these


def offered(
    nets: Sequence[str], runs: Sequence[str], gnets: Sequence[str], networks: Networks, *, typed: bool
) -> Choices:
    """The choices, all given ones looked at. Raises ConfigError for what is no network, run or guide."""
    shipped = GENERATION["demo"]
    assert shipped.gnet is not None
    for run in runs:
        RunSnapshots.read(run)
    for name in (*nets, *runs, *gnets):
        networks.facts(name)
    net, guide = (as_short(locate(name)) for name in (shipped.net, shipped.gnet))
    entries = [(name, name) for name in (*nets, *runs)]
    guides = [(NO_GUIDE, NO_GUIDE), *((name, name) for name in gnets)]
    if Path(net).is_file() and net not in (*nets, *runs):
        entries.append((f"shipped: {Path(net).stem}", net))
    if Path(guide).is_file() and guide not in gnets:
        guides.append((f"shipped: {Path(guide).stem}", guide))
    guides.append(("itself, without its class", SELF))
    first = gnets[0] if gnets else guide if not nets and not runs and Path(guide).is_file() else NO_GUIDE
    return Choices(networks=entries, guides=guides, guide=first, guidance=shipped.guidance, typed=typed)


def as_short(path: str) -> str:
    """Relative to the current folder where it is inside."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def length_for(facts: NetworkFacts) -> float | None:
    """The EMA length to begin with: the longest that a run has stored; None for a network by itself."""
    return round(max(facts.lengths), 3) if facts.lengths else None


def needs_length(source: str) -> bool:
    """Whether an EMA length is to be chosen for `source`."""
    return is_run_folder(source)
