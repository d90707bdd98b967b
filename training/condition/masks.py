"""Random regions to hide from a network that learns to fill them: rectangles and strokes, with a chosen share of area.

A region is the part of the image nearest to a random shape, with as many pixels as the share asks for. The share is
therefore exact, up to pixels at equal distance, whatever the shape and however much of it is outside the image.

Shape legend: N images, H x W pixels.
"""

import math

import torch

_RECTANGLES = 3  # at most, in one image
_SEGMENTS = 3  # of a stroke

NUM_DRAWS = 3 + 4 * _RECTANGLES + 2 + 2 * _SEGMENTS
"""Number of uniform random numbers that one mask takes."""


def uniform_of(normal: torch.Tensor) -> torch.Tensor:
    """Map standard normal numbers to uniform ones in [0, 1], by the normal distribution function."""
    return (torch.erf(normal / math.sqrt(2)) + 1) / 2


def random_masks(uniform: torch.Tensor, size: tuple[int, int], *, least: float, most: float) -> torch.Tensor:
    """Return the pixels to hide, bool [N, 1, H, W], from `uniform` [N, NUM_DRAWS], numbers in [0, 1].

    The share of hidden pixels is uniform between `least` and `most`. Half of the masks are one to three rectangles with
    sides of 1:4 to 4:1, anywhere in the image and cut off at its border. The other half are strokes of constant width,
    along a line that turns twice.
    """
    share, kind, count = uniform[:, :3].unbind(1)
    rectangles, stroke = uniform[:, 3 : 3 + 4 * _RECTANGLES], uniform[:, 3 + 4 * _RECTANGLES :]
    points = _pixel_centers(size, uniform.device)
    distance = torch.where(
        (kind < 0.5)[:, None], _from_rectangles(points, rectangles, count), _from_stroke(points, stroke)
    )  # [N, HW]
    num_pixels = distance.shape[1]
    number = ((least + (most - least) * share) * num_pixels).ceil().clamp(1, num_pixels).to(torch.int64)
    farthest = distance.sort(dim=1).values.gather(1, number[:, None] - 1)
    return (distance <= farthest).reshape(-1, 1, *size)


def _pixel_centers(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return x and y of all pixels, in units of the longer side: [2, HW]."""
    height, width = size
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32) + 0.5,
        torch.arange(width, device=device, dtype=torch.float32) + 0.5,
        indexing="ij",
    )
    return torch.stack([x.flatten(), y.flatten()]) / max(size)


def _from_rectangles(points: torch.Tensor, uniform: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Return the distance of pixels [2, HW] to the center of the nearest rectangle, in its half sides: [N, HW]."""
    center_x, center_y, form, scale = uniform.reshape(-1, _RECTANGLES, 4, 1).unbind(2)  # [N, R, 1] each
    aspect = torch.exp((form * 2 - 1) * math.log(2))  # width from 1/2 to 2, height the inverse
    x, y = points
    reach = torch.maximum((x - center_x).abs() / aspect, (y - center_y).abs() * aspect) / (
        0.5 + scale / 2
    )  # [N, R, HW]
    index = torch.arange(_RECTANGLES, device=points.device)[:, None]
    unused = index > (count * _RECTANGLES).floor()[:, None, None]
    return reach.masked_fill(unused, math.inf).amin(dim=1)


def _from_stroke(points: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the distance of pixels [2, HW] to a line of several segments: [N, HW]."""
    start = uniform[:, :2, None]  # [N, 2, 1]
    turns, lengths = uniform[:, 2 : 2 + _SEGMENTS], uniform[:, 2 + _SEGMENTS :]
    angle = torch.zeros_like(turns[:, 0])
    nearest = torch.full([len(uniform), points.shape[1]], math.inf, device=points.device)
    for segment in range(_SEGMENTS):
        # Any direction first; then a turn of at most 120 degrees to either side.
        swing = math.pi if segment == 0 else 2 * math.pi / 3
        angle = angle + (turns[:, segment] * 2 - 1) * swing
        step = torch.stack([angle.cos(), angle.sin()], dim=1)[:, :, None] * (
            0.2 + 0.4 * lengths[:, segment, None, None]
        )
        offset = points - start  # [N, 2, HW]
        along = ((offset * step).sum(1, keepdim=True) / step.square().sum(1, keepdim=True)).clamp(0, 1)
        nearest = torch.minimum(nearest, (offset - along * step).square().sum(1))
        start = start + step
    return nearest.sqrt()
