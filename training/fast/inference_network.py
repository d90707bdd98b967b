"""The network that sampling runs: weights are normalized, scaled, cast and laid out once, when it is built.

Samplers call it like `Precond` (training/networks_edm2.py), or bind it to the labels of a batch first. The computation
of blocks and U-Net is shared with training (training/fast/training_network.py).

Source: Karras et al., arXiv 2312.02696, Figure 21 and Appendix B.

Shape legend: N images, C channels, H x W pixels, E embedding width, L classes, S the sum of all blocks' widths.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from training.fast.ops import balance, effective_weight, packed
from training.fast.training_network import (
    BlockForm,
    BlockWeights,
    activation_layout,
    block_weights,
    run_block,
    run_unet,
)
from training.networks_edm2 import (
    SILU_MAGNITUDE,
    Block,
    MPConv,
    Precond,
    image_size,
    preconditioning,
    scaled_condition,
)

# Called with x [N, C, H, W], noise levels [N or 1], the class embedding [N or 1, E] or None, and, if the network is
# conditioned on images, these as input of the first convolution; returns denoised images.
Evaluate = Callable[..., torch.Tensor]


class InferenceBlock(nn.Module):
    """One block whose weights are prepared for activations of one type and images of height and width `size`.

    With `pack`, the weights are in the layout of the CPU's convolutions.
    """

    def __init__(self, block: nn.Module, dtype: torch.dtype, size: tuple[int, int], *, pack: bool) -> None:
        super().__init__()
        assert isinstance(block, Block)
        self.form = BlockForm.of(block)
        self.width = block.out_channels
        height, width = size
        self.size_after = {
            "keep": size,
            "down": (height // 2, width // 2),
            "up": (height * 2, width * 2),
        }[self.form.resample_mode]
        layout = activation_layout(block.emb_gain.device)
        for name, weight in block_weights(block, dtype, layout)._asdict().items():
            self.register_buffer(name, packed(weight, *self.size_after) if pack and weight is not None else weight)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Map `x` [N, C, H, W] and the channels' `scale` [N or 1, C'] to [N, C', H', W']."""
        weights = BlockWeights(*(getattr(self, name) for name in BlockWeights._fields))
        return run_block(self.form, weights, x, scale)


class _Evaluation(nn.Module):
    """The prepared weights, and the function that is compiled or recorded.

    It is a module of its own because it must not refer to what was made of it: a cycle of references would keep the
    weights, and the memory of a CUDA graph, until Python's next collection of cycles.
    """

    stem: torch.Tensor
    out: torch.Tensor
    freqs: torch.Tensor
    phases: torch.Tensor
    emb_noise: torch.Tensor
    emb_label: torch.Tensor | None
    emb_scale: torch.Tensor

    def __init__(self, net: Precond, dtype: torch.dtype, *, pack: bool) -> None:
        super().__init__()
        unet = net.unet
        self.sigma_data = net.sigma_data
        self.dtype = dtype
        self.concat_balance = unet.concat_balance
        self.takes_skip = unet.takes_skip()

        stem, *enc = unet.enc.values()
        dec = list(unet.dec.values())
        assert isinstance(stem, MPConv)
        layout = activation_layout(stem.weight.device)
        size = image_size(net)
        stem_weight = effective_weight(stem.weight, 1, dtype, layout)
        out_weight = effective_weight(unet.out_conv.weight, unet.out_gain, dtype, layout)
        self.register_buffer("stem", packed(stem_weight, *size) if pack else stem_weight)
        self.register_buffer("out", packed(out_weight, *size) if pack else out_weight)
        self.enc, self.dec = nn.ModuleList(), nn.ModuleList()
        for blocks, prepared in ((enc, self.enc), (dec, self.dec)):
            for block in blocks:
                made = InferenceBlock(block, dtype, size, pack=pack)
                prepared.append(made)
                size = made.size_after

        # All constant factors of the embedding are folded into its matrices: the shares of the sum, sqrt(2) of the
        # Fourier features, sqrt(L) of one-hot labels, and 1 / 0.596 of SiLU. An evaluation is left with
        # F.silu(noise part + class part), and with scales that are 1 + a product with it.
        noise_share, label_share = (1.0, 0.0) if unet.emb_label is None else balance(unet.label_balance)
        self.register_buffer("freqs", unet.emb_fourier.freqs.to(torch.float32, copy=True))
        self.register_buffer("phases", unet.emb_fourier.phases.to(torch.float32, copy=True))
        self.register_buffer("emb_noise", _matrix(unet.emb_noise, noise_share * math.sqrt(2)))
        label_gain = label_share * math.sqrt(max(net.label_dim, 1))
        self.register_buffer("emb_label", None if unet.emb_label is None else _matrix(unet.emb_label, label_gain))
        self.register_buffer("emb_scale", torch.cat([_scale_matrix(block) for block in [*enc, *dec]]))  # [S, E]

    @torch.no_grad()
    def evaluate(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        label_emb: torch.Tensor | None,
        cond_images: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Denoise `x` [N, C, H, W] at noise levels [N or 1]; `bind` gives `label_emb` [N or 1, E] and `cond_images`."""
        c_skip, c_out, c_in, c_noise = preconditioning(sigma, self.sigma_data)
        emb = row_by_row(self._noise_embedding, c_noise[:, None])
        emb = emb if label_emb is None else emb + label_emb
        scales = row_by_row(self._scales, emb)  # [N or 1, S]
        layers = [*self.enc, *self.dec]
        parts = scales.split([layer.width for layer in layers], dim=1)
        bound = [_bound(layer, part) for layer, part in zip(layers, parts, strict=True)]
        raw = run_unet(
            (c_in * x).to(self.dtype),
            self.stem,
            bound[: len(self.enc)],
            bound[len(self.enc) :],
            self.out,
            takes_skip=self.takes_skip,
            concat_balance=self.concat_balance,
            cond_images=cond_images,
        )
        return torch.addcmul(c_skip * x, c_out, raw.to(torch.float32))

    def _noise_embedding(self, c_noise: torch.Tensor) -> torch.Tensor:
        """Map c_noise [N, 1] to [N, E]."""
        return F.linear(torch.addcmul(self.phases, c_noise, self.freqs).cos(), self.emb_noise)

    def _scales(self, emb: torch.Tensor) -> torch.Tensor:
        """Map the sum of the embeddings [N, E] to the modulations [N, S] of all blocks."""
        return (F.linear(F.silu(emb), self.emb_scale) + 1).to(self.dtype)


class InferencePrecond(nn.Module):
    """The function of `net` in evaluation mode, on copies of its weights; `net` is not needed afterwards.

    `dtype` is the type of the U-Net's activations and weights; everything else is float32. There are no gradients.
    With `pack`, a network on the CPU has its weights in the layout of the CPU's convolutions, and can then be neither
    moved nor compiled. `through` wraps the evaluation, to compile or record it. `fixed_batch` tells callers to keep to
    one batch size.
    """

    @torch.no_grad()
    def __init__(
        self,
        net: Precond,
        *,
        dtype: torch.dtype = torch.float32,
        pack: bool = True,
        through: Callable[[Evaluate], Evaluate] | None = None,
        fixed_batch: bool = False,
    ) -> None:
        super().__init__()
        self.img_resolution = net.img_resolution
        self.img_channels = net.img_channels
        self.label_dim = net.label_dim
        self.cond_channels = net.cond_channels
        self.sigma_data = net.sigma_data
        self.use_fp16 = dtype == torch.float16
        self.dtype = dtype
        self.fixed_batch = fixed_batch
        self.evaluation = _Evaluation(net, dtype, pack=pack)
        evaluate = self.evaluation.evaluate
        self._evaluate: Evaluate = evaluate if through is None else through(evaluate)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        cond_images: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Denoise like `Precond.forward`: [N, C, H, W] in float32."""
        return self.bind(class_labels, cond_images)(x, sigma)

    def bind(
        self, class_labels: torch.Tensor | None, cond_images: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor, torch.Tensor | float], torch.Tensor]:
        """Return the denoiser D(x, sigma) for fixed labels [N or 1, L] and, if the network is conditioned on images,
        `cond_images` [N, cond_channels, H, W]. Everything that depends on these alone is computed here, once."""
        label_emb = self._label_embedding(class_labels)
        condition: tuple[torch.Tensor, ...] = ()
        if self.cond_channels:
            condition = (scaled_condition(cond_images, self.cond_channels, self.sigma_data).to(self.dtype),)

        @torch.no_grad()
        def denoise(x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
            sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1)
            return self._evaluate(x.to(torch.float32), sigma, label_emb, *condition)

        return denoise

    @torch.no_grad()
    def _label_embedding(self, class_labels: torch.Tensor | None) -> torch.Tensor | None:
        emb_label = self.evaluation.emb_label
        if emb_label is None:
            return None
        if class_labels is None:
            return torch.zeros([1, emb_label.shape[0]], device=emb_label.device)
        labels = class_labels.to(emb_label.device, torch.float32).reshape(-1, self.label_dim)
        return row_by_row(partial(F.linear, weight=emb_label), labels)


def row_by_row(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply `function` to the rows of `x` [N, I], to [N, O]; on a CPU one row at a time.

    The last bits of a row in a CPU's matrix product or SiLU depend on the number of rows, so that an image would
    depend on its batch.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return function(x)
    return torch.cat([function(row) for row in x.split(1)])


def _bound(layer: nn.Module, scale: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: layer(x, scale)


def _matrix(layer: MPConv, gain: float | torch.Tensor) -> torch.Tensor:
    return effective_weight(layer.weight, gain, torch.float32, torch.contiguous_format)


def _scale_matrix(block: nn.Module) -> torch.Tensor:
    assert isinstance(block, Block)
    return _matrix(block.emb_linear, block.emb_gain.float() / SILU_MAGNITUDE)
