"""What a training run is: its options as one value that can be checked, stored and compared."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dnnlib.errors import ConfigError
from torch_utils.precision import PRECISIONS, Precision
from training.condition.spec import parse_condition
from training.metrics.metric_table import parse_metrics
from training.run.label_dropout import check_options
from training.run.samples_config import SamplesConfig
from training.streaming.remote import is_remote

SHUFFLE_BUFFER = 10_000  # images of a data set behind a URL


def _neutral(**kwargs: Any) -> Any:
    """A field that cannot change what is learned, so that a run may continue with another value."""
    return field(metadata={"neutral": True}, **kwargs)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The shape of the network; what the data decides (resolution, channels, classes) is not in here."""

    channels: int = 192  # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)  # width of each level, in units of `channels`
    num_blocks: int = 3  # residual blocks a level in the encoder; the decoder has one more
    attn_resolutions: tuple[int, ...] = (16, 8)  # sides, in pixels, of the levels with self-attention
    channels_per_head: int = 64
    dropout: float = 0.0  # probability
    precision: Precision = "fp16"  # of the U-Net while training; fp16 is float32 without a CUDA device

    def fitted_to(self, resolution: int) -> "NetworkConfig":
        """The same, with narrower attention heads where a level with attention is too narrow for the usual ones.

        A level of fewer channels than one head would have no attention at all (training/networks_edm2.py, Block).
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
    """What is measured while a run trains; see training/run/run_metrics.py."""

    names: tuple[str, ...]  # of training.metrics.metric_table, or ("all",)
    ref: str | None = None  # reference statistics, path or URL
    every: int | None = None  # images between measurements, each with a snapshot; None = whenever one is taken
    num: int = 5000  # images that each average generates, from the seeds 0, 1, ...
    batch: int = 32  # images at once and process
    steps: int = 32  # of Heun's method
    weights: dict[str, str] = field(default_factory=dict)  # files by detector, in place of the published ones

    def __post_init__(self) -> None:
        parse_metrics(self.names)
        positive = {"every": 1 if self.every is None else self.every, "batch": self.batch}
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"--metrics-{name}={value} must be a number above 0")
        for name, value in {"num": self.num, "steps": self.steps}.items():
            if value < 2:
                raise ConfigError(f"--metrics-{name}={value} is too small; 2 is the least")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """All options of a training run. Image counts are numbers of images, over all processes."""

    data: str  # path or URL of the data set
    shuffle_buffer: int | None = None  # images to shuffle over, for a URL; None = SHUFFLE_BUFFER
    cond: bool = True
    xflip: bool = False
    balance: bool = False  # every class equally often, see training/dataset/balanced_order.py
    label_dropout: float = 0.0  # probability that an image is learned without its label
    condition: str | None = None  # image that the network sees beside the noisy one, see training/condition/spec.py
    vae: str | None = None  # encode pixels with this VAE while training: hub name or local folder
    network: NetworkConfig = NetworkConfig()
    P_mean: float = -0.4  # mean and standard deviation of ln(sigma)
    P_std: float = 1.0
    lr: float = 0.01  # reference learning rate
    decay: float = 70e3  # batches before the learning rate decays
    rampup: float = 10.0  # ramp-up of the learning rate, millions of images
    ema_stds: tuple[float, ...] = (0.050, 0.100)  # tracked EMA lengths relative to training time
    batch: int = 2048
    seed: int = 0
    ls: float | Literal["auto"] = 1.0  # loss scale; auto = adaptive
    init: str | None = None  # snapshot whose weights the run starts from
    init_partial: bool = False  # leave tensors of `init` that do not fit as they were initialized
    duration: int = _neutral(default=1 << 31)
    batch_gpu: int | None = _neutral(default=None)  # images a process and round; None = no accumulation
    status: int = _neutral(default=128 << 10)  # 0 = never, also below
    snapshot: int = _neutral(default=8 << 20)
    checkpoint: int = _neutral(default=128 << 20)
    snapshot_format: str = _neutral(default="pkl")  # pkl, safetensors or both
    keep_checkpoints: int = _neutral(default=2)  # the newest ones; 0 = all
    background_saves: bool = _neutral(default=True)  # write files while training goes on
    on_disk_full: str = _neutral(default="stop")  # stop or wait
    bench: bool = _neutral(default=True)  # let cuDNN time its algorithms
    compile: bool | None = _neutral(default=None)  # compile the network; None = on CUDA devices
    recompute: bool = _neutral(default=False)  # compute a block's activations again for the backward pass
    shard: bool = _neutral(default=False)  # spread weights, moments and averages over the processes
    shard_group: int | None = _neutral(default=None)  # processes that share one copy; None = all
    workers: int = _neutral(default=0)  # processes that read data, a rank
    data_cache: str | None = _neutral(default=None)  # folder for what is read from a URL; None = the usual one
    data_cache_size: int = _neutral(default=50 * 10**9)  # bytes of shards in it, at most
    metrics: MetricsConfig | None = field(default=None, metadata={"neutral": True})  # None = nothing is measured
    slice: int | None = _neutral(default=None)  # images until a session ends; None = the whole duration
    on_nonfinite: str = _neutral(default="stop")  # stop or continue
    nonfinite_limit: int = _neutral(default=3)  # status intervals in a row before that
    monitor: bool = _neutral(default=False)  # magnitudes of gradients, activations and weights in stats.jsonl
    samples: SamplesConfig | None = field(default=None, metadata={"neutral": True})  # None = no sample grids

    def __post_init__(self) -> None:
        positive: dict[str, float] = {"batch": self.batch, "duration": self.duration, "channels": self.network.channels}
        positive |= {"batch-gpu": self.batch_gpu if self.batch_gpu is not None else 1, "lr": self.lr}
        positive |= {"shard-group": 1 if self.shard_group is None else self.shard_group}
        positive |= {"ls": 1.0 if self.ls == "auto" else self.ls}
        positive |= {"P_std": self.P_std, "num-blocks": self.network.num_blocks}
        positive |= {"slice": 1 if self.slice is None else self.slice, "nonfinite-limit": self.nonfinite_limit}
        positive |= {"shuffle-buffer": self.shuffle_images, "data-cache-size": self.data_cache_size}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"--{name}={value} must be a number above 0")
        if self.shard_group is not None and not self.shard:
            raise ConfigError(f"--shard-group={self.shard_group} is for a sharded run; add --shard=True")
        not_negative: dict[str, float] = {
            "status": self.status,
            "snapshot": self.snapshot,
            "checkpoint": self.checkpoint,
        }
        not_negative |= {"keep-checkpoints": self.keep_checkpoints}
        not_negative |= {"workers": self.workers, "decay": self.decay, "rampup": self.rampup, "seed": self.seed}
        for name, value in not_negative.items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"--{name}={value} must be a number, and not negative")
        if self.shuffle_buffer is not None and not is_remote(self.data):
            raise ConfigError(
                f"--shuffle-buffer={self.shuffle_buffer} is for data behind a URL; --data={self.data} is shuffled whole"
            )
        check_options(self, is_remote=is_remote(self.data))
        if self.condition is not None:
            parse_condition(self.condition)
        if not math.isfinite(self.P_mean):
            raise ConfigError(f"--P_mean={self.P_mean} must be a number")
        if self.seed >= 1 << 63:
            raise ConfigError(f"--seed={self.seed} must be below 2^63")
        if self.network.precision not in PRECISIONS:
            raise ConfigError(f"--precision={self.network.precision} is unknown; use {', '.join(PRECISIONS)}")
        if not 0 <= self.network.dropout < 1:
            raise ConfigError(f"--dropout={self.network.dropout} is no probability below 1")
        if not self.network.channel_mult or min(self.network.channel_mult) < 1:
            raise ConfigError("--channel-mult needs one whole number above 0 for each level, e.g. 1,2,3,4")
        if len({f"{std:.3f}" for std in self.ema_stds}) != len(self.ema_stds) or not self.ema_stds:
            raise ConfigError("--ema-stds needs at least one length, and no two that are equal to three decimals")
        if self.metrics is not None and self.metrics.every is None and self.snapshot == 0:
            raise ConfigError(
                "--metrics measures whenever a snapshot is taken; with --snapshot=0, give --metrics-every"
            )

        if self.samples is not None:
            self.samples.check_tracked(self.ema_stds)
            if self.snapshot == 0 and self.metrics is None:
                raise ConfigError("--samples draws whenever a snapshot is taken; with --snapshot=0 there is none")

    @property
    def shuffle_images(self) -> int:
        """Images of a data set behind a URL that are shuffled among each other, at least."""
        return SHUFFLE_BUFFER if self.shuffle_buffer is None else self.shuffle_buffer

    def share_of(self, num_ranks: int) -> tuple[int, int]:
        """Images a process and iteration, and rounds of accumulation that they are split into."""
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

    def compiles_on(self, device: torch.device) -> bool:
        """Whether the network is compiled there."""
        return device.type == "cuda" if self.compile is None else self.compile

    def shards_over(self, num_ranks: int) -> bool:
        """Whether each process keeps only a part of the weights."""
        return self.shard and num_ranks > 1

    def group_of(self, num_ranks: int) -> int:
        """How many processes share one copy of the weights where they are sharded. Raises ConfigError."""
        group = num_ranks if self.shard_group is None else self.shard_group
        if self.shards_over(num_ranks) and num_ranks % group:
            raise ConfigError(
                f"--shard-group={group} does not divide {num_ranks} processes; try {math.gcd(group, num_ranks)}"
            )
        return group

    def to_json(self) -> str:
        """The text of training_options.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def differences(self, stored: str) -> list[str]:
        """What in this configuration would change the result of the run whose training_options.json says `stored`."""
        try:
            old = {"balance": False, "label_dropout": 0.0} | json.loads(stored)  # runs from before have neither
            old_network = dict(old["network"])
            if "fp16" in old_network:  # runs from before there were more precisions than these two
                old_network["precision"] = "fp16" if old_network["fp16"] else "fp32"
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError("training_options.json cannot be read; give another --outdir") from None
        new = json.loads(self.to_json())
        neutral = {f.name for f in dataclasses.fields(self) if f.metadata.get("neutral")}
        pairs = [(key, old.get(key), value) for key, value in new.items() if key not in neutral | {"network"}]
        pairs += [(key, old_network.get(key), value) for key, value in new["network"].items()]
        return [f"{key}: {_shown(was)} in the run, {now} asked for" for key, was, now in pairs if was != now]


def _shown(value: Any) -> str:
    """A value out of a file, on one line of bounded length."""
    text = str(value)
    return text if text.isprintable() and len(text) <= 100 else json.dumps(value)[:100]
