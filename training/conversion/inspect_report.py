"""What a look at a data set found, and its text."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass(kw_only=True)
class Report:
    """The findings. `problems` keep training from taking the data set; `notes` are worth knowing."""

    path: str
    kind: str = "pictures"  # or latents
    num_items: int = 0
    other_files: int = 0
    shapes: dict[str, int] = field(default_factory=dict)  # WxHxC: items
    labels: str = "none"
    classes: dict[int, int] = field(default_factory=dict)  # class: items
    mean: list[float] = field(default_factory=list)  # by channel, over items of the most frequent shape
    std: list[float] = field(default_factory=list)
    latents: dict[str, list[float]] = field(default_factory=dict)  # statistics of samples, and what the encoder assumes
    duplicates: list[list[str]] = field(default_factory=list)  # groups of items with equal content
    damaged: list[str] = field(default_factory=list)  # name: reason
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Whether training would take the data set."""
        return not self.problems


def describe(report: Report) -> str:
    """The report as lines of text."""
    number: Callable[[float], str] = lambda value: f"{value:.4g}"  # noqa: E731
    lines = [f"{report.path}: {report.num_items} {report.kind}"]
    lines += [
        f"  {count} of {size}, {channels} channel{'' if channels == '1' else 's'}"
        for (size, _, channels), count in ((shape.rpartition("x"), n) for shape, n in report.shapes.items())
    ]
    lines.append(f"Labels:   {report.labels}")
    if report.classes:
        lines += _histogram(report.classes)
    if report.mean:
        lines.append(f"Mean:     {', '.join(map(number, report.mean))}")
        lines.append(f"Std:      {', '.join(map(number, report.std))}")
    for name, values in report.latents.items():
        lines.append(f"Samples, {name}: {', '.join(map(number, values))}")
    lines.append(f"Other files: {report.other_files}")
    lines += [f"Damaged:  {text}" for text in report.damaged[:20]]
    if len(report.damaged) > 20:
        lines.append(f"Damaged:  and {len(report.damaged) - 20} more")
    lines += [f"Note:     {text}" for text in report.notes]
    lines += [f"Problem:  {text}" for text in report.problems]
    lines.append("Training would take this data set." if report.accepted else "Training would not take this data set.")
    return "\n".join(lines)


def _histogram(classes: dict[int, int], width: int = 40, most: int = 20) -> list[str]:
    """A bar for each class; of many classes, the number of classes in ranges of sizes."""
    if len(classes) <= most:
        largest = max(classes.values())
        return [f"  {label:>6}  {count:>8}  {'#' * -(-count * width // largest)}" for label, count in classes.items()]
    counts, edges = np.histogram(list(classes.values()), bins=8)
    lines = [f"  {len(classes)} classes, by how many images they have:"]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        lines.append(f"  {low:>8.0f} to {high:>8.0f}  {count:>6}  {'#' * int(-(-count * width // counts.max()))}")
    return lines
