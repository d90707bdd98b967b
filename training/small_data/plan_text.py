"""The plan and the estimate of `--preset=small` as text."""

from dnnlib.parse import format_nimg
from training.config import TrainingConfig
from training.small_data.estimate import Estimate
from training.small_data.plan import Plan

HOUR = 3600.0


def describe_plan(plan: Plan, config: TrainingConfig) -> str:
    """A line for each choice: the option as `config` has it, and why."""
    facts = plan.facts
    kind = "latents" if facts.latents else "pictures"
    classes = f"{facts.num_classes} classes" if facts.num_classes else "without classes"
    rows = plan.table(config)
    width = max(len(option) for option, _ in rows)
    return "\n".join(
        [
            f"Chosen for {facts.num_images:,} {kind} of {facts.resolution}x{facts.resolution}, {classes}:",
            *(f"  {option:<{width}}  {why}" for option, why in rows),
            *plan.remarks,
            "",
        ]
    )


def describe_estimate(estimate: Estimate, *, nimg: int = 0) -> str:
    """What is left of a run after `nimg` images will take, and what fits an hour where that is more."""
    e, config, speed, memory = estimate, estimate.config, estimate.speed, estimate.memory
    rate = e.images_per_sec
    lines = [
        f"Estimate for this machine ({e.device.type}), {e.num_ranks} process(es):",
        f"  network  {e.num_params / 1e6:.2f} million parameters, {e.image_ops / 1e9:.3g} Gflop of training an image",
        f"  speed    {rate:.3g} images/s, measured in {speed.num_steps} steps of {speed.num_images};"
        f" {e.image_ops * rate / e.num_ranks / 1e9:,.3g} Gflop/s a process",
        f"  time     {spelled(e.seconds(max(config.duration - nimg, 0)))}"
        f" for {'the rest of ' if nimg else ''}{format_nimg(config.duration)} images,"
        f" {_count(config.duration / e.num_images)} passes",
    ]
    if e.seconds(config.duration - nimg) > HOUR and not nimg:
        fit = e.images_in(HOUR)
        lines.append(f"           --duration={format_nimg(fit)} takes an hour; it can be raised afterwards, to go on")
    parts = {
        "weights, moments, averages": memory.weights,
        "activations": memory.activations,
        "images": memory.images,
        "copies for checkpoints": memory.copies,
        "program": memory.program,
    }
    where = "" if e.device.type == "cpu" else " on the device"
    named = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
    lines.append(f"  memory   {memory.total(e.device) / 2**30:.2f} GiB a process{where}; in all: {named}")
    left_out = ["snapshots", *(["samples"] if config.samples else []), *(["metrics"] if config.metrics else [])]
    left_out += ["the VAE"] if config.vae is not None else []
    compiled = "; compiled code is faster" if config.compiles_on(e.device) else ""
    lines.append(f"  without  {', '.join(left_out)}{compiled}")
    return "\n".join([*lines, ""])


def spelled(seconds: float) -> str:
    """A time in its two largest units that matter: 50 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / HOUR), 24)
    return f"{days} d {hours} h"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
