"""The weights of DINOv2 as torch.hub publishes them, under the names of `facebook/dinov2-large`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import ConfigError

HEAD_WIDTH = 64  # of all published DINOv2 networks
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_LAYER_NAMES = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def to_transformers(
    tensors: Mapping[str, torch.Tensor], source: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Arguments of transformers' Dinov2Config and the tensors under its published names. `source` is for errors."""
    lacking = [name for name in (*_NAMES, "blocks.0.mlp.fc1.weight") if name not in tensors]
    if lacking:
        raise ConfigError(f"{source} holds no weights of torch.hub's DINOv2: {lacking[0]} is missing")
    renamed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if layer is None:
            renamed[_NAMES.get(name, name)] = value
            continue
        prefix, rest = f"encoder.layer.{layer[1]}.", layer[2]
        part, _, kind = rest.rpartition(".")
        if part == "attn.qkv":
            for which, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{prefix}attention.attention.{which}.{kind}"] = third.contiguous()
        elif rest in _LAYER_NAMES:
            renamed[prefix + _LAYER_NAMES[rest]] = value
        else:
            renamed[f"{prefix}{_LAYER_NAMES.get(part, part)}.{kind}"] = value
    return _settings(tensors), renamed


def _settings(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the shapes say about the network."""
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
