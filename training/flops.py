"""What networks and sampling runs cost, counted by PyTorch's dispatcher on tensors without content.

The convention is the papers': one multiply-accumulate is one operation, and so is every other arithmetic operation on
one element. The normalization of the weights counts, as it is part of every evaluation of the published code.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch.utils.flop_counter import FlopCounterMode

from dnnlib.errors import ConfigError
from training.networks_edm2 import Precond
from training.presets import MODEL_ROOT, TRAINING, locate
from training.sampling.guidance import Guidance
from training.sampling.sampler import HeunOptions, choose_solver
from training.snapshot import read_header
from training.training_loop import open_dataset

aten = torch.ops.aten

# Operations that FlopCounterMode knows, which it counts twice for each multiply-accumulate.
_PRODUCTS = {
    "convolution": ("convolution", "_convolution", "cudnn_convolution"),
    "fully connected": ("mm", "addmm", "_scaled_mm"),
    "attention": (
        "bmm",
        "baddbmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_flash_attention_forward",
        "_efficient_attention_forward",
    ),
}
# One operation for each element of the result ...
_ELEMENTWISE = (
    "mul",
    "div",
    "add",
    "sub",
    "lerp",
    "silu",
    "clamp",
    "cos",
    "log",
    "sqrt",
    "reciprocal",
    "upsample_nearest2d",
)
# ... or of what goes in: a square and its sum make one multiply-accumulate, so the sum is not counted beside `pow`.
_REDUCTIONS = ("pow", "_safe_softmax", "_softmax", "avg_pool2d", "native_group_norm")
ELEMENTWISE = "elementwise"

_HOSTED = re.compile(r"edm2-(img(?:512|64)-[a-z]+)(-uncond)?-\d{7}-\d\.\d{3}\.pkl$")
_NUM_CLASSES = 1000  # of ImageNet


class FlopCount(NamedTuple):
    """Parameters, operations of one evaluation on one image, and these by kind of operation."""

    total_params: int
    total_flops: int
    by_operation: dict[str, int]


class RunCost(NamedTuple):
    """Operations for one image by a sampling run."""

    main_calls: int
    guide_calls: list[int]
    main_flops: int
    guide_flops: int
    decoder_flops: int

    @property
    def total_flops(self) -> int:
        """All of it."""
        return self.main_flops + self.guide_flops + self.decoder_flops


def count_flops(net: Any) -> FlopCount:
    """What one evaluation of `net` costs for one image. Nothing is computed, wherever its parameters are."""
    size = net.img_resolution
    height, width = (size, size) if isinstance(size, int) else size
    labels = torch.zeros([1, net.label_dim], device="meta") if net.label_dim else None
    inputs = (torch.zeros([1, net.img_channels, height, width], device="meta"), torch.ones([1], device="meta"), labels)
    cond_channels = getattr(net, "cond_channels", 0)
    seen = {"cond_images": torch.zeros([1, cond_channels, height, width], device="meta")} if cond_channels else {}
    return _count(net, inputs, seen)


def count_decoder(latent_channels: int, resolution: int, downscale: int = 8) -> FlopCount:
    """What the decoder of the Stability VAE costs for latents [1, latent_channels, resolution, resolution].

    Raises ConfigError where diffusers is not installed. Smaller and larger VAEs have blocks fewer or more.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(
            'the cost of the decoder needs diffusers; pip install "edm2[vae]", or leave it out by --no-decoder'
        ) from None
    widths = (128, 256, 512, 512, 512, 512)[: downscale.bit_length()]
    with torch.device("meta"):
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=latent_channels,
        )
    decoder = torch.nn.Sequential(vae.post_quant_conv, vae.decoder)
    return _count(decoder, (torch.zeros([1, latent_channels, resolution, resolution], device="meta"),))


def _count(net: torch.nn.Module, inputs: Sequence[Any], options: Mapping[str, Any] | None = None) -> FlopCount:
    state = {name: value.to("meta") for name, value in [*net.named_parameters(), *net.named_buffers()]}
    training = net.training
    net.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
            torch.func.functional_call(net, state, tuple(inputs), dict(options or {}))
    finally:
        net.train(training)
    found = {str(op).removeprefix("aten."): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}
    kinds = {name: kind for kind, names in _PRODUCTS.items() for name in names}
    by_operation: dict[str, int] = {}
    for name, flops in found.items():
        kind = kinds.get(name, ELEMENTWISE)
        by_operation[kind] = by_operation.get(kind, 0) + flops
    total_params = sum(parameter.numel() for parameter in net.parameters())
    return FlopCount(total_params, sum(by_operation.values()), by_operation)


def _formulas() -> dict[Any, Callable[..., int]]:
    """Twice the operations, as PyTorch's own formulas give, for operations that it does not count."""

    def per_result(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
        return 2 * math.prod(out_shape)

    def per_input(shape: Any, *shapes: Any, out_shape: Any = None, **options: Any) -> int:
        return 2 * math.prod(shape)

    formulas: dict[Any, Callable[..., int]] = {}
    for names, formula in ((_ELEMENTWISE, per_result), (_REDUCTIONS, per_input)):
        formulas |= {getattr(aten, name): formula for name in names if hasattr(aten, name)}
    return formulas


def network_of(source: str) -> Precond:
    """The network that `source` names, without content: a training preset, or a file's path or URL.

    Files that are published need no download: their names tell the architecture. Of others the header is read. Raises
    ConfigError for what is neither.
    """
    hosted = _published(source)
    if hosted is not None:
        return _preset_network(f"edm2-{hosted[1]}", conditional=hosted[2] is None)
    if source in TRAINING:
        return _preset_network(source)
    header = read_header(source)
    return _on_meta(header.config["arguments"])


def _published(source: str) -> re.Match[str] | None:
    """The parts of a published file's name; None for all other files, whose names prove nothing."""
    return _HOSTED.search(source) if urlsplit(source).hostname == urlsplit(MODEL_ROOT).hostname else None


def _preset_network(name: str, *, conditional: bool = True) -> Precond:
    # The smallest and largest sizes of img64 were never published, and are built the same way.
    config = TRAINING.get(name) or TRAINING.get(name.replace("img64", "img512"))
    if config is None:
        raise ConfigError(f"no preset tells the architecture of '{name}'; give the file itself")
    if config.data:
        dataset = open_dataset(dataclasses.replace(config, data=locate(config.data)))
        shape = (dataset.resolution, dataset.num_channels, dataset.label_dim)
        network = config.network.fitted_to(dataset.resolution)
    else:
        shape = (64, 4 if "img512" in name else 3, _NUM_CLASSES)
        network = config.network
    resolution, channels, classes = shape
    arguments = {"img_resolution": resolution, "img_channels": channels, "label_dim": classes if conditional else 0}
    return _on_meta(arguments | network.arguments())


def _on_meta(arguments: Mapping[str, Any]) -> Precond:
    with torch.device("meta"):
        return Precond(**arguments).eval()


def decoder_of(net: Precond, source: str) -> FlopCount | None:
    """The cost of the decoder behind the network that `source` names; None where it makes pixels itself."""
    hosted = _published(source)
    if hosted is not None or source in TRAINING:
        latents = (hosted[1] if hosted is not None else source).removeprefix("edm2-").startswith("img512")
    else:
        encoder = read_header(source).encoder
        latents = encoder is not None and encoder["class"] == "StabilityVAEEncoder"
    size = net.img_resolution
    return count_decoder(net.img_channels, size if isinstance(size, int) else max(size)) if latents else None


def run_cost(
    net: Precond,
    guides: Sequence[Precond],
    *,
    options: HeunOptions,
    guidance: Guidance,
    solver: str = "heun",
    decoder: FlopCount | None = None,
) -> RunCost:
    """What one image costs by this sampler: the solver runs on networks that count how often they are called."""
    calls = [0] * (1 + len(guides))

    def counting(index: int) -> Callable[..., torch.Tensor]:
        def denoise(x: torch.Tensor, sigma: float, step_sigma: float) -> torch.Tensor:
            calls[index] += 1
            return x

        return denoise

    denoise = guidance.wrap(counting(0), [counting(1 + i) for i in range(len(guides))])
    choose_solver(solver, options)(denoise, options.sigmas(), torch.zeros([1]))
    costs = [count_flops(network).total_flops for network in (net, *guides)]
    return RunCost(
        main_calls=calls[0],
        guide_calls=calls[1:],
        main_flops=calls[0] * costs[0],
        guide_flops=sum(number * cost for number, cost in zip(calls[1:], costs[1:], strict=True)),
        decoder_flops=0 if decoder is None else decoder.total_flops,
    )
