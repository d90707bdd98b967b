"""Everything about a training run that changes as it trains: how it starts, takes a step, is saved and is restored."""

import contextlib
import warnings
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from training.config import TrainingConfig
from training.dataset import ImageFolderDataset
from training.encoders import Encoder, StabilityVAEEncoder
from training.latents import encoder_of, vae_encoder, vae_geometry
from training.loss import EDM2Loss
from training.monitor import Monitor
from training.networks_edm2 import MPConv, Precond, normalize
from training.phema import PowerFunctionEMA
from training.schedule import learning_rate_schedule
from training.snapshot import load_snapshot
from training.streams import NoiseStream, derive_seed

# Purposes of the run's streams of random numbers.
_SIGMA, _NOISE, _ENCODER, _DROPOUT = range(4)


class TrainingState:
    """The network, its optimizer and averages, and the number of images they have seen.

    `nimg` counts images over all processes; `elapsed_sec` is the time spent in all sessions of the run so far. With
    `resumed` a checkpoint is about to be loaded, so that the starting weights do not matter. `encoder` takes the place
    of the one that the options and the data set call for.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dataset: ImageFolderDataset,
        world: World,
        *,
        resumed: bool,
        encoder: Encoder | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.nimg = 0
        self.elapsed_sec = 0.0
        self.encoder = make_encoder(config, dataset) if encoder is None else encoder
        self.net = make_network(config, dataset).train().requires_grad_(True).to(world.device)
        self.left_fresh: list[str] = []  # tensors that --init had nothing fitting for
        if config.init is not None and not resumed:
            self.left_fresh = copy_weights(config.init, self.net, partial=config.init_partial)
        self.loss_fn = EDM2Loss(P_mean=config.P_mean, P_std=config.P_std, sigma_data=self.net.sigma_data)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr, betas=(0.9, 0.99))
        self.ema = PowerFunctionEMA(self.net, stds=list(config.ema_stds))
        self.monitor = Monitor(self.net, world, everything=config.monitor, loss_scale=config.ls)
        self._noise = NoiseStream(config.seed, world.device)
        self._replica: torch.nn.Module = self.net
        if world.size > 1:
            device_ids = [world.device.index] if world.device.type == "cuda" else None
            with warnings.catch_warnings():
                # Its successor does not exist before PyTorch 2.13.
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
                self._replica = DistributedDataParallel(self.net, device_ids=device_ids, broadcast_buffers=False)

    def close(self) -> None:
        """Let go of the process group; there are no steps after this.

        Without it the group may live on in DistributedDataParallel after it was closed, and then its end is a deadlock
        now and again: that waits, with Python's global lock held, for a thread that wants the lock to drop a tensor.
        """
        self._replica = self.net

    @property
    def learning_rate(self) -> float:
        """The optimizer's learning rate for the next iteration."""
        c = self.config
        return learning_rate_schedule(self.nimg, c.batch, ref_lr=c.lr, ref_batches=c.decay, rampup_Mimg=c.rampup)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One iteration on this process's share of a batch; the loss per element [N, C, H, W], detached.

        `images` [N, C, H, W] as the data set holds them, `labels` [N, L] float32, both on the run's device.
        """
        loss = self.accumulate_gradients(images, labels)
        self.monitor.see_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        for param in self.net.parameters():
            if param.grad is not None:
                torch.nan_to_num(param.grad, nan=0, posinf=0, neginf=0, out=param.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.nimg += self.config.batch
        self.ema.update(cur_nimg=self.nimg, batch_size=self.config.batch)
        return loss

    def accumulate_gradients(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Forward and backward for one iteration, in as many rounds as --batch-gpu asks for; returns as `step`.

        The noise of the whole share is drawn before it is split, so that the rounds do not change it.
        """
        share, num_rounds = self.config.share_of(self.world.size)
        assert len(images) == share
        if self.nimg == 0:
            normalize_weights(self.net)
        start = self.nimg + self.world.rank * share
        eps = None
        if self.config.vae is not None:
            with torch.no_grad():
                images = self.encoder.encode_pixels(images.expand(-1, 3, -1, -1))  # grey ones three times
        if isinstance(self.encoder, StabilityVAEEncoder):
            eps = self._noise.normal(start, share, (images.shape[1] // 2, *images.shape[2:]), _ENCODER)
        latents = self.encoder.encode_latents(images, eps=eps)
        rnd_normal = self._noise.normal(start, share, (1, 1, 1), _SIGMA)
        unit_noise = self._noise.normal(start, share, tuple(latents.shape[1:]), _NOISE)
        if self.config.network.dropout:
            torch.manual_seed(derive_seed(self.config.seed, _DROPOUT, self.nimg, self.world.rank))

        losses = []
        rounds = (t.chunk(num_rounds) for t in (latents, labels, rnd_normal, unit_noise))
        for index, (x, y, n, e) in enumerate(zip(*rounds, strict=True)):
            self.monitor.see_inputs(x, y, rnd_normal=n, unit_noise=e)
            with self._gradients_later(index < num_rounds - 1):
                loss = self.loss_fn(self._replica, x, y, rnd_normal=n, unit_noise=e)
                (loss.sum() * (self.config.ls / share)).backward()
            losses.append(loss.detach())
        return torch.cat(losses)

    def _gradients_later(self, later: bool) -> contextlib.AbstractContextManager[Any]:
        """Where `later`, leave the exchange of gradients between processes to a following round."""
        if later and isinstance(self._replica, DistributedDataParallel):
            return self._replica.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds. There is no random state in it: see training/streams.py."""
        return {
            "state": {"cur_nimg": self.nimg, "total_elapsed_time": self.elapsed_sec},
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, data: dict[str, Any], source: str) -> None:
        """Continue from what `state_dict` gave. Raises ConfigError, naming `source`, where it does not fit."""
        try:
            self.net.load_state_dict(data["net"])
            self.optimizer.load_state_dict(data["optimizer"])
            self.ema.load_state_dict(data["ema"])
            self.nimg = int(data["state"]["cur_nimg"])
            self.elapsed_sec = float(data["state"]["total_elapsed_time"])
        except (AttributeError, IndexError, KeyError, ValueError, TypeError, RuntimeError) as error:
            # PyTorch lists every tensor that does not fit.
            raise ConfigError(f"{source} does not belong to this run: {str(error)[:400]}") from None


def make_encoder(config: TrainingConfig, dataset: ImageFolderDataset) -> Encoder:
    """The encoder that the options and the data set call for: pixels of any channel count, or latents of a VAE.

    Raises ConfigError where the two don't go together.
    """
    return encoder_of(dataset) if config.vae is None else vae_encoder(dataset, config.vae)


def network_shape(config: TrainingConfig, dataset: ImageFolderDataset) -> tuple[int, int]:
    """Resolution and channels of what the network sees."""
    if config.vae is not None:
        geometry = vae_geometry(config.vae)
        return geometry.resolution(dataset.resolution), geometry.channels
    channels = dataset.num_channels // 2 if dataset.holds_latents else dataset.num_channels
    return dataset.resolution, channels


def make_network(config: TrainingConfig, dataset: ImageFolderDataset) -> Precond:
    """A network for the data set, initialized from the run's seed, on the CPU."""
    resolution, channels = network_shape(config, dataset)
    label_dim = dataset.label_dim if config.cond else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            return Precond(resolution, channels, label_dim, **config.network.arguments())
        except ValueError as error:
            raise ConfigError(str(error)) from None


@torch.no_grad()
def normalize_weights(net: torch.nn.Module) -> None:
    """Bring weights of any magnitude to the one where forced weight normalization (Eq. 66) leaves them.

    A forward pass in training leaves 1e-4 of the distance to it. From random weights, the first round of accumulation
    would see gradients that differ from the other rounds' in the fourth digit, and the result would depend on the
    number of rounds. After a step of the optimizer the weights are so close already that rounding hides it.
    """
    for module in net.modules():
        if isinstance(module, MPConv):
            module.weight.copy_(normalize(module.weight))


def check_network(config: TrainingConfig, dataset: ImageFolderDataset) -> None:
    """Raise ConfigError where no network of this shape can be made for the data set. Takes no memory to speak of."""
    with torch.device("meta"):
        make_network(config, dataset)


def copy_weights(source: str, net: Precond, *, partial: bool) -> list[str]:
    """Start `net` from the weights of the snapshot `source`; the names of the tensors that were left as they are.

    Tensors that are missing there or differ in shape raise ConfigError, unless `partial` allows them to stay fresh.
    """
    theirs = load_snapshot(source).net.state_dict()
    ours = net.state_dict()
    misfits = [name for name, value in ours.items() if name not in theirs or theirs[name].shape != value.shape]
    if misfits and not partial:
        listed = ", ".join(f"{n} {_shape(ours[n])} here, {_shape(theirs.get(n))} there" for n in misfits)
        raise ConfigError(f"--init={source} does not fit this network: {listed}; --init-partial leaves these fresh")
    if len(misfits) == len(ours):
        raise ConfigError(f"--init={source} has no tensor that fits this network")
    net.load_state_dict(
        {name: theirs[name].to(value) for name, value in ours.items() if name not in misfits}, strict=False
    )
    return misfits


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else "x".join(map(str, tensor.shape)) or "scalar"
