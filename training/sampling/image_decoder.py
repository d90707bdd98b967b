"""How latents are decoded to pictures: precision and tiles of the VAE's decoder."""

from dataclasses import dataclass
from typing import Any

import torch

from dnnlib.errors import ConfigError
from training.encoders import Encoder, StabilityVAEEncoder

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """What to ask of a decoder. Raises ConfigError for what there is not."""

    precision: str = "auto"  # fp32, fp16 or bf16; auto = fp16 on CUDA, fp32 elsewhere
    tile: int | None = None  # pixels of the side of the tiles that larger images are decoded in; None = whole images

    def __post_init__(self) -> None:
        if self.precision not in ("auto", *PRECISIONS):
            raise ConfigError(f"--decoder-precision={self.precision} is none; there are auto, {', '.join(PRECISIONS)}")
        if self.tile is not None and self.tile < 1:
            raise ConfigError(f"--decoder-tile={self.tile} is no size of a tile; give a number of pixels, such as 512")

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, for a record of results; empty where nothing was."""
        asked = {"decoder_precision": None if self.precision == "auto" else self.precision, "decoder_tile": self.tile}
        return {name: value for name, value in asked.items() if value is not None}

    def apply(self, encoder: Encoder, device: torch.device, batch_size: int) -> tuple[Encoder, dict[str, Any]]:
        """The encoder that decodes like this, `batch_size` images at once, and what is to be noted of it.

        Encoders without a network, and foreign ones, stay as they are.
        """
        if not isinstance(encoder, StabilityVAEEncoder):
            return encoder, {}
        name = self.precision
        if name == "auto":
            name = "fp16" if device.type == "cuda" else "fp32"
        encoder = encoder.with_decoder(PRECISIONS[name], tile=self.tile, batch_size=batch_size)
        return encoder, {"decoder": None if name == "fp32" else name, "decoder_tile": self.tile}
