"""Presets: the training settings of the published networks, and the published ways to sample from them.

Sources: Tables 2, 3 and 5 of arXiv 2312.02696, Table 1 of arXiv 2406.02507, and arXiv 2404.07724 for guidance in an
interval of noise levels. The published network files are licensed for non-commercial use only (CC BY-NC-SA 4.0), unlike
this code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from dnnlib.download import is_url
from dnnlib.errors import ConfigError
from dnnlib.parse import PrintedNumber
from dnnlib.text import unknown
from training.config import NetworkConfig, TrainingConfig

MODEL_ROOT = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"

# Relative network paths of presets start here.
REPOSITORY_DIR = Path(__file__).parents[1]

SMALL = "small"  # of training, chosen by the data: training/small_data/plan.py

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GenerationPreset:
    """The networks to sample from, and the published score."""

    net: str  # http(s) URL, or path of a shipped file relative to the repository
    gnet: str | None = None  # the guide, likewise
    guidance: float = 1.0  # 1 = no guide
    interval: tuple[float, float] | None = None  # guide only steps that start at noise levels in (low, high]
    metric: str | None = None  # fid or fd_dinov2, of 50,000 images
    score: float | None = None  # published value of that metric


# Preset, network, guide, guidance, published score; networks are named {model}-{kimg}-{std}.
_PUBLISHED: tuple[tuple[str, str, str | None, float, float], ...] = (
    ("edm2-img512-xs-fid", "img512-xs-2147483-0.135", None, 1, 3.53),
    ("edm2-img512-xs-dino", "img512-xs-2147483-0.200", None, 1, 103.39),
    ("edm2-img512-s-fid", "img512-s-2147483-0.130", None, 1, 2.56),
    ("edm2-img512-s-dino", "img512-s-2147483-0.190", None, 1, 68.64),
    ("edm2-img512-m-fid", "img512-m-2147483-0.100", None, 1, 2.25),
    ("edm2-img512-m-dino", "img512-m-2147483-0.155", None, 1, 58.44),
    ("edm2-img512-l-fid", "img512-l-1879048-0.085", None, 1, 2.06),
    ("edm2-img512-l-dino", "img512-l-1879048-0.155", None, 1, 52.25),
    ("edm2-img512-xl-fid", "img512-xl-1342177-0.085", None, 1, 1.96),
    ("edm2-img512-xl-dino", "img512-xl-1342177-0.155", None, 1, 45.96),
    ("edm2-img512-xxl-fid", "img512-xxl-0939524-0.070", None, 1, 1.91),
    ("edm2-img512-xxl-dino", "img512-xxl-0939524-0.150", None, 1, 42.84),
    ("edm2-img64-s-fid", "img64-s-1073741-0.075", None, 1, 1.58),
    ("edm2-img64-m-fid", "img64-m-2147483-0.060", None, 1, 1.43),
    ("edm2-img64-l-fid", "img64-l-1073741-0.040", None, 1, 1.33),
    ("edm2-img64-xl-fid", "img64-xl-0671088-0.040", None, 1, 1.33),
    ("edm2-img512-xs-guid-fid", "img512-xs-2147483-0.045", "img512-xs-uncond-2147483-0.045", 1.40, 2.91),
    ("edm2-img512-xs-guid-dino", "img512-xs-2147483-0.150", "img512-xs-uncond-2147483-0.150", 1.70, 79.94),
    ("edm2-img512-s-guid-fid", "img512-s-2147483-0.025", "img512-xs-uncond-2147483-0.025", 1.40, 2.23),
    ("edm2-img512-s-guid-dino", "img512-s-2147483-0.085", "img512-xs-uncond-2147483-0.085", 1.90, 52.32),
    ("edm2-img512-m-guid-fid", "img512-m-2147483-0.030", "img512-xs-uncond-2147483-0.030", 1.20, 2.01),
    ("edm2-img512-m-guid-dino", "img512-m-2147483-0.015", "img512-xs-uncond-2147483-0.015", 2.00, 41.98),
    ("edm2-img512-l-guid-fid", "img512-l-1879048-0.015", "img512-xs-uncond-2147483-0.015", 1.20, 1.88),
    ("edm2-img512-l-guid-dino", "img512-l-1879048-0.035", "img512-xs-uncond-2147483-0.035", 1.70, 38.20),
    ("edm2-img512-xl-guid-fid", "img512-xl-1342177-0.020", "img512-xs-uncond-2147483-0.020", 1.20, 1.85),
    ("edm2-img512-xl-guid-dino", "img512-xl-1342177-0.030", "img512-xs-uncond-2147483-0.030", 1.70, 35.67),
    ("edm2-img512-xxl-guid-fid", "img512-xxl-0939524-0.015", "img512-xs-uncond-2147483-0.015", 1.20, 1.81),
    ("edm2-img512-xxl-guid-dino", "img512-xxl-0939524-0.015", "img512-xs-uncond-2147483-0.015", 1.70, 33.09),
    ("edm2-img512-s-guid-interval-fid", "img512-s-2147483-0.025", "img512-xs-uncond-2147483-0.025", 2.10, 1.68),
    ("edm2-img512-s-guid-interval-dino", "img512-s-2147483-0.085", "img512-xs-uncond-2147483-0.085", 3.20, 46.25),
    ("edm2-img512-xxl-guid-interval-fid", "img512-xxl-0939524-0.015", "img512-xs-uncond-2147483-0.015", 2.00, 1.40),
    ("edm2-img512-xxl-guid-interval-dino", "img512-xxl-0939524-0.015", "img512-xs-uncond-2147483-0.015", 2.90, 29.16),
    ("edm2-img512-s-autog-fid", "img512-s-2147483-0.070", "img512-xs-0134217-0.125", 2.10, 1.34),
    ("edm2-img512-s-autog-dino", "img512-s-2147483-0.120", "img512-xs-0134217-0.165", 2.45, 36.67),
    ("edm2-img512-xxl-autog-fid", "img512-xxl-0939524-0.075", "img512-m-0268435-0.155", 2.05, 1.25),
    ("edm2-img512-xxl-autog-dino", "img512-xxl-0939524-0.130", "img512-m-0268435-0.205", 2.30, 24.18),
    ("edm2-img512-s-uncond-autog-fid", "img512-s-uncond-2147483-0.070", "img512-xs-uncond-0134217-0.110", 2.85, 3.86),
    ("edm2-img512-s-uncond-autog-dino", "img512-s-uncond-2147483-0.090", "img512-xs-uncond-0134217-0.125", 2.90, 90.39),
    ("edm2-img64-s-autog-fid", "img64-s-1073741-0.045", "img64-xs-0134217-0.110", 1.70, 1.01),
    ("edm2-img64-s-autog-dino", "img64-s-1073741-0.105", "img64-xs-0134217-0.175", 2.20, 31.85),
)
# As printed: bounds mean the nearest noise levels of the schedule, such as 2.9015 (training/sampling/guidance.py).
_INTERVALS = {
    "edm2-img512-s-guid-interval-fid": ("0.28", "2.90"),
    "edm2-img512-s-guid-interval-dino": ("0.60", "5.00"),
    "edm2-img512-xxl-guid-interval-fid": ("0.19", "1.61"),
    "edm2-img512-xxl-guid-interval-dino": ("0.60", "5.00"),
}


def _hosted(name: str) -> str:
    return f"{MODEL_ROOT}edm2-{name}.pkl"


def _published(preset: str, net: str, gnet: str | None, guidance: float, score: float) -> GenerationPreset:
    low, high = _INTERVALS.get(preset, (None, None))
    # The last part of a preset's name is the metric that it was tuned for.
    return GenerationPreset(
        net=_hosted(net),
        gnet=None if gnet is None else _hosted(gnet),
        guidance=guidance,
        interval=None if low is None or high is None else (PrintedNumber(low), PrintedNumber(high)),
        metric={"fid": "fid", "dino": "fd_dinov2"}[preset.rpartition("-")[2]],
        score=score,
    )


GENERATION: Mapping[str, GenerationPreset] = {
    **{row[0]: _published(*row) for row in _PUBLISHED},
    # The networks that the repository carries (models/README.md), by autoguidance.
    "demo": GenerationPreset(net="models/fashion.safetensors", gnet="models/fashion-guide.safetensors", guidance=1.5),
}


def _img512(*, duration_Mi: int, channels: int, lr: float, dropout: float = 0.0) -> TrainingConfig:
    network = NetworkConfig(channels=channels, dropout=dropout)
    return TrainingConfig(data="", network=network, duration=duration_Mi << 20, lr=lr)


def _img64(*, duration_Mi: int, channels: int, lr: float, dropout: float = 0.0) -> TrainingConfig:
    config = _img512(duration_Mi=duration_Mi, channels=channels, lr=lr, dropout=dropout)
    return replace(config, decay=35e3, P_mean=-0.8, P_std=1.6)


# The shipped network's recipe: small and short enough for two CPU cores, on 32x32 pixels of one channel.
_FASHION = TrainingConfig(
    data=str(Path("data", "fashion-mnist-32.zip")),
    network=NetworkConfig(
        channels=16, channel_mult=(1, 2, 4), num_blocks=1, attn_resolutions=(8,), channels_per_head=32
    ),
    P_mean=-0.6,
    P_std=1.4,
    lr=0.012,
    decay=2000,
    rampup=0.02,
    batch=32,
    duration=160 << 10,
    status=4 << 10,
    snapshot=16 << 10,
    checkpoint=16 << 10,
)

# If a row leaves `data` empty, the caller fills it in.
TRAINING: Mapping[str, TrainingConfig] = {
    "edm2-img512-xxs": _img512(duration_Mi=2048, channels=64, lr=0.0170),
    "edm2-img512-xs": _img512(duration_Mi=2048, channels=128, lr=0.0120),
    "edm2-img512-s": _img512(duration_Mi=2048, channels=192, lr=0.0100),
    "edm2-img512-m": _img512(duration_Mi=2048, channels=256, lr=0.0090, dropout=0.10),
    "edm2-img512-l": _img512(duration_Mi=1792, channels=320, lr=0.0080, dropout=0.10),
    "edm2-img512-xl": _img512(duration_Mi=1280, channels=384, lr=0.0070, dropout=0.10),
    "edm2-img512-xxl": _img512(duration_Mi=896, channels=448, lr=0.0065, dropout=0.10),
    "edm2-img64-xs": _img64(duration_Mi=1024, channels=128, lr=0.0120),
    "edm2-img64-s": _img64(duration_Mi=1024, channels=192, lr=0.0100),
    "edm2-img64-m": _img64(duration_Mi=2048, channels=256, lr=0.0090, dropout=0.10),
    "edm2-img64-l": _img64(duration_Mi=1024, channels=320, lr=0.0080, dropout=0.10),
    "edm2-img64-xl": _img64(duration_Mi=640, channels=384, lr=0.0070, dropout=0.10),
    "fashion": _FASHION,
}


def generation_preset(name: str) -> GenerationPreset:
    """Return the row `name`. Raises ConfigError with similar names if it does not exist."""
    return _look_up(GENERATION, name, "generation")


def training_preset(name: str) -> TrainingConfig:
    """Return the row `name`. Raises ConfigError with similar names if it does not exist."""
    return _look_up(TRAINING, name, "training", (SMALL,))


def describe_generation_presets() -> str:
    """A line per preset: name, guidance, published score, interval of guided noise levels."""
    lines = []
    for name, row in GENERATION.items():
        guidance = f"guidance {row.guidance:.2f}" if row.gnet is not None else ""
        score = f"{row.metric} {row.score:.2f}" if row.metric is not None and row.score is not None else ""
        interval = "interval {},{}".format(*row.interval) if row.interval is not None else ""
        lines.append(f"{name:<36}{guidance:<16}{score:<18}{interval}".rstrip())
    return "\n".join(lines)


def locate(network: str) -> str:
    """Path or URL of a row's network file; relative paths are inside the repository."""
    return network if is_url(network) else str(REPOSITORY_DIR / network)


def _look_up(table: Mapping[str, T], name: str, kind: str, more: tuple[str, ...] = ()) -> T:
    if name in table:
        return table[name]
    raise ConfigError(unknown(f"{kind} preset", name, [*table, *more]))
