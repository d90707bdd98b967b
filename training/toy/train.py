"""Training of the toy networks: regression to the true score of noisy points (arXiv 2406.02507, Appendix C)."""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dnnlib.disk import make_folder
from dnnlib.errors import ConfigError
from training.phema import PowerFunctionEMA
from training.toy.mixture import gt
from training.toy.model import ToyModel
from training.toy.toy_files import save_toy_model


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Settings of a training run. Raises ConfigError for invalid values."""

    classes: str = "A"
    num_layers: int = 4
    hidden_dim: int = 64
    sigma_data: float = 0.5
    num_iters: int = 4096
    batch: int = 4096
    lr: float = 0.01
    lr_decay: int = 512  # iterations before the learning rate falls, with the inverse square root
    P_mean: float = -2.3  # of ln(sigma)
    P_std: float = 1.5
    ema_std: float = 0.010  # relative length of the average
    snapshot: int = 256  # iterations between files
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_dim", "num_iters", "batch", "lr_decay", "snapshot"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} of the toy network must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class ToyStep:
    """A finished iteration."""

    iteration: int  # from 1
    loss: torch.Tensor  # scalar; reading it waits for the device
    net: ToyModel | None  # the average, at iterations that write a file or show it
    path: Path | None  # that file


class ToyRun:
    """One training run, as a sequence of one ToyStep per iteration.

    Files are named by `pattern`, such as out/iter%04d.pkl or out/iter{:04d}.pkl; without one no file is written.
    `show_every` iterations a step has the average, too. Raises ConfigError for a pattern without a number.
    """

    def __init__(
        self,
        config: ToyConfig,
        pattern: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        show_every: int | None = None,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.truth = gt(config.classes, self.device)
        self._pattern = None if pattern is None else os.fspath(pattern)
        self._show_every = show_every
        if self._pattern is not None and _numbered(self._pattern, 1) == _numbered(self._pattern, 2):
            raise ConfigError(f"{self._pattern} names one file for all iterations; use e.g. iter%04d.pkl")

    @property
    def folder(self) -> Path | None:
        """The folder of the files."""
        return None if self._pattern is None else _numbered(self._pattern, 1).parent

    def __len__(self) -> int:
        return self.config.num_iters

    def __iter__(self) -> Iterator[ToyStep]:
        config = self.config
        if self.folder is not None:
            make_folder(self.folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            net = ToyModel(num_layers=config.num_layers, hidden_dim=config.hidden_dim, sigma_data=config.sigma_data)
        net = net.to(self.device).train()
        generator = torch.Generator(self.device).manual_seed(config.seed)
        ema = PowerFunctionEMA(net, stds=[config.ema_std])
        optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
        for index in range(config.num_iters):
            for group in optimizer.param_groups:
                group["lr"] = config.lr / math.sqrt(max(index / config.lr_decay, 1))
            loss = self._loss(net, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(index + 1, 1)
            writes = (index + 1) % config.snapshot == 0 or index + 1 == config.num_iters
            shows = self._show_every is not None and (index + 1) % self._show_every == 0
            average: Any = ema.get()[0][0] if writes or shows else None
            path = self._save(average, index + 1) if writes else None
            yield ToyStep(iteration=index + 1, loss=loss.detach(), net=average, path=path)

    def _loss(self, net: ToyModel, generator: torch.Generator) -> torch.Tensor:
        """Mean of sigma**2 times the mean square error of the score, over noisy points of the true distribution."""
        config = self.config
        normal = torch.randn([config.batch], device=self.device, generator=generator)
        sigma = (config.P_mean + config.P_std * normal).exp()
        x = self.truth.sample([config.batch], sigma, generator)
        error = (net.score(x, sigma, graph=True) - self.truth.score(x, sigma)).square().mean(-1)
        return (sigma.square() * error).mean()

    def _save(self, net: ToyModel, iteration: int) -> Path | None:
        if self._pattern is None:
            return None
        path = _numbered(self._pattern, iteration)
        save_toy_model(net, path, info=asdict(self.config) | {"iteration": iteration})
        return path


def _numbered(pattern: str, iteration: int) -> Path:
    try:
        return Path(pattern % iteration)
    except (TypeError, ValueError):  # no number, or a % that begins none
        pass
    try:
        return Path(pattern.format(iteration))
    except (KeyError, IndexError, ValueError):
        return Path(pattern)
