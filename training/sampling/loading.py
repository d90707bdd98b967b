"""The networks of a request: loaded from their files, held against each other, made ready to sample from."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from training.condition.conditioning import require_same_condition
from training.encoders import Encoder
from training.sampling.checks import require_label_dropout, require_matching_guide
from training.sampling.guidance import SELF, WithoutLabels
from training.snapshot import load_snapshot
from training.snapshot.code import TrustCode

# Makes a network that is ready to sample from out of one that was loaded, on the device given. It keeps img_channels,
# img_resolution and label_dim. With `fixed_batch` true, it is always given batches of one size.
Prepare = Callable[[Any, torch.device], Any]


def load_network(source: Any, device: torch.device, trust_code: TrustCode | None = None) -> tuple[Any, Encoder | None]:
    """A network on `device`, ready to sample from, and its encoder: from a snapshot's path or URL, or as given."""
    return _load(source, device, trust_code)[:2]


def load_networks(
    source: Any,
    guides: Sequence[Any],
    device: torch.device,
    trust_code: TrustCode | None,
    *,
    unlabelled: bool,
    condition: str | None,
) -> tuple[Any, list[Any], Encoder | None, str | None]:
    """The main network, its guides and its encoder, likewise, and what it is conditioned on. A guide may be 'self': the
    network without labels.

    `unlabelled`: the images are to be made without labels. `condition` takes the place of what the file says. Raises
    ConfigError where networks don't go together, and where the main one's file does not say that it can do without
    labels.
    """
    net, encoder, info = _load(source, device, trust_code)
    for use, wanted in (("--gnet=self", any(map(_is_self, guides))), ("--class=none", unlabelled)):
        if wanted:
            require_label_dropout(net.label_dim, info, source, use)
    condition = _condition(info) if condition is None else condition
    loaded = []
    for guide in guides:
        guide_info = None
        if _is_self(guide):
            guide = WithoutLabels(net)
        else:
            guide, _, guide_info = _load(guide, device, trust_code)
            require_same_condition(net, condition, guide, _condition(guide_info))
            require_matching_guide(net, guide)
        loaded.append(guide)
    return net, loaded, encoder, condition


def prepare_networks(prepare: Prepare, networks: Sequence[Any], device: torch.device) -> list[Any]:
    """All of them prepared. What is there twice, or without labels beside itself, is prepared once."""
    ready: dict[int, Any] = {}

    def one(network: Any) -> Any:
        if isinstance(network, WithoutLabels):
            return WithoutLabels(one(network.net))
        if id(network) not in ready:
            ready[id(network)] = prepare(network, device)
        return ready[id(network)]

    return [one(network) for network in networks]


def _load(
    source: Any, device: torch.device, trust_code: TrustCode | None
) -> tuple[Any, Encoder | None, dict[str, Any] | None]:
    """As `load_network`, and what a snapshot says of its training."""
    if isinstance(source, str | os.PathLike):
        snapshot = load_snapshot(os.fspath(source), trust_code, device=device)
        return snapshot.net, snapshot.encoder, snapshot.info
    return (source.to(device) if isinstance(source, torch.nn.Module) else source), None, None


def _condition(info: dict[str, Any] | None) -> str | None:
    said = None if info is None else info.get("condition")
    return said if isinstance(said, str) else None


def _is_self(guide: Any) -> bool:
    return isinstance(guide, str) and guide == SELF
