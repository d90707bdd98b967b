"""Everything about a training run that changes as it trains: how it starts, takes a step, is saved and is restored."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from dnnlib.errors import ConfigError
from torch_utils.checkpoints import read_whole
from torch_utils.checkpoints.stored import has_stored
from torch_utils.distributed import World
from torch_utils.loss_scale import LossScale
from torch_utils.precision import compute_dtype
from training.config import TrainingConfig
from training.dataset.contract import ImageDataset
from training.encoders import Encoder, StabilityVAEEncoder
from training.own.own_loss import make_loss
from training.phema import PowerFunctionEMA
from training.run.batch_inputs import condition_images, drop_labels
from training.run.monitor import Monitor
from training.run.run_data import condition_of, make_encoder
from training.run.run_network import copy_weights, make_network, make_replica, shape_text
from training.run.sharding import copy_rows, gathered, local_module, scatter_gradients, sharded_state
from training.run.streams import NoiseStream, Purpose, derive_seed
from training.run.update import (
    clear_nonfinite,
    flat_gradients,
    learning_rate_schedule,
    make_optimizer,
    normalize_rows,
    pack_weights,
    start_moments,
    weights_of,
    with_fused_adam,
)

# Arguments of the loss for one round of accumulation: images and labels, and keyword arguments.
Round = tuple[tuple[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


class TrainingState:
    """The network, its optimizer and averages, and the number of images they have seen.

    `nimg` counts images over all processes; `elapsed_sec` is the training time of all sessions of the run so far. With
    `resumed`, a checkpoint will be loaded, so the starting weights do not matter. `encoder` replaces the one that the
    options and the data set call for.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dataset: ImageDataset,
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
        self.class_names = dataset.class_names if config.cond else None
        self.sharded = config.shards_over(world.size)
        self.net = make_network(config, dataset)
        if not self.sharded:
            self.net.to(world.device)
        self.uninitialized: list[str] = []  # tensors that --init has nothing fitting for
        self.has_new_condition_input = False  # whether the snapshot of --init takes no conditioning image
        if config.init is not None and not resumed:
            self.uninitialized, self.has_new_condition_input = copy_weights(
                config.init, self.net, partial=config.init_partial
            )
        if not self.sharded:
            pack_weights(self.net)
        self.loss_fn = make_loss(config, self.net.sigma_data)
        self.replica = make_replica(self.net, config, world)
        self.local = local_module(self.net) if self.sharded else self.net  # what this process steps and averages
        self._params, self._weights = list(self.local.parameters()), weights_of(self.local)
        self.optimizer = make_optimizer(self.local.parameters(), lr=config.lr)
        self.loss_scale = LossScale(config.ls, world.device, shared=world if self.sharded else None)
        self.ema = PowerFunctionEMA(self.local, stds=list(config.ema_stds))
        self.monitor = Monitor(
            self.net,
            world,
            everything=config.monitor,
            replica=self.replica if self.sharded else None,
            dtype=compute_dtype(config.network.precision, world.device),
        )
        self._noise = NoiseStream(config.seed, world.device)

    def close(self) -> None:
        """Release the process group; no step may follow.

        Otherwise DistributedDataParallel may keep the group alive after it was closed. Its end is then sometimes a
        deadlock: it waits, with Python's global lock held, for a thread that needs the lock to drop a tensor.
        """
        self.replica = self.net

    @property
    def learning_rate(self) -> float:
        """The optimizer's learning rate for the next iteration."""
        c = self.config
        return learning_rate_schedule(self.nimg, c.batch, ref_lr=c.lr, ref_batches=c.decay, rampup_Mimg=c.rampup)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take one iteration on this process's share of a batch; return the loss per element [N, C, H, W], detached.

        `images` [N, C, H, W] as the data set holds them, `labels` [N, L] float32, both on the run's device.
        """
        normalize_rows(self._weights)
        loss = self.accumulate_gradients(images, labels)
        self.monitor.see_gradients(self.loss_scale.factor)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if self.sharded:
            scatter_gradients(self.net, self.local, self.world)
        gradients = flat_gradients(self._params)
        self.loss_scale.unscale_(gradients)
        clear_nonfinite(gradients)
        self.optimizer.found_inf = self.loss_scale.overflow  # type: ignore[attr-defined]  # read by fused Adam
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.nimg += self.config.batch
        self.ema.update(cur_nimg=self.nimg, batch_size=self.config.batch)
        return loss

    def accumulate_gradients(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Run forward and backward passes of one iteration, in the rounds of --batch-gpu; return the loss as `step`."""
        share, num_rounds = self.config.share_of(self.world.size)
        losses = []
        for index, (args, kwargs) in enumerate(self._rounds(images, labels)):
            self.monitor.see_inputs(*args, **kwargs)
            with self._no_gradient_sync(index < num_rounds - 1):
                loss = self.loss_fn(self.replica, *args, **kwargs)
                (loss.sum() * (self.loss_scale.factor / share)).backward()
            losses.append(loss.detach())
        return torch.cat(losses)

    def _rounds(self, images: torch.Tensor, labels: torch.Tensor) -> Iterator[Round]:
        """Yield the arguments of the loss for each round of accumulation.

        The random numbers of the whole share are drawn before it is split, so they do not depend on the split.
        """
        config, noise = self.config, self._noise
        share, num_rounds = config.share_of(self.world.size)
        assert len(images) == share
        start = self.nimg + self.world.rank * share
        latents = self._encode(images, start)
        draws = {
            "rnd_normal": noise.normal(start, share, (1, 1, 1), Purpose.SIGMA),
            "unit_noise": noise.normal(start, share, tuple(latents.shape[1:]), Purpose.NOISE),
        }
        if config.label_dropout:
            labels = drop_labels(labels, noise, start, config.label_dropout)
        if config.network.dropout or config.has_own_parts:  # which may draw from torch's generator
            torch.manual_seed(derive_seed(config.seed, Purpose.DROPOUT, self.nimg, self.world.rank))
        if self.condition is not None:
            draws["cond_images"] = condition_images(self.condition, latents, noise, start, self.net.sigma_data)
        chunks = zip(*(tensor.chunk(num_rounds) for tensor in (latents, labels, *draws.values())), strict=True)
        for x, y, *drawn in chunks:
            yield (x, y), dict(zip(draws, drawn, strict=True))

    def _encode(self, images: torch.Tensor, start: int) -> torch.Tensor:
        """Return images at positions `start`, ... as the network's latents, sampled from the run's noise."""
        if self.config.vae is not None:
            with torch.no_grad():
                images = self.encoder.encode_pixels(images.expand(-1, 3, -1, -1))  # gray ones three times
        eps = None
        if isinstance(self.encoder, StabilityVAEEncoder):
            shape = (images.shape[1] // 2, *images.shape[2:])
            eps = self._noise.normal(start, len(images), shape, Purpose.ENCODER)
        return self.encoder.encode_latents(images, eps=eps)

    def _no_gradient_sync(self, later: bool) -> contextlib.AbstractContextManager[Any]:
        """If `later`, leave the exchange of gradients between processes to a following round.

        Sharded gradients are still scattered, since whole ones would take as much memory as all weights; the sum over
        copies waits.
        """
        if self.sharded:
            cast(Any, self.replica).set_requires_all_reduce(not later)
        if later and isinstance(self.replica, DistributedDataParallel):
            return self.replica.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return the contents of a checkpoint, without any random state: see training/run/streams.py.

        In a sharded run, tensors that are spread over processes are DTensors.
        """
        data = {
            "state": {"cur_nimg": self.nimg, "total_elapsed_time": self.elapsed_sec},
            "net": self.local.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "loss_fn": _published_loss(self.config, self.net.sigma_data),
            "loss_scale": self.loss_scale.state_dict(),
        }
        return sharded_state(data, self.net) if self.sharded else data

    def load_state_dict(self, data: dict[str, Any], source: str) -> None:
        """Continue from a result of `state_dict`, with whole tensors or StoredTensors in it. Every process calls this.

        Raises ConfigError, naming `source`, if it does not fit.
        """
        try:
            if self.sharded:
                self._load_sharded(data)
            else:
                data = read_whole(data)
                self.net.load_state_dict(data["net"])
                moments = _fitting_moments(data["optimizer"], list(self.net.parameters()))
                self.optimizer.load_state_dict(with_fused_adam(moments))
                self.ema.load_state_dict(data["ema"])
            self.loss_scale.load_state_dict(read_whole(data.get("loss_scale", {})))
            self.nimg = int(data["state"]["cur_nimg"])
            self.elapsed_sec = float(data["state"].get("total_elapsed_time", 0.0))
        except (AttributeError, IndexError, KeyError, ValueError, TypeError, RuntimeError) as error:
            # PyTorch lists every tensor that does not fit.
            raise ConfigError(f"{source} does not belong to this run: {str(error)[:400]}") from None

    def _load_sharded(self, data: dict[str, Any]) -> None:
        """Take this process's rows of the weights, moments and averages in `data`."""
        if list(data["ema"]["stds"]) != self.ema.stds:
            raise ValueError(f"the stored averages have widths {data['ema']['stds']}, this run has {self.ema.stds}")
        start_moments(self.optimizer, data["optimizer"]["state"])  # of those that ever had a gradient
        target, source = (
            {"net": d["net"], "optimizer": d["optimizer"]["state"], "ema": d["ema"]["emas"]}
            for d in (self.state_dict(), data)
        )
        if has_stored(source):
            from torch_utils.checkpoints.sharded import read_into  # slow to import

            read_into(source, target)
        else:
            copy_rows(source, target)

    def averages(self, *, main_only: bool = False) -> Iterable[tuple[torch.nn.Module, str]]:
        """Return the averaged networks, each with a suffix for its file name. Every process must take all, once.

        In a sharded run they are gathered as they are taken, one at a time and in float16; with `main_only` they have
        content in the main process alone. Otherwise they are the averages themselves.
        """
        averages = self.ema.get()
        if not self.sharded:
            return averages
        return ((gathered(ema, self.net, self.world, main_only=main_only), suffix) for ema, suffix in averages)


def _published_loss(config: TrainingConfig, sigma_data: float) -> dict[str, Any]:
    """Return the fifth key of a published checkpoint. The options tell the same, and nothing here reads it."""
    arguments = {"P_mean": config.P_mean, "P_std": config.P_std}
    return {**arguments, "sigma_data": sigma_data, "_init_args": (), "_init_kwargs": arguments}


def _fitting_moments(stored: dict[str, Any], parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
    """Return the optimizer's state `stored`; ValueError if a moment has another shape than its parameter.

    PyTorch pairs them by number and does not look at shapes.
    """
    for index, moments in stored["state"].items():
        shape = parameters[index].shape
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != shape:
                expected = shape_text(parameters[index])
                raise ValueError(f"{name} of parameter {index} is {shape_text(value)}, the parameter {expected}")
    return stored
