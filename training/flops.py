"""Cost of networks and sampling runs, counted by PyTorch's dispatcher on tensors of the meta device.

The convention is that of the papers: one multiply-accumulate counts as one operation, and so does every other
arithmetic operation on one element. The normalization of weights counts too, since every evaluation of the published
code includes it.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from dnnlib.errors import ConfigError
from dnnlib.parse import split_url
from dnnlib.text import did_you_mean, unknown
from training.networks_edm2 import Precond, image_size
from training.presets import GENERATION, MODEL_ROOT, TRAINING, locate
from training.run.run_data import open_dataset
from training.sampling.options import SamplerOptions
from training.sampling.solvers import result_of
from training.snapshot import read_header

aten = torch.ops.aten

# Operations that FlopCounterMode knows; it counts two for each multiply-accumulate.
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
# ... or of the input. A square and its sum make one multiply-accumulate, so `pow` is counted and the sum is not.
_REDUCTIONS = ("pow", "_safe_softmax", "_softmax", "avg_pool2d", "native_group_norm")
ELEMENTWISE = "elementwise"

_HOSTED = re.compile(r"edm2-(img(?:512|64)-[a-z]+)(-uncond)?-\d{7}-\d\.\d{3}\.pkl$")
_NUM_CLASSES = 1000  # of ImageNet


class FlopCount(NamedTuple):
    """Parameters, and operations of one evaluation on one image, in total and by kind."""

    total_params: int
    total_flops: int
    by_operation: dict[str, int]

    @property
    def matrix_flops(self) -> int:
        """Operations of convolutions, matrix products and attention: what a matrix rate is measured in."""
        return self.total_flops - self.by_operation.get(ELEMENTWISE, 0)


class RunCost(NamedTuple):
    """Operations of a sampling run per image."""

    main_calls: int
    guide_calls: list[int]
    main_flops: int
    guide_flops: int
    decoder_flops: int

    @property
    def total_flops(self) -> int:
        """Operations of networks and decoder together."""
        return self.main_flops + self.guide_flops + self.decoder_flops


def count_flops(net: Any) -> FlopCount:
    """Count one evaluation of `net` on one image. Nothing is computed, on whatever device its parameters are."""
    height, width = image_size(net)
    labels = torch.zeros([1, net.label_dim], device="meta") if net.label_dim else None
    inputs = (torch.zeros([1, net.img_channels, height, width], device="meta"), torch.ones([1], device="meta"), labels)
    condition_kwargs = {}
    if cond_channels := getattr(net, "cond_channels", 0):
        condition_kwargs["cond_images"] = torch.zeros([1, cond_channels, height, width], device="meta")
    return _count(net, inputs, condition_kwargs)


def count_decoder(latent_channels: int, resolution: int, downscale: int = 8) -> FlopCount:
    """Count the decoder of a VAE like Stability's on one latent. Raises ConfigError if diffusers is not installed."""
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


def _count(net: torch.nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> FlopCount:
    state = {name: value.to("meta") for name, value in [*net.named_parameters(), *net.named_buffers()]}
    training = net.training
    net.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
            torch.func.functional_call(net, state, inputs, dict(kwargs or {}))
    finally:
        net.train(training)
    kinds = {name: kind for kind, names in _PRODUCTS.items() for name in names}
    by_operation: Counter[str] = Counter()
    for op, flops in counter.get_flop_counts()["Global"].items():
        by_operation[kinds.get(str(op).removeprefix("aten."), ELEMENTWISE)] += flops // 2
    total_params = sum(parameter.numel() for parameter in net.parameters())
    return FlopCount(total_params, by_operation.total(), dict(by_operation))


def _formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for operations that PyTorch does not count; like its own, they return twice the number."""

    def per_result(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
        return 2 * math.prod(out_shape)

    def per_input(shape: Any, *shapes: Any, out_shape: Any = None, **options: Any) -> int:
        return 2 * math.prod(shape)

    formulas: dict[Any, Callable[..., int]] = {}
    for names, formula in ((_ELEMENTWISE, per_result), (_REDUCTIONS, per_input)):
        formulas |= {getattr(aten, name): formula for name in names if hasattr(aten, name)}
    return formulas


def network_of(source: str) -> Precond:
    """Build the network of `source`, a training preset or the path or URL of a file, on the meta device.

    Published files are not downloaded, since their names determine the architecture. Other files' headers are read.
    Raises ConfigError for other sources.
    """
    hosted = _published(source)
    if hosted is not None:
        return _preset_network(f"edm2-{hosted[1]}", conditional=hosted[2] is None)
    if source in TRAINING:
        return _preset_network(source)
    try:
        header = read_header(source)
    except ConfigError as error:
        is_name = Path(source).name == source
        raise ConfigError(f"{error}{did_you_mean(source, [*TRAINING, *GENERATION]) if is_name else ''}") from None
    return _on_meta(header.config["arguments"])


def _published(source: str) -> re.Match[str] | None:
    """The parts of a published file's name; None for files from elsewhere, whose names prove nothing."""
    return _HOSTED.search(source) if split_url(source).hostname == split_url(MODEL_ROOT).hostname else None


def _preset_network(name: str, *, conditional: bool = True) -> Precond:
    # Some sizes of img64 have no training preset of their own; their networks are those of img512.
    config = TRAINING.get(name) or TRAINING.get(name.replace("img64", "img512"))
    if config is None:
        raise ConfigError(f"{unknown('architecture', name, TRAINING)}; else give the network file itself")
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
    """Count the decoder for the network of `source`; None if the network generates pixels."""
    hosted = _published(source)
    if hosted is not None or source in TRAINING:
        latents = (hosted[1] if hosted is not None else source).removeprefix("edm2-").startswith("img512")
    else:
        encoder = read_header(source).encoder
        latents = encoder is not None and encoder["class"] == "StabilityVAEEncoder"
    return count_decoder(net.img_channels, max(image_size(net))) if latents else None


def run_cost(
    net: Precond,
    guides: Sequence[Precond],
    sampler: SamplerOptions,
    *,
    decoder: FlopCount | None = None,
) -> RunCost:
    """Count one image by this sampler. The solver runs on stand-ins for the networks that count their calls."""
    calls = [0] * (1 + len(guides))

    def counting(index: int) -> Callable[..., torch.Tensor]:
        def denoise(x: torch.Tensor, sigma: float, step_sigma: float) -> torch.Tensor:
            calls[index] += 1
            return x

        return denoise

    denoise = sampler.exact_guidance.wrap(counting(0), [counting(1 + i) for i in range(len(guides))])
    result_of(sampler.solve(denoise, torch.zeros([1])))
    costs = [count_flops(network).total_flops for network in (net, *guides)]
    return RunCost(
        main_calls=calls[0],
        guide_calls=calls[1:],
        main_flops=calls[0] * costs[0],
        guide_flops=sum(number * cost for number, cost in zip(calls[1:], costs[1:], strict=True)),
        decoder_flops=0 if decoder is None else decoder.total_flops,
    )
