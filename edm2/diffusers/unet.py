"""The network as a model of the diffusers library.

Shape legend: N images, C channels, H x W pixels, L labels.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import is_accelerate_available

from training.encoders import Encoder, StandardRGBEncoder
from training.networks_edm2 import Precond, image_size
from training.sharing.write_folder import unet_config
from training.snapshot import Snapshot
from training.snapshot.parts import build_encoder, network_arguments

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class EDM2UNet(ModelMixin, ConfigMixin):
    """The denoiser D(x; sigma), preconditioning included (`training.networks_edm2.Precond`).

    Its parameters have the same names as in network files. `network`: the arguments of Precond. `snapshot`: the other
    fields of a network file's header (docs/file-formats.md). `stored_dtype`: the type in which `from_pretrained` loads
    parameters by default; published files round the gains to float16, which is part of the published numbers. On CUDA
    devices the network computes in float16, unless it was made with `use_fp16` false; in float32 elsewhere.
    """

    # Skip connections carry activations of all resolutions across the network, so devices get the whole of it.
    _no_split_modules = ("UNet",)

    @register_to_config
    def __init__(
        self, network: dict[str, Any], snapshot: dict[str, Any] | None = None, stored_dtype: str = "float32"
    ) -> None:
        super().__init__()
        net = Precond(**network_arguments((), network))
        # In a tuple, so that it is not a submodule and the parameters' names have no prefix.
        self._denoiser = (net,)
        self.unet = net.unet
        self.logvar_fourier = net.logvar_fourier
        self.logvar_linear = net.logvar_linear

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot) -> "EDM2UNet":
        """Return the model of a snapshot's network, sharing its parameters."""
        with torch.device("meta"):
            model = cls(**unet_config(snapshot))
        for name in ("unet", "logvar_fourier", "logvar_linear"):
            setattr(model, name, getattr(snapshot.net, name))
        model._denoiser = (snapshot.net,)
        return model.eval()

    @property
    def denoiser(self) -> Precond:
        """The network, called as D = denoiser(x, sigma, labels); it shares all parameters."""
        return self._denoiser[0]

    @property
    def img_channels(self) -> int:
        """C of the images or latents."""
        return self.denoiser.img_channels

    @property
    def img_resolution(self) -> tuple[int, int]:
        """Height and width of the images or latents."""
        return image_size(self.denoiser)

    @property
    def label_dim(self) -> int:
        """Number of classes; 0 for an unconditional network."""
        return self.denoiser.label_dim

    @property
    def cond_channels(self) -> int:
        """Channels of the images that the network is conditioned on; 0 for none."""
        return self.denoiser.cond_channels

    @property
    def condition(self) -> str | None:
        """Kind of these images, in the form of train_edm2.py --condition."""
        condition = ((self.config.snapshot or {}).get("info") or {}).get("condition")
        return condition if isinstance(condition, str) else None

    def make_encoder(self) -> Encoder:
        """Return the encoder that decodes this network's latents; nothing is loaded yet."""
        entry = (self.config.snapshot or {}).get("encoder")
        return StandardRGBEncoder() if entry is None else build_encoder(entry["class"], (), entry["arguments"])

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        cond_images: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Return denoised images [N, C, H, W] in float32.

        `timestep` is the noise level sigma, one number or N. `class_labels`: class numbers [N], or weights [N, L], such
        as one-hot; None is no class. An unconditional network ignores them. `cond_images`: see Precond.
        """
        if class_labels is not None and class_labels.ndim == 1 and self.label_dim:
            class_labels = F.one_hot(class_labels.to(torch.int64), self.label_dim).to(torch.float32)
        condition = {} if cond_images is None else {"cond_images": cond_images}
        denoised = self.denoiser(sample, timestep, class_labels, **condition)
        return UNet2DOutput(sample=denoised) if return_dict else (denoised,)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> "EDM2UNet":
        """Load a folder or hub name. Pickles are not read, and the parameters keep their stored type."""
        kwargs["use_safetensors"] = True  # weights are data, never a pickle
        if not is_accelerate_available():
            kwargs.setdefault("low_cpu_mem_usage", False)  # the default logs a long request to install it
        if kwargs.get("torch_dtype") is None and kwargs.get("dtype") is None:
            kwargs.pop("dtype", None)
            config = cls.load_config(pretrained_model_name_or_path, **kwargs)
            kwargs["torch_dtype"] = _DTYPES.get(config.get("stored_dtype", "float32"), torch.float32)
        model: EDM2UNet = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save as ModelMixin does, with the parameters' type in the configuration."""
        self.register_to_config(stored_dtype=str(self.dtype).removeprefix("torch."))
        super().save_pretrained(save_directory, **kwargs)
