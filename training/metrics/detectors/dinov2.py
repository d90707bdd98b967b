"""DINOv2 ViT-L/14, the network behind FD_DINOv2 (Stein et al., arXiv 2306.04675; Oquab et al., arXiv 2304.07193)."""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import nn

from dnnlib.errors import ConfigError, one_line, reason_of
from dnnlib.text import did_you_mean
from training.metrics.detectors.common import Detector, DetectorOutput, read_tensors, resize_antialiased

REPO = "facebook/dinov2-large"
REVISION = "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c"
FILES = ("config.json", "model.safetensors")
SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SETTINGS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "hidden_act",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "qkv_bias",
    "use_swiglu_ffn",
    "use_mask_token",
)
RESIZE_MODES = ("torch", "pil")
HEAD_WIDTH = 64  # of all published DINOv2 networks
# Names in torch.hub's file -> names of `facebook/dinov2-large`.
_HUB_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_HUB_LAYER_NAMES = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_ADVICE = (
    f"fetch {' and '.join(FILES)} of https://huggingface.co/{REPO} (revision {REVISION}) into one folder and give it"
    " by --dinov2-weights=FOLDER; torch.hub's dinov2_vitl14_pretrain.pth works as well"
)


class DINOv2Detector(Detector):
    """DINOv2 ViT-L/14: the class token after the last layer norm, 1024 features.

    resize_mode: antialiased bicubic interpolation to 224x224: "torch" in floating point, or "pil" (slow), image by
                 image and rounded to whole gray levels, as the dgm-eval code base does.
    weights:     folder with config.json and model.safetensors, or torch.hub's .pth file; None takes the pinned
                 revision from Hugging Face or its cache.
    """

    name: ClassVar[str] = "dinov2"
    group_cpu: ClassVar[int] = 2

    def __init__(self, resize_mode: str = "torch", weights: str | Path | None = None) -> None:
        if resize_mode not in RESIZE_MODES:
            raise ConfigError(
                f"unknown resize_mode={resize_mode!r}; choose from {', '.join(RESIZE_MODES)}"
                f"{did_you_mean(resize_mode, RESIZE_MODES)}"
            )
        self.resize_mode = resize_mode
        path = _from_hub() if weights is None else _local_file(Path(weights))
        net = _load(path)
        _fix_positions(net, SIZE // net.config.patch_size)
        super().__init__(net, net.config.hidden_size, path, published=weights is None)

    @classmethod
    def has_weights(cls) -> bool:
        """Return True if the transformers library is installed and the pinned revision in Hugging Face's cache."""
        if importlib.util.find_spec("transformers") is None:
            return False
        import huggingface_hub

        found = [huggingface_hub.try_to_load_from_cache(REPO, name, revision=REVISION) for name in FILES]
        return all(isinstance(path, str) for path in found)

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        is_pil = self.resize_mode == "pil"
        return normalized(_resize_pil(images) if is_pil else resize_antialiased(images, SIZE, "bicubic"))

    def _compute(self, x: torch.Tensor) -> DetectorOutput:
        return DetectorOutput(self._net(pixel_values=x).pooler_output)


def normalized(x: torch.Tensor) -> torch.Tensor:
    """Map float32 pixels 0..255 [N, 3, H, W] to the mean and deviation that the network was trained with."""
    # Filled on the device, since a copy from the host would wait for all work in flight.
    mean, std = (torch.stack([x.new_full((1, 1), value) for value in values]) for values in (MEAN, STD))  # [3, 1, 1]
    return (x / 255 - mean) / std


def _resize_pil(images: torch.Tensor) -> torch.Tensor:
    """Resize uint8 [N, 3, H, W] to float32 [N, 3, 224, 224] with values rounded to whole gray levels."""
    resized = [
        np.asarray(PIL.Image.fromarray(image).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC), dtype=np.float32)
        for image in images.permute(0, 2, 3, 1).cpu().numpy()
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)


def _fix_positions(net: Any, grid: int) -> None:
    """Resample the position embeddings from the grid of training to grid x grid, as torch.hub's network does.

    That one scales by (grid + 0.1) / trained, which shifts the sampled positions a little; later versions of
    transformers scale by grid / trained. Resampling here makes features independent of the installed version.
    """
    table = net.embeddings.position_embeddings.detach()  # [1, 1 + trained * trained, width]
    trained = round((table.shape[1] - 1) ** 0.5)
    if trained != grid:
        patches = table[:, 1:].reshape(1, trained, trained, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, scale_factor=(grid + 0.1) / trained, mode="bicubic")
        table = torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
        net.embeddings.position_embeddings = nn.Parameter(table)


def _from_hub() -> Path:
    """Return the pinned weights in Hugging Face's cache, after a download if needed (and HF_HUB_OFFLINE permits)."""
    _transformers()
    import huggingface_hub

    try:
        with _quiet(huggingface_hub):
            return Path([huggingface_hub.hf_hub_download(REPO, name, revision=REVISION) for name in FILES][-1])
    except (OSError, ValueError) as error:
        raise ConfigError(f"the weights of DINOv2 ViT-L/14 are missing: {_ADVICE} [{one_line(error)}]") from None


def _local_file(path: Path) -> Path:
    if path.is_dir():
        absent = [name for name in FILES if not (path / name).is_file()]
        if absent:
            raise ConfigError(f"--dinov2-weights={path} has no {' and no '.join(absent)}; {_ADVICE}")
        return path / FILES[-1]
    if not path.is_file():
        raise ConfigError(f"--dinov2-weights={path} does not exist; {_ADVICE}")
    return _local_file(path.parent) if path.name == FILES[-1] else path


def _load(path: Path) -> Any:
    """Build transformers' network in float32 with the weights at `path`. Raises ConfigError if they do not fit.

    The files are read here, and only the SETTINGS of config.json, so that no file can make the library run code, fetch
    kernels or quantize.
    """
    transformers = _transformers()
    tensors = read_tensors(path)
    if path.name == FILES[-1]:
        settings = _read_settings(path.with_name(FILES[0]))
    else:
        settings, tensors = to_transformers(tensors, path)
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        try:
            config = transformers.Dinov2Config(**settings)
            net, report = transformers.Dinov2Model.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except Exception as error:  # the library's own checks, of many kinds
            raise ConfigError(f"{path} cannot be read as DINOv2: {one_line(error)}") from None
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in report[f"{kind}_keys"])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(f"{path} does not hold weights of DINOv2: {kind} {names[0]}{more}")
    return net.float()


def to_transformers(
    tensors: Mapping[str, torch.Tensor], source: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Convert torch.hub's tensors to arguments of transformers' Dinov2Config and to tensors under its names."""
    missing = [name for name in (*_HUB_NAMES, "blocks.0.mlp.fc1.weight") if name not in tensors]
    if missing:
        raise ConfigError(f"{source} does not hold weights of torch.hub's DINOv2: {missing[0]} is missing")
    renamed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if layer is None:
            renamed[_HUB_NAMES.get(name, name)] = value
            continue
        prefix, rest = f"encoder.layer.{layer[1]}.", layer[2]
        part, _, kind = rest.rpartition(".")
        if part == "attn.qkv":
            for which, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{prefix}attention.attention.{which}.{kind}"] = third.contiguous()
        elif rest in _HUB_LAYER_NAMES:
            renamed[prefix + _HUB_LAYER_NAMES[rest]] = value
        else:
            renamed[f"{prefix}{_HUB_LAYER_NAMES.get(part, part)}.{kind}"] = value
    return _settings_of(tensors), renamed


def _settings_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // HEAD_WIDTH,
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] // width,
        "patch_size": patch,
        "image_size": patch * round((tensors["pos_embed"].shape[1] - 1) ** 0.5),
    }


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "dinov2":
        raise ConfigError(f"{path} describes a network of type {kind!r}; 'dinov2' is needed")
    return {key: config[key] for key in SETTINGS if key in config}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError("fd_dinov2 needs the transformers library; try: pip install -e '.[metrics]'") from None
    return transformers


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Keep log lines and progress bars of `library` (the hub's retries, transformers' reports) off the terminal."""
    logging = library.utils.logging
    verbosity = logging.get_verbosity()
    has_bar = hasattr(logging, "disable_progress_bar") and logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    if has_bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
