"""The model card of a shared network: README.md with front matter for the hub."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from dnnlib.errors import ConfigError
from training.encoders import StabilityVAEEncoder
from training.snapshot import Snapshot, label_dropout
from training.snapshot.parts import described_network

PUBLISHED_LICENCE = "cc-by-nc-sa-4.0"
PUBLISHED_NOTICE = (
    "© 2024 NVIDIA Corporation & affiliates. These are weights that were published with the EDM2 and autoguidance"
    " papers, in another format. They keep their own terms, Creative Commons Attribution-NonCommercial-ShareAlike 4.0"
    " (CC BY-NC-SA 4.0, https://creativecommons.org/licenses/by-nc-sa/4.0/), independent of the license of the code: no"
    " commercial use, credit to the authors, and the same terms for the files and for derived works."
)
PUBLISHED_SITE = "https://nvlabs-fi-cdn.nvidia.com/edm2/"

_PUBLISHED_NAME = re.compile(r"edm2-img(512|64)-(xxs|xs|s|m|l|xl|xxl)(-uncond)?-\d{7}-\d\.\d{3}\.(pkl|safetensors)")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts for a card that the network file lacks. Raises ConfigError for an invalid licence identifier."""

    licence: str | None = None  # an identifier of the hub, such as apache-2.0
    training_options: Mapping[str, Any] | None = None  # training_options.json of the run
    scores: Mapping[str, float] = field(default_factory=dict)  # by metric, from the run's statistics
    results: tuple[Mapping[str, Any], ...] = ()  # of calculate_metrics.py --json

    def __post_init__(self) -> None:
        if self.licence is not None and not _LICENCE.fullmatch(self.licence):
            raise ConfigError(f"--license={self.licence} is not an identifier; write e.g. apache-2.0 or cc-by-4.0")


def is_published(source: str, snapshot: Snapshot) -> bool:
    """Return True for networks published with the papers, by URL, file name, or the source that their file records."""
    recorded = str(snapshot.info.get("source", ""))
    return any(
        name.startswith(PUBLISHED_SITE) or _PUBLISHED_NAME.fullmatch(re.split(r"[/\\]", name)[-1]) is not None
        for name in (source, recorded)
    )


def model_card(snapshot: Snapshot, name: str, facts: CardFacts) -> str:
    """Return the text of the model card of `snapshot`, as the network called `name`."""
    published = is_published("", snapshot)
    licence = PUBLISHED_LICENCE if published else facts.licence or _recorded_licence(snapshot)
    sections = [
        _front_matter(snapshot, licence),
        f"# {name}\n\n{_summary(snapshot)}",
        _usage(snapshot, name),
        f"## Network\n\n{_table(('', ''), _network_rows(snapshot))}",
        _training(snapshot, facts),
        _scores(snapshot, facts),
        f"## License\n\n{_licence_text(published, licence)}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(snapshot: Snapshot, licence: str | None) -> str:
    lines = ["---", *([f"license: {licence.lower()}"] if licence else []), "library_name: diffusers"]
    lines += ["pipeline_tag: unconditional-image-generation", "tags:", "- edm2", "- diffusion"]
    lines += ["- class-conditional"] if snapshot.net.label_dim else []
    return "\n".join([*lines, "---"])


def _summary(snapshot: Snapshot) -> str:
    net, size = snapshot.net, _size(snapshot)
    kind = f"A class-conditional diffusion model of {net.label_dim} classes" if net.label_dim else "A diffusion model"
    what = f"images of {size} pixels, {net.img_channels} channel{'s' * (net.img_channels != 1)}"
    if isinstance(snapshot.encoder, StabilityVAEEncoder):
        what = f"latents of {size} with {net.img_channels} channels, of the VAE {_code(snapshot.encoder.vae_name)}"
    return (
        f"{kind} for {what}: the magnitude-preserving U-Net of EDM2 (Karras et al., arXiv 2312.02696) in the form that"
        " the diffusers library loads. `unet/diffusion_pytorch_model.safetensors` is also a network file of its own."
    )


def _usage(snapshot: Snapshot, name: str) -> str:
    labels = "class_labels=[0], " if snapshot.net.label_dim else ""
    chosen = " --class=0" if snapshot.net.label_dim else ""
    both = ""
    if snapshot.net.label_dim and label_dropout(snapshot.info):
        both = (
            f"\n\nIt learned a share of {label_dropout(snapshot.info):g} of the images without labels. So it also makes"
            " images without a class (`--class=none`), and guides itself (`--gnet=self --guidance=1.5`; in the pipeline"
            ' `guide="self"`, `guidance_scale=1.5`).'
        )
    if snapshot.net.cond_channels:
        masked = str(snapshot.info.get("condition")).startswith("inpaint")
        labels += 'image="images", ' + ('mask_image="masks", ' if masked else "")
        chosen += " --source=images" + (" --masks=masks" if masked else "")
    return (
        "## Use\n\n"
        "```python\n"
        "import torch\n"
        "from edm2.diffusers import EDM2Pipeline\n\n"
        f'pipe = EDM2Pipeline.from_pretrained("{name}")  # this folder, or its name on the hub\n'
        f"image = pipe({labels}generator=torch.Generator().manual_seed(0)).images[0]\n"
        "```\n\n"
        f"```\npython generate_images.py --net={name} --seeds=0{chosen} --outdir=out\n```\n\n"
        "Both make the same image, on the same kind of device: generators of CPUs and GPUs differ." + both
    )


def _network_rows(snapshot: Snapshot) -> list[tuple[str, str]]:
    net = snapshot.net
    rows = [("parameters", f"{sum(value.numel() for value in net.parameters()):,}")]
    rows += [("images seen in training", f"{snapshot.nimg:,}")] if snapshot.nimg is not None else []
    rows += [("EMA length", f"{snapshot.ema_std:.3f}")] if snapshot.ema_std is not None else []
    arguments = described_network(net)["arguments"]
    return rows + [(f"`{key}`", f"`{json.dumps(value)}`") for key, value in sorted(arguments.items())]


def _training(snapshot: Snapshot, facts: CardFacts) -> str:
    rows = []
    if snapshot.dataset_kwargs and snapshot.dataset_kwargs.get("path"):
        rows.append(("data", _code(PurePath(str(snapshot.dataset_kwargs["path"])).name)))
        rows += [(key, _cell(snapshot.dataset_kwargs[key])) for key in ("xflip",) if key in snapshot.dataset_kwargs]
    if snapshot.loss_fn is not None:
        loss = snapshot.loss_fn
        rows.append(("noise levels", f"ln(sigma) normal, mean {loss.P_mean:g}, standard deviation {loss.P_std:g}"))
    rows += [
        (_cell(key.replace("_", " ")), _cell(value))
        for key, value in sorted(snapshot.info.items())
        if key not in ("training_command", "metrics", "license", "source")
    ]
    rows += [("source", _cell(snapshot.info["source"]))] if "source" in snapshot.info else []
    parts = [_table(("", ""), rows)] if rows else []
    command = snapshot.info.get("training_command")
    parts += [f"Command:\n\n```\n{str(command).replace('```', '')}\n```"] if command else []
    if facts.training_options is not None:
        parts.append(f"Options:\n\n```json\n{json.dumps(facts.training_options, indent=2)}\n```")
    return "\n\n".join(["## Training", *(parts or ["The network file does not describe its training."])])


def _scores(snapshot: Snapshot, facts: CardFacts) -> str:
    rows: list[tuple[str, ...]] = []
    for record in facts.results:
        images = _cell(record.get("num_images", ""))
        for name, entry in record["results"].items():
            spread = f" (mean {_number(entry['mean'])} ± {_number(entry['std'])})" if entry.get("std") else ""
            rows.append(
                (
                    _cell(name),
                    _number(entry["minimum"]) + spread,
                    images,
                    _code(record.get("command", "")),
                )
            )
    rows += [(_cell(name), _number(value), "", "while training") for name, value in sorted(facts.scores.items())]
    recorded = snapshot.info.get("metrics")
    if isinstance(recorded, Mapping):
        rows += [(_cell(name), _cell(value), "", "") for name, value in sorted(recorded.items())]
    if not rows:
        return ""
    return f"## Results\n\n{_table(('metric', 'value', 'images', 'how'), rows)}"


def _licence_text(published: bool, licence: str | None) -> str:
    if published:
        return PUBLISHED_NOTICE
    if licence:
        return f"{licence}, as stated by the person who shared this network."
    return "No license is stated yet. Choose one before sharing this network (`convert_snapshot.py --license`)."


def _recorded_licence(snapshot: Snapshot) -> str | None:
    recorded = snapshot.info.get("license")
    return recorded if isinstance(recorded, str) and _LICENCE.fullmatch(recorded) else None


def _size(snapshot: Snapshot) -> str:
    size = snapshot.net.img_resolution
    return f"{size}×{size}" if isinstance(size, int) else "×".join(str(side) for side in size)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def _cell(value: Any) -> str:
    """Return a value from a stranger's file as the text of one table cell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"([\\`*_\[\]<>&#!~])", r"\\\1", " ".join(text.split())[:1000])


def _code(value: Any) -> str:
    """Return a value from a stranger's file as code within a line; '' for an empty one."""
    text = " ".join(str(value).replace("`", "").split())[:1000]
    return f"`{text}`" if text else ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else _cell(value)
