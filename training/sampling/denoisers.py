"""Networks as denoisers: with fixed labels, without labels, with fixed conditioning images, two of them in one batch.

Shape legend: N images, C channels, K conditioning channels, H x W pixels, L labels.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from training.sampling.solvers import Denoiser

# A network called as D = net(x, sigma, labels), with sigma a scalar tensor. A method `bind(labels)`, if it has one,
# returns D(x, sigma) and computes what depends on the labels alone once (fast/inference_network.py).
Network = Callable[..., torch.Tensor]

# Called as a denoiser; returns the guide's denoised images and the main network's.
BothDenoisers = Callable[[torch.Tensor, float, float], Sequence[torch.Tensor]]

SELF = "self"  # in place of a guide's file: the main network itself, without labels


def bind_labels(net: Network, labels: torch.Tensor | None) -> Denoiser:
    """Return the denoiser of `net` for fixed `labels` [N, L]; its result has the type of the state x."""
    bound = net.bind(labels) if hasattr(net, "bind") else None

    def denoise(x: torch.Tensor, sigma: float, step_sigma: float) -> torch.Tensor:
        # Filled on the device: a copy from the host would wait for all work in flight.
        level = torch.full((), sigma, dtype=x.dtype, device=x.device)
        return (net(x, level, labels) if bound is None else bound(x, level)).to(x.dtype)

    return denoise


def merged_call(net: Network, labels: torch.Tensor) -> BothDenoisers:
    """Evaluate `net` without labels and with `labels` [N, L] together, on 2N images."""
    denoise = bind_labels(net, torch.cat([torch.zeros_like(labels), labels]))
    return lambda x, sigma, step_sigma: denoise(torch.cat([x, x]), sigma, step_sigma).chunk(2)


class _NetworkView:
    """A network called in another way, with the attributes of `net`: image size, channels, number of classes."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def __getattr__(self, name: str) -> Any:
        if name == "net":  # not set yet, as while a copy is made
            raise AttributeError(name)
        return getattr(self.net, name)

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the denoised images [N, C, H, W]."""
        return self.bind(class_labels)(x, sigma)

    def bind(self, class_labels: torch.Tensor | None) -> Callable[..., torch.Tensor]:
        """Return the denoiser D(x, sigma) for labels [N, L]."""
        raise NotImplementedError


class WithoutLabels(_NetworkView):
    """A conditional network that gets zeros for labels, whatever it is given, as label dropout has shown them.

    As a guide of `net` itself this is classifier-free guidance with one network (Ho and Salimans, arXiv 2207.12598).
    """

    def bind(self, class_labels: torch.Tensor | None) -> Callable[..., torch.Tensor]:
        """Return the denoiser D(x, sigma); `class_labels` [N, L] give the shape of the zeros."""
        if hasattr(self.net, "bind"):
            bound: Callable[..., torch.Tensor] = self.net.bind(None)  # one row of zeros for all images
            return bound
        zeros = None if class_labels is None else torch.zeros_like(class_labels)
        return lambda x, sigma: self.net(x, sigma, zeros)


class Conditioned(_NetworkView):
    """A network that is conditioned on images, with these images [N, K, H, W] (docs/condition.md)."""

    def __init__(self, net: Any, images: torch.Tensor) -> None:
        super().__init__(net)
        self.images = images

    def bind(self, class_labels: torch.Tensor | None) -> Callable[..., torch.Tensor]:
        """Return the denoiser D(x, sigma) for labels [N, L], or [2N, L] for a batch with each image twice."""
        images = self.images
        if class_labels is not None and len(class_labels) > len(images):
            images = torch.cat([images] * (len(class_labels) // len(images)))
        if hasattr(self.net, "bind"):
            bound: Callable[..., torch.Tensor] = self.net.bind(class_labels, cond_images=images)
            return bound
        return lambda x, sigma: self.net(x, sigma, class_labels, cond_images=images)


def conditioned(networks: Iterable[Any], images: torch.Tensor) -> list[Any]:
    """Give `images` [N, K, H, W] to those networks that are conditioned on images."""
    return map_networks(lambda net: Conditioned(net, images) if getattr(net, "cond_channels", 0) else net, networks)


def map_networks(change: Callable[[Any], Any], networks: Iterable[Any]) -> list[Any]:
    """Return all networks changed. One that occurs twice, or also without labels, is changed once."""
    networks = list(networks)
    inner = {id(net): net for net in (_without_views(network) for network in networks)}
    changed = {key: change(net) for key, net in inner.items()}
    # Not by a function that calls itself: that is a cycle of references, which would keep the networks in memory.
    return [_with_views(network, changed[id(_without_views(network))]) for network in networks]


def _without_views(network: Any) -> Any:
    while isinstance(network, WithoutLabels):
        network = network.net
    return network


def _with_views(network: Any, inner: Any) -> Any:
    return WithoutLabels(_with_views(network.net, inner)) if isinstance(network, WithoutLabels) else inner


def as_list(gnet: Any) -> list[Any]:
    """Return the guides of an argument that is one guide, a list or tuple of them, or None."""
    if gnet is None:
        return []
    return list(gnet) if isinstance(gnet, list | tuple) else [gnet]
