"""Everything about a training run that changes as it trains: how it starts, takes a step, is saved and is restored."""

import contextlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from dnnlib.errors import ConfigError
from torch_utils.checkpoints.stored_checkpoint import read_whole
from torch_utils.checkpoints.stored_tensor import has_stored
from torch_utils.distributed import World
from torch_utils.loss_scale import LossScale
from training.config import TrainingConfig
from training.dataset.image_folder import ImageFolderDataset
from training.dataset.latents import encoder_of, vae_encoder, vae_geometry
from training.encoders import Encoder, StabilityVAEEncoder
from training.loss import EDM2Loss
from training.networks_edm2 import Precond
from training.phema import PowerFunctionEMA
from training.run.batch_condition import batch_condition, condition_of
from training.run.label_dropout import dropped
from training.run.monitor import Monitor
from training.run.replica import make_replica
from training.run.sharding import gathered, hand_over_gradients, own_part, sharded_state, take_rows
from training.run.streams import NoiseStream, derive_seed
from training.run.update import clear_nonfinite, make_optimizer, normalize_weights, start_moments, with_fused_adam
from training.schedule import learning_rate_schedule
from training.snapshot import load_snapshot

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
        self.condition = condition_of(config, dataset)
        self.sharded = config.shards_over(world.size)
        self.net = make_network(config, dataset).train().requires_grad_(True)
        if not self.sharded:
            self.net.to(world.device)
        self.left_fresh: list[str] = []  # tensors that --init had nothing fitting for
        self.widened = False  # whether --init knew no conditioning image, so that it begins without a part in it
        if config.init is not None and not resumed:
            self.left_fresh, self.widened = copy_weights(config.init, self.net, partial=config.init_partial)
        self.loss_fn = EDM2Loss(P_mean=config.P_mean, P_std=config.P_std, sigma_data=self.net.sigma_data)
        self.replica = make_replica(self.net, config, world)
        self.part = own_part(self.net) if self.sharded else self.net  # what this process keeps, steps and averages
        self.optimizer = make_optimizer(self.part.parameters(), lr=config.lr)
        self.loss_scale = LossScale(config.ls, world.device, shared=world if self.sharded else None)
        self.ema = PowerFunctionEMA(self.part, stds=list(config.ema_stds))
        self.monitor = Monitor(
            self.net, world, everything=config.monitor, replica=self.replica if self.sharded else None
        )
        self._noise = NoiseStream(config.seed, world.device)

    def close(self) -> None:
        """Let go of the process group; there are no steps after this.

        Without it the group may live on in DistributedDataParallel after it was closed, and then its end is a deadlock
        now and again: that waits, with Python's global lock held, for a thread that wants the lock to drop a tensor.
        """
        self.replica = self.net

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
        self.monitor.see_gradients(self.loss_scale.factor)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if self.sharded:
            hand_over_gradients(self.net, self.part, self.world)
        gradients = [param.grad for param in self.part.parameters() if param.grad is not None]
        self.loss_scale.unscale_(gradients)
        clear_nonfinite(gradients)
        self.optimizer.found_inf = self.loss_scale.overflow  # type: ignore[attr-defined]  # read by fused Adam
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
        normalize_weights(self.part)
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
        if self.config.label_dropout:
            labels = dropped(labels, self._noise, start, self.config.label_dropout)
        if self.config.network.dropout:
            torch.manual_seed(derive_seed(self.config.seed, _DROPOUT, self.nimg, self.world.rank))
        seen: list[dict[str, torch.Tensor]] = [{}] * num_rounds
        if self.condition is not None:
            images = batch_condition(self.condition, latents, self._noise, start, self.net.sigma_data)
            seen = [{"cond_images": part} for part in images.chunk(num_rounds)]

        losses = []
        rounds = (t.chunk(num_rounds) for t in (latents, labels, rnd_normal, unit_noise))
        for index, (x, y, n, e) in enumerate(zip(*rounds, strict=True)):
            self.monitor.see_inputs(x, y, rnd_normal=n, unit_noise=e, **seen[index])
            with self._gradients_later(index < num_rounds - 1):
                loss = self.loss_fn(self.replica, x, y, rnd_normal=n, unit_noise=e, **seen[index])
                (loss.sum() * (self.loss_scale.factor / share)).backward()
            losses.append(loss.detach())
        return torch.cat(losses)

    def _gradients_later(self, later: bool) -> contextlib.AbstractContextManager[Any]:
        """Where `later`, leave the exchange of gradients between processes to a following round.

        Sharded ones are still scattered, since the whole would take as much memory as all weights do; the sum over
        copies waits.
        """
        if self.sharded:
            cast(Any, self.replica).set_requires_all_reduce(not later)
        if later and isinstance(self.replica, DistributedDataParallel):
            return self.replica.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds. There is no random state in it: see training/run/streams.py.

        Where the run is sharded, tensors that are spread over processes are DTensors.
        """
        data = {
            "state": {"cur_nimg": self.nimg, "total_elapsed_time": self.elapsed_sec},
            "net": self.part.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "loss_scale": self.loss_scale.state_dict(),
        }
        return sharded_state(data, self.net) if self.sharded else data

    def load_state_dict(self, data: dict[str, Any], source: str) -> None:
        """Continue from what `state_dict` gave, with whole tensors or StoredTensors in it; for every process to call.

        Raises ConfigError, naming `source`, where it does not fit.
        """
        try:
            if self.sharded:
                self._load_parts(data)
            else:
                data = read_whole(data)
                self.net.load_state_dict(data["net"])
                moments = fitting_moments(data["optimizer"], list(self.net.parameters()))
                self.optimizer.load_state_dict(with_fused_adam(moments))
                self.ema.load_state_dict(data["ema"])
            self.loss_scale.load_state_dict(read_whole(data.get("loss_scale", {})))
            self.nimg = int(data["state"]["cur_nimg"])
            self.elapsed_sec = float(data["state"].get("total_elapsed_time", 0.0))
        except (AttributeError, IndexError, KeyError, ValueError, TypeError, RuntimeError) as error:
            # PyTorch lists every tensor that does not fit.
            raise ConfigError(f"{source} does not belong to this run: {str(error)[:400]}") from None

    def _load_parts(self, data: dict[str, Any]) -> None:
        """Take this process's part of what `data` holds of weights, moments and averages."""
        if list(data["ema"]["stds"]) != self.ema.stds:
            raise ValueError(f"the stored averages have widths {data['ema']['stds']}, this run has {self.ema.stds}")
        start_moments(self.optimizer)
        ours, theirs = (
            {"net": d["net"], "optimizer": d["optimizer"]["state"], "ema": d["ema"]["emas"]}
            for d in (self.state_dict(), data)
        )
        if has_stored(theirs):
            from torch_utils.checkpoints.sharded import read_into  # slow to import

            read_into(theirs, ours)
        else:
            take_rows(theirs, ours)

    def averages(self, *, main_only: bool = False) -> Iterable[tuple[torch.nn.Module, str]]:
        """The averaged networks, each with a suffix for its file name; every process must take all of them, once.

        Where the run is sharded they are gathered as they are taken, one at a time and in float16; with `main_only`
        they have no content in other processes than the main one. Otherwise they are the averages themselves.
        """
        averages = self.ema.get()
        if not self.sharded:
            return averages
        return ((gathered(ema, self.net, self.world, main_only=main_only), suffix) for ema, suffix in averages)


def fitting_moments(stored: dict[str, Any], parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
    """The optimizer's state `stored`, if its moments have the shapes of the parameters; ValueError otherwise.

    PyTorch pairs them by number and doesn't look.
    """
    for index, moments in stored["state"].items():
        shape = parameters[index].shape
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != shape:
                raise ValueError(
                    f"{name} of parameter {index} is {_shape(value)}, the parameter {_shape(parameters[index])}"
                )
    return stored


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
    condition = condition_of(config, dataset)
    cond_channels = 0 if condition is None else condition.channels(channels)
    more: dict[str, Any] = {"cond_channels": cond_channels} if cond_channels else {}  # not noted where there are none
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            return Precond(resolution, channels, label_dim, **config.network.arguments(), **more)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def check_network(config: TrainingConfig, dataset: ImageFolderDataset) -> None:
    """Raise ConfigError where no network of this shape can be made for the data set. Takes no memory to speak of."""
    with torch.device("meta"):
        make_network(config, dataset)


def copy_weights(source: str, net: Precond, *, partial: bool) -> tuple[list[str], bool]:
    """Start `net` from the weights of the snapshot `source`; the names of the tensors that were left as they are.

    Tensors that are missing there or differ in shape raise ConfigError, unless `partial` allows them to stay fresh. The
    second item: whether the snapshot's network sees no conditioning image and `net` does. It begins with zeros as the
    weights of these channels then, so that it computes what the snapshot's does: the norms of weights, by which they
    are divided, stay as they were.
    """
    origin = load_snapshot(source).net
    theirs = origin.state_dict()
    ours = net.state_dict()
    stem = f"unet.enc.{next(iter(net.unet.enc))}.weight"
    widened = bool(net.cond_channels) and not origin.cond_channels and stem in theirs
    if widened:
        known = theirs[stem]
        more = ours[stem].shape[1] - known.shape[1]
        widened = more == net.cond_channels
        if widened:
            theirs[stem] = torch.cat([known, known.new_zeros([known.shape[0], more, *known.shape[2:]])], dim=1)
    misfits = [name for name, value in ours.items() if name not in theirs or theirs[name].shape != value.shape]
    if misfits and not partial:
        listed = ", ".join(f"{n} {_shape(ours[n])} here, {_shape(theirs.get(n))} there" for n in misfits)
        raise ConfigError(f"--init={source} does not fit this network: {listed}; --init-partial leaves these fresh")
    if len(misfits) == len(ours):
        raise ConfigError(f"--init={source} has no tensor that fits this network")
    net.load_state_dict(
        {name: theirs[name].to(value) for name, value in ours.items() if name not in misfits}, strict=False
    )
    return misfits, widened


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else "x".join(map(str, tensor.shape)) or "scalar"
