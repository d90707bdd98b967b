"""The options of a training run: one value that is checked when it is made, stored in the run folder and compared.

Each field carries its limits and the help text of its command line option, made by edm2/options/training.py.
A new option is one line.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dnnlib.download import is_remote
from dnnlib.errors import ConfigError
from dnnlib.fields import check_limits, option
from torch_utils.precision_names import AUTO, PRECISIONS, Precision
from training.metrics.metric_table import parse_metrics

if TYPE_CHECKING:
    import torch

PUBLISHED_VAE = "stabilityai/sd-vae-ft-mse"  # the VAE of the published networks, whose latents' statistics are known
ENCODER_PRECISIONS = ("tf32", "fp32")  # of a VAE's convolutions on GPUs that have TF32
SHUFFLE_BUFFER = 10_000  # images of a data set behind a URL
MAX_SAMPLES = 64  # columns of a sample grid


def neutral(default: Any = MISSING, help: str | None = None, **details: Any) -> Any:
    """An `option` that cannot change what is learned, so that a run may continue with another value."""
    return option(default, help, extra={"neutral": True}, **details)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The shape of the network, without what the data decides: resolution, channels, classes."""

    channels: int = option(192, "Width of the network's first level", shown="", above=0)
    channel_mult: tuple[int, ...] = option((1, 2, 3, 4), "Width of each level, in units of --channels", shown="")
    num_blocks: int = option(3, "Residual blocks in each level", shown="", above=0)  # the decoder has one more
    attn_resolutions: tuple[int, ...] = option((16, 8), "Resolutions of the levels with self-attention", shown="")
    channels_per_head: int = 64
    dropout: float = option(0.0, "Dropout probability", shown="", least=0, below=1)
    precision: Precision = option(
        "fp16",
        "Number format of the U-Net; fp16 is float32 without a CUDA device, auto = the fastest here",
        choices=PRECISIONS,
        extra={"settled": (AUTO,)},  # values of the option that are replaced before there is a configuration
    )

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ConfigError("--channel-mult needs one whole number above 0 for each level, e.g. 1,2,3,4")
        if any(resolution < 0 for resolution in self.attn_resolutions):
            raise ConfigError("--attn-resolutions needs whole numbers such as 16,8; 0 means no level")

    def fitted_to(self, resolution: int) -> "NetworkConfig":
        """Return the same with narrower attention heads, if a level with attention is narrower than a usual head.

        A level with fewer channels than one head would have no attention at all (training/networks_edm2.py, Block).
        """
        levels = list(enumerate(self.channel_mult))
        attending = [mult for i, mult in levels if resolution >> i in self.attn_resolutions or i == len(levels) - 1]
        narrowest = self.channels * min(attending)
        return dataclasses.replace(self, channels_per_head=min(self.channels_per_head, narrowest))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for Precond."""
        return {
            "model_channels": self.channels,
            "channel_mult": list(self.channel_mult),
            "num_blocks": self.num_blocks,
            "attn_resolutions": list(self.attn_resolutions),
            "channels_per_head": self.channels_per_head,
            "dropout": self.dropout,
            "use_fp16": self.precision in ("fp16", "bf16"),  # when sampling from it
        }


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Measurements while a run trains; see training/run/run_metrics.py."""

    PREFIX: ClassVar = "metrics-"  # of the options

    # Names in training.metrics.metric_table, or ("all",).
    names: tuple[str, ...] = option(help="Measure the averaged networks: fd_efflite0, fid, ...", flag="metrics")
    ref: str | None = option(None, "Reference statistics for --metrics", value="PATH|URL")
    every: int | None = option(  # None = whenever a snapshot is taken
        None, "Interval of measurements, each with a snapshot", value="NIMG", shown="--snapshot", above=0
    )
    num: int = option(5000, "Images to measure of each network", value="NIMG", least=2)  # from the seeds 0, 1, ...
    batch: int = option(32, "Images at once per process, for --metrics", least=1)
    steps: int = option(32, "Sampling steps for --metrics", least=2)  # of Heun's method
    weights: dict[str, str] = field(default_factory=dict)  # files by detector, in place of the published ones

    def __post_init__(self) -> None:
        parse_metrics(self.names)
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """A grid at each snapshot: a row for each class, with images from seeds that stay the same.

    See training/run/run_samples.py.
    """

    PREFIX: ClassVar = "samples-"

    num: int = option(
        help="Draw a sample grid at each snapshot: images per class",
        flag="samples",
        shown="0",
        least=1,
        most=MAX_SAMPLES,
    )
    classes: tuple[int | str, ...] | None = option(
        None, "Classes, by number or name, in the rows of sample grids", shown="all, or 10 spread over them"
    )
    std: float | None = option(
        None, "EMA length of the network in sample grids", shown="best for the preset"
    )  # None = the first one
    steps: int = option(32, "Sampling steps for --samples", least=2)  # of Heun's method
    batch: int = option(32, "Images at once per process, for --samples", least=1)

    def __post_init__(self) -> None:
        check_limits(self)
        if self.classes is not None and not (self.classes and all(isinstance(c, str) or c >= 0 for c in self.classes)):
            raise ConfigError("--samples-classes needs class numbers from 0 on, or names, e.g. 0,1,7")

    def check_tracked(self, ema_stds: Sequence[float]) -> None:
        """Raise ConfigError if the run does not track the EMA length."""
        if self.std is not None and f"{self.std:.3f}" not in [f"{std:.3f}" for std in ema_stds]:
            tracked = ", ".join(f"{std:.3f}" for std in ema_stds)
            raise ConfigError(f"--samples-std={self.std:g} is not a tracked length; choose from {tracked}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """All options of a training run. Image counts are numbers of images, over all processes."""

    data: str = option(help="The data set  [required, unless the preset brings one]", value="ZIP|DIR|URL")
    dataset_class: str | None = option(
        None, "Own data set class for --data, if it needs that", flag="dataset", value="MODULE:CLASS", shown="none"
    )
    dataset_args: dict[str, Any] | None = option(None, "Arguments of --dataset")
    shuffle_buffer: int | None = option(  # None = SHUFFLE_BUFFER
        None, "Images to shuffle over, for data at a URL", value="IMAGES", shown="10000", above=0
    )
    cond: bool = option(True, "Train a class-conditional model")
    xflip: bool = option(False, "Also train on mirrored images")
    balance: bool = option(  # see training/dataset/order.py
        False, "See every class equally often, whatever its size", value="/", shown=""
    )
    label_dropout: float = option(
        0.0, "Probability of learning an image without its label, for --gnet=self", shown="0", least=0, below=1
    )
    condition: str | None = option(  # see training/condition/spec.py
        None, "Let the network see lowres:FACTOR (super-resolution) or inpaint[:MIN-MAX]", value="KIND", shown="none"
    )
    vae: str | None = None  # encode pixels with this VAE while training: hub name or local folder
    encoder_precision: str | None = None  # of that VAE, one of ENCODER_PRECISIONS; None = tf32
    network_class: str | None = option(  # see training/own
        None, "Own network in place of ours (docs/extending.md)", flag="network", value="MODULE:CLASS", shown="none"
    )
    network_args: dict[str, Any] | None = option(None, "Arguments of --network")
    network: NetworkConfig = NetworkConfig()
    P_mean: float = option(-0.4, "Mean of ln(sigma)", shown="")
    P_std: float = option(1.0, "Standard deviation of ln(sigma)", shown="", above=0)
    loss_class: str | None = option(None, "Own loss in place of ours", flag="loss", value="MODULE:CLASS", shown="none")
    loss_args: dict[str, Any] | None = option(None, "Arguments of --loss")
    lr: float = option(0.01, "Reference learning rate", shown="", above=0)
    decay: float = option(
        70e3, "Batches before the learning rate decays; 0 = never", value="BATCHES", shown="", least=0
    )
    rampup: float = option(10.0, "Learning rate ramp-up, millions of images; 0 = none", value="MIMG", shown="", least=0)
    ema_stds: tuple[float, ...] = option((0.050, 0.100), "EMA lengths to track, relative to training time", shown="")
    batch: int = option(2048, "Total batch size, over all processes", value="NIMG", shown="", above=0)
    seed: int = option(0, "Random seed", least=0, most=(1 << 63) - 1)
    ls: float | Literal["auto"] = option(
        1.0, "Factor on the loss; auto = adapted to the gradients", value="FLOAT|auto", shown="1", above=0
    )
    init: str | None = option(None, "Start from the weights of a snapshot", value="PKL|URL")
    init_partial: bool = option(False, "Initialize tensors that do not fit --init, instead of failing", value="")
    duration: int = neutral(1 << 31, "Training duration", value="NIMG", shown="", above=0)
    batch_gpu: int | None = neutral(  # None = no accumulation
        None, "Limit of the batch size on one GPU (gradient accumulation)", value="NIMG", above=0
    )
    status: int = neutral(128 << 10, "Interval of status lines; 0 = none", value="NIMG", least=0)
    snapshot: int = neutral(8 << 20, "Interval of network snapshots; 0 = none", value="NIMG", least=0)
    checkpoint: int = neutral(128 << 20, "Interval of checkpoints; 0 = none", value="NIMG", least=0)
    snapshot_format: str = neutral(
        "pkl", "File format of snapshots", flag="format", choices=("pkl", "safetensors", "both")
    )
    keep_checkpoints: int = neutral(2, "Checkpoints to keep; 0 = all", least=0)
    background_saves: bool = neutral(True, "Write files while training continues, from a copy in host memory")
    on_disk_full: str = neutral("stop", "What to do when the disk is full", choices=("stop", "wait"))
    bench: bool = neutral(True, "Let cuDNN time its algorithms and take the fastest")
    compile: bool | None = neutral(None, "Compile the network", shown="on CUDA devices")
    recompute: bool = neutral(False, "Save memory: compute activations again in the backward pass")
    shard: bool = neutral(False, "Save memory: spread weights over the processes (FSDP2)")
    shard_group: int | None = neutral(
        None, "Processes that share one copy of the weights, for --shard", shown="all", above=0
    )
    workers: int = neutral(0, "Data-loading processes", shown="2 with a GPU, else 0", least=0)
    data_cache: str | None = neutral(
        None, "Folder that keeps the shards of data at a URL", value="DIR", shown="in the cache folder"
    )
    data_cache_size: int = neutral(
        50 * 10**9, "Size limit of the shards in --data-cache", value="SIZE", shown="50GB", above=0
    )
    metrics: MetricsConfig | None = neutral(None)  # None = nothing is measured
    slice: int | None = neutral(
        None, "End the session after NIMG images; the next one continues", value="NIMG", above=0
    )
    on_nonfinite: str = neutral(
        "stop", "What to do when loss or gradients stay infinite or NaN", choices=("stop", "continue")
    )
    nonfinite_limit: int = neutral(3, "Status intervals with such values before --on-nonfinite acts", above=0)
    monitor: bool = neutral(
        False, "Record magnitudes of gradients, and of each block's activations and weights, in stats.jsonl", value=""
    )
    samples: SamplesConfig | None = neutral(None)  # None = no sample grids

    def __post_init__(self) -> None:
        check_limits(self)
        self._check_data()
        self._check_own_parts()
        if self.shard_group is not None and not self.shard:
            raise ConfigError(f"--shard-group={self.shard_group} needs --shard=True")
        if len({f"{std:.3f}" for std in self.ema_stds}) != len(self.ema_stds) or not self.ema_stds:
            raise ConfigError("--ema-stds needs at least one length, and no two that are equal to three decimals")
        if self.metrics is not None and self.metrics.every is None and self.snapshot == 0:
            raise ConfigError("--metrics measures each snapshot; with --snapshot=0, give --metrics-every")
        if self.samples is not None:
            self.samples.check_tracked(self.ema_stds)
            if self.snapshot == 0 and self.metrics is None:
                raise ConfigError("--samples draws a grid at each snapshot; --snapshot=0 takes none")

    def _check_own_parts(self) -> None:
        for part in ("network", "loss", "dataset"):
            if getattr(self, f"{part}_args") is not None and getattr(self, f"{part}_class") is None:
                raise ConfigError(f"--{part}-args needs --{part}=module:Class")
        if self.network_class is None:
            return
        if self.recompute:
            raise ConfigError("--recompute is for our network; an own one may call torch.utils.checkpoint itself")
        if self.snapshot_format != "safetensors":
            raise ConfigError(f"--format={self.snapshot_format} cannot hold an own network; use --format=safetensors")

    @property
    def has_own_parts(self) -> bool:
        """True if the network or the loss is of the user's own."""
        return self.network_class is not None or self.loss_class is not None

    def _check_data(self) -> None:
        """Raise ConfigError for options that do not go together, whatever is in the data set."""
        if self.shuffle_buffer is not None and not is_remote(self.data):
            raise ConfigError(
                f"--shuffle-buffer={self.shuffle_buffer} is for data behind a URL; --data={self.data} is shuffled whole"
            )
        if self.label_dropout and not self.cond:
            raise ConfigError(
                f"--label-dropout={self.label_dropout} needs a conditional network; leave it or --cond=False out"
            )
        if self.balance and is_remote(self.data):
            raise ConfigError(
                f"--balance needs all images on a local disk, but --data={self.data} is streamed; copy the data set,"
                " or leave --balance out"
            )

    @property
    def uses_labels(self) -> bool:
        """True if the run reads the labels of the data set."""
        return self.cond or self.balance

    @property
    def shuffle_images(self) -> int:
        """Number of images over which a data set behind a URL is shuffled, at least."""
        return SHUFFLE_BUFFER if self.shuffle_buffer is None else self.shuffle_buffer

    def crosses(self, interval: int, nimg: int) -> bool:
        """Return whether the iteration that ends at `nimg` crosses a multiple of `interval` images (0 = none)."""
        return interval > 0 and nimg // interval > (nimg - self.batch) // interval

    def saves_at(self, nimg: int) -> bool:
        """Return whether an iteration ends at `nimg` images after which files are due."""
        every = self.metrics.every if self.metrics is not None else None
        intervals = (self.snapshot, self.checkpoint, every or 0)
        is_last = nimg - self.batch < self.duration <= nimg
        return nimg % self.batch == 0 and (is_last or any(self.crosses(interval, nimg) for interval in intervals))

    def share_of(self, num_ranks: int) -> tuple[int, int]:
        """Return images per process and iteration, and the rounds of accumulation that they are split into."""
        if self.batch % num_ranks:
            fit = max(self.batch // num_ranks, 1) * num_ranks
            raise ConfigError(f"--batch={self.batch} does not divide over {num_ranks} processes; try --batch={fit}")
        share = self.batch // num_ranks
        per_round = min(self.batch_gpu, share) if self.batch_gpu is not None else share
        if share % per_round:
            fit = max(n for n in range(1, per_round + 1) if share % n == 0)
            raise ConfigError(
                f"--batch={self.batch} over {num_ranks} processes leaves {share} images each, which do not divide into"
                f" rounds of --batch-gpu={per_round}; try --batch-gpu={fit}"
            )
        return share, share // per_round

    def compiles_on(self, device: "torch.device") -> bool:
        """Return whether the network is compiled on `device`: if that is asked for, and a compiler is found."""
        from torch_utils.compiling import missing_compiler  # here, because options are made without torch

        return self.asks_to_compile_on(device) and missing_compiler(device) is None

    def asks_to_compile_on(self, device: "torch.device") -> bool:
        """Return whether the options ask for a compiled network on `device`."""
        return device.type == "cuda" if self.compile is None else self.compile

    def shards_over(self, num_ranks: int) -> bool:
        """Return whether each process keeps only a part of the weights."""
        return self.shard and num_ranks > 1

    def group_of(self, num_ranks: int) -> int:
        """Return how many processes share one copy of sharded weights. Raises ConfigError."""
        group = num_ranks if self.shard_group is None else self.shard_group
        if self.shards_over(num_ranks) and num_ranks % group:
            raise ConfigError(
                f"--shard-group={group} does not divide {num_ranks} processes; try {math.gcd(group, num_ranks)}"
            )
        return group

    def to_json(self) -> str:
        """Return the text of training_options.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def differences(self, stored: str) -> list[str]:
        """Return the options that would change the result of the run whose training_options.json is `stored`."""
        try:
            old = dict(json.loads(stored))
            old_network = dict(old["network"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError("training_options.json cannot be read; give another --outdir") from None
        new = json.loads(self.to_json())
        neutral = {f.name for f in dataclasses.fields(self) if f.metadata.get("neutral")}
        pairs = [(key, old.get(key), value) for key, value in new.items() if key not in neutral | {"network"}]
        pairs += [(key, old_network.get(key), value) for key, value in new["network"].items()]
        return [f"{key}: {_shown(was)} in the run, {now} asked for" for key, was, now in pairs if was != now]


def is_published(stored: str) -> bool:
    """Return whether the text of a training_options.json is that of the published code."""
    try:
        options = json.loads(stored)
    except (ValueError, RecursionError):
        return False
    return isinstance(options, dict) and "network" not in options and "network_kwargs" in options


def _shown(value: Any) -> str:
    """Return a value from a file as one line of bounded length."""
    text = str(value)
    return text if text.isprintable() and len(text) <= 100 else json.dumps(value)[:100]
